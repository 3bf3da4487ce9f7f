"""The networks: noisy latents, time and text in, velocity out; one device, no knowledge of training."""
