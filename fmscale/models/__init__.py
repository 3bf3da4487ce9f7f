"""The networks: noisy latents, time and text in, velocity out; one device, no knowledge of training."""

from fmscale.models.mmdit import MMDiT

MODELS = {"mmdit": MMDiT}
