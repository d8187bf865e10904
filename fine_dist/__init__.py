"""fine_dist: condense a diffusion transformer once, then initialize every size from it."""

__version__ = "0.2.0"
