"""The mathematics of rectified flow: pure functions of tensors, float32 inside.

t in [0, 1], 0 = data, 1 = noise; noisy_latents = (1 - t) latents + t noise; velocity = noise - latents.
"""
