"""Images from latents, by an autoencoder of diffusers.

Shapes: B images, C latent channels, h, w latent sides, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError, DataError
from fine_dist.data.batch import by_channel
from fine_dist.data.codecs import load_autoencoder, scales_itself, scaling_of
from fine_dist.data.manifest import Channels
from fine_dist.diffusion.samplers import SampledBatch


class Decoder:
    """Decodes latents with a VAE of any class: `decode(latents [B, C, h, w]) -> uint8 [B, 3, H, W]` on the CPU.

    Args:
        name: A folder (the VAE's own, or a pipeline's with a `vae` in it) or a hub name.
        scaling_factor: By which the training latents were multiplied (their manifest says it). A VAE with another one
            is an error, because its images would have a wrong contrast; one for each channel may have been measured
            over the data, and is undone.
        shift_factor: What was subtracted from them before; None where it is not known.
        device: Where it decodes.
        precision: `fp32` or `bf16`.
        batch: Latents decoded at once.

    Raises:
        ArtifactError: No VAE can be loaded, or it does not fit.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        scaling_factor: Channels | None = None,
        shift_factor: Channels | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        batch: int = 16,
    ) -> None:
        self.device, self.batch = torch.device(device), batch
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        name = expand_path(str(name))
        within = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
        try:
            vae: Any = load_autoencoder(name, subfolder=within, dtype=self.dtype)
        except DataError as error:
            raise ArtifactError(str(error)) from None
        self.scale, self.shift = scaling_of(vae)
        check_scaling(str(name), (self.scale, self.shift), (scaling_factor, shift_factor))
        if isinstance(scaling_factor, tuple):
            self.scale, self.shift = scaling_factor, shift_factor or 0.0
        self.channels: int | None = getattr(vae.config, "latent_channels", None)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self._from_zero = scales_itself(vae)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """`DataError` for latents of other channels than the VAE's, or of a size that it does not decode."""
        if latents.ndim != 4 or latents.shape[1] != (self.channels or latents.shape[1]):
            raise DataError(f"latents are {list(latents.shape)}; the VAE decodes [B, {self.channels or 'C'}, h, w]")
        scale, shift = by_channel(self.scale, self.device), by_channel(self.shift, self.device)
        parts = []
        for z in latents.split(self.batch):
            z = (z.to(self.device, torch.float32) / scale + shift).to(self.dtype)
            try:
                pixels = self.vae.decode(z).sample.float()
            except (RuntimeError, ValueError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                first = str(error).strip().partition("\n")[0]
                raise DataError(f"latents are {list(latents.shape)}, which the VAE does not decode: {first}") from None
            pixels = pixels * 255 if self._from_zero else (pixels + 1) * 127.5
            parts.append(pixels.round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(parts)


def check_scaling(
    name: str, scaling: tuple[Channels, Channels], wanted: tuple[Channels | None, Channels | None]
) -> None:
    """`ArtifactError` when a VAE's (scale, shift) is not that of the latents.

    Args:
        name: What the VAE is called.
        scaling: The scale and shift of the VAE.
        wanted: Those of the latents; None where nothing tells. A scale for each channel passes: it may be measured.
    """
    if isinstance(wanted[0], tuple):
        return
    labels = (("scaling_factor", "scaled by"), ("shift_factor", "shifted by"))
    for (key, verb), value, theirs in zip(labels, scaling, wanted):
        if theirs is None or isinstance(theirs, tuple):
            continue
        if isinstance(value, tuple) or abs(value - theirs) > 1e-6 * max(abs(theirs), abs(value)):
            text = "one for each channel" if isinstance(value, tuple) else f"{value:g}" if value else "none"
            raise ArtifactError(
                f"vae {name}: its {key} is {text}, and the latents that the model was trained on were {verb} "
                f"{theirs:g}: it is not the VAE that encoded them"
            )


def decode_batches(batches: Iterable[SampledBatch], decoder: Decoder) -> Iterator[tuple[SampledBatch, Tensor]]:
    """Each batch with its images uint8 [B, 3, H, W]; a thread decodes one batch while the next is sampled.

    On a GPU the decoder's kernels run in a stream of their own beside the sampler's. At most one batch waits, which
    bounds memory.
    """
    stream = torch.cuda.Stream(decoder.device) if decoder.device.type == "cuda" else None

    def work(batch: SampledBatch) -> Tensor:
        with torch.cuda.stream(stream):  # does nothing where stream is None
            return decoder.decode(batch.latents)

    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        waiting: tuple[SampledBatch, Future[Tensor]] | None = None
        for batch in batches:
            following = (batch, pool.submit(work, batch))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
