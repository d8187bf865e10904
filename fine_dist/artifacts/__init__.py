"""Models on disk in every layout: this project's artifacts, the original DiT's `.pt`, diffusers folders, the hub.

`load.load_model` reads any of them as a dense DiT, `exporting.export` writes one, with its model card.
"""
