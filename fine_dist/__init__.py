"""fine_dist: condense a diffusion transformer once, then initialise every size from it."""

__version__ = "0.1.0"
