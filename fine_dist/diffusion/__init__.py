"""The diffusion process: what a model predicts, the loss, the held-out loss, random numbers and samplers."""
