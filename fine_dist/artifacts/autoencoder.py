"""Images from latents, by diffusers' `AutoencoderKL`.

Shapes: B images, C latent channels, h, w latent sides, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError, DataError
from fine_dist.diffusion.samplers import SampledBatch


class Decoder:
    """Decodes latents with a VAE: `decode(latents [B, C, h, w]) -> uint8 [B, 3, H, W]` on the CPU.

    Args:
        name: A folder (the VAE's own, or a pipeline's with a `vae` in it) or a hub name.
        scaling_factor: Of the codec that made the training latents (their manifest says it). A VAE with another one is
            an error, because its images would have a wrong contrast.
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
        scaling_factor: float | None = None,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        batch: int = 16,
    ) -> None:
        self.device, self.batch = torch.device(device), batch
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        name = expand_path(str(name))
        within = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
        try:
            vae: Any = AutoencoderKL.from_pretrained(
                str(name), subfolder=within, use_safetensors=True, torch_dtype=self.dtype
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ArtifactError(f"vae {name}: no AutoencoderKL can be loaded from there: {first}") from None
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self.channels = int(vae.config.latent_channels)
        check_scaling(str(name), self.scaling_factor, scaling_factor)
        self.vae = vae.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """`DataError` for latents of other channels than the VAE's."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise DataError(f"latents are {list(latents.shape)}; the VAE decodes [B, {self.channels}, h, w]")
        parts = []
        for z in latents.split(self.batch):
            z = (z.to(self.device, torch.float32) / self.scaling_factor + self.shift).to(self.dtype)
            pixels = self.vae.decode(z).sample.float()
            parts.append(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(parts)


def check_scaling(name: str, found: float, wanted: float | None) -> None:
    """`ArtifactError` when a VAE's scaling factor is not that of the latents."""
    if wanted is not None and abs(found - wanted) > 1e-6 * abs(wanted):
        raise ArtifactError(
            f"vae {name}: its scaling_factor is {found:g}, and the latents that the model was trained on were "
            f"scaled by {wanted:g}: it is not the VAE that encoded them"
        )


def decoded(batches: Iterable[SampledBatch], decoder: Decoder) -> Iterator[tuple[SampledBatch, Tensor]]:
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
