"""DiT and what every method shares: layers, factored layers, roles of parameters, FLOPs, artifacts on disk."""
