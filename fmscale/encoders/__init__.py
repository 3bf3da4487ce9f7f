"""Frozen networks: captions -> Conditioning (`text`), images <-> latents (`vae`)."""
