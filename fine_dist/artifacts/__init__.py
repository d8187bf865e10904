"""Models on disk in every format: this project's artifacts, DiT's `.pt` files, diffusers folders, hub repositories.

`load.load_model` reads any of them as a dense DiT; `exporting.export` writes one, with a model card.
"""
