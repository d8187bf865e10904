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

from fine_dist.interop.card import Card
from fine_dist.interop.diffusers_io import read_diffusers, to_diffusers
from fine_dist.interop.diffusers_out import Written, load_pipeline, set_frequencies, write_diffusers
from fine_dist.interop.dit_pt import read_dit, to_dit, write_dit
from fine_dist.interop.imported import DIT_LICENCE, UNKNOWN_LICENCE, Hints, Imported
from fine_dist.interop.load import load, read_own
from fine_dist.interop.npz import (
    NpzImages,
    ReferenceStatistics,
    has_statistics,
    read_statistics,
    write_samples,
    write_statistics,
)
from fine_dist.interop.store import ImageStore, LatentStore
from fine_dist.interop.vae import Decoder, decoded

__all__ = [
    "DIT_LICENCE",
    "UNKNOWN_LICENCE",
    "Card",
    "Decoder",
    "Hints",
    "ImageStore",
    "Imported",
    "LatentStore",
    "NpzImages",
    "ReferenceStatistics",
    "Written",
    "decoded",
    "has_statistics",
    "load",
    "load_pipeline",
    "read_diffusers",
    "read_dit",
    "read_own",
    "read_statistics",
    "set_frequencies",
    "to_diffusers",
    "to_dit",
    "write_diffusers",
    "write_dit",
    "write_samples",
    "write_statistics",
]
