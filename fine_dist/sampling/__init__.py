"""Sampling of images from models: settings, the renderer, image grids, and files that several processes write."""
