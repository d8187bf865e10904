"""Other projects' checkpoints and statistics, in and out.

In:   `load(source, Hints(...)) -> Imported` takes our own `model/` folder, a diffusers folder, a `.pt` or
      `.safetensors` in DiT's layout, or a name on the hub, and says its architecture, licence, diffusion and notes.
      `Imported.state` fits `fine_dist.model.dit.DiT(imported.arch)`; `Imported.provenance()` goes into manifests.
Out:  `write_diffusers(folder, arch, state, vae=..., card=Card(...)) -> Written`, `write_dit(path, arch, state)`; each
      runs what it wrote and compares. `load_pipeline(folder)` is diffusers' pipeline with the model's frequencies.
VAE:  `Decoder(name, scaling_factor=...).decode(latents)`; `decoded(batches, decoder)` decodes while the next is drawn.
      `ImageStore` takes pictures from any process in any order, knows what is missing, and ends as an `.npz`;
      `LatentStore` does so with latents, and ends as an `.npy`.
npz:  `read_statistics`, `write_statistics`, `NpzImages(path).batches(n)`, `write_samples(path, batches, count=...)`.
"""
