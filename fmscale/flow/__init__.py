"""The mathematics of flow matching: pure functions of tensors, float32 inside.

t in [0, 1], 0 = data, 1 = noise; noisy_latents = alpha(t) latents + beta(t) noise; velocity = its derivative by t.
Where no path is named it is the rectified one: (1 - t) latents + t noise, and noise - latents.
"""
