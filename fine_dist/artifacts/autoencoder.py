"""Decodes latents to images with an autoencoder of diffusers.

Shapes: B images, C latent channels, h, w height and width of a latent, H, W height and width of an image.
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
    """An autoencoder of diffusers, of any class, that decodes latents.

    Args:
        name: Folder of the autoencoder, folder of a pipeline with a `vae` subfolder, or hub name.
        scaling_factor: Factor by which the training latents were multiplied, from the data's manifest; None if unknown.
            A scalar that differs from the autoencoder's own is an error, because images would have the wrong contrast.
            Factors per channel may be statistics of the data: they replace the autoencoder's own.
        shift_factor: Value that was subtracted from the latents before they were scaled; None if unknown.
        device: Device of the autoencoder.
        precision: Data type of the autoencoder, `fp32` or `bf16`.
        batch: Number of latents decoded at once.

    Raises:
        ArtifactError: The autoencoder cannot be loaded, or its scaling differs from that of the latents.
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
        subfolder = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
        try:
            vae: Any = load_autoencoder(name, subfolder=subfolder, dtype=self.dtype)
        except DataError as error:
            raise ArtifactError(str(error)) from None
        self.scale, self.shift = scaling_of(vae)
        check_scaling(str(name), (self.scale, self.shift), (scaling_factor, shift_factor))
        if isinstance(scaling_factor, tuple):
            self.scale, self.shift = scaling_factor, shift_factor or 0.0
        self.channels: int | None = getattr(vae.config, "latent_channels", None)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self._outputs_unit_range = scales_itself(vae)  # images in [0, 1] instead of [-1, 1]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w], scaled as for training, to images uint8 [B, 3, H, W] on the CPU.

        Raises:
            DataError: The latents have another number of channels than the autoencoder's, or a size it cannot decode.
        """
        if latents.ndim != 4 or latents.shape[1] != (self.channels or latents.shape[1]):
            raise DataError(f"latents are {list(latents.shape)}; the VAE decodes [B, {self.channels or 'C'}, h, w]")
        scale, shift = by_channel(self.scale, self.device), by_channel(self.shift, self.device)
        images = []
        for z in latents.split(self.batch):
            z = (z.to(self.device, torch.float32) / scale + shift).to(self.dtype)
            try:
                pixels = self.vae.decode(z).sample.float()
            except (RuntimeError, ValueError) as error:
                if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError, but the latents are not at fault
                    raise
                first = str(error).strip().partition("\n")[0]
                raise DataError(f"latents are {list(latents.shape)}, which the VAE does not decode: {first}") from None
            pixels = pixels * 255 if self._outputs_unit_range else (pixels + 1) * 127.5
            images.append(pixels.round().clamp(0, 255).to(torch.uint8).cpu())
        return torch.cat(images)


def check_scaling(
    name: str, scaling: tuple[Channels, Channels], wanted: tuple[Channels | None, Channels | None]
) -> None:
    """Check that an autoencoder scales latents as the training data were scaled.

    Args:
        name: Name of the autoencoder, for the message.
        scaling: (scale, shift) of the autoencoder.
        wanted: (scale, shift) of the training latents; None if unknown. If the scale is one per channel, nothing is
            compared, because both may be statistics of the data.

    Raises:
        ArtifactError: The scale or the shift differs by more than a relative 1e-6.
    """
    if isinstance(wanted[0], tuple):
        return
    labels = (("scaling_factor", "scaled by"), ("shift_factor", "shifted by"))
    for (key, verb), value, theirs in zip(labels, scaling, wanted):
        if theirs is None:
            continue
        expected, actual = torch.tensor(theirs), torch.tensor(value)
        if expected.shape != actual.shape or not torch.allclose(actual, expected, rtol=1e-6, atol=0):
            text, wanted_text = ("one for each channel" if v.ndim else f"{v:g}" for v in (actual, expected))
            if text == "0":
                text = "none"
            raise ArtifactError(
                f"vae {name}: its {key} is {text}, and the latents that the model was trained on were {verb} "
                f"{wanted_text}: it is not the VAE that encoded them"
            )


def decode_batches(batches: Iterable[SampledBatch], decoder: Decoder) -> Iterator[tuple[SampledBatch, Tensor]]:
    """Yield each batch with its images uint8 [B, 3, H, W]. A thread decodes one batch while the next is sampled.

    On a GPU the decoder has its own CUDA stream, so that its kernels overlap with the sampler's. Latents arrive on the
    CPU, so the streams need no synchronization. At most one decoded batch is held back, which bounds memory.
    """
    stream = torch.cuda.Stream(decoder.device) if decoder.device.type == "cuda" else None

    def decode(batch: SampledBatch) -> Tensor:
        with torch.cuda.stream(stream):  # a no-op if stream is None
            return decoder.decode(batch.latents)

    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        waiting: tuple[SampledBatch, Future[Tensor]] | None = None
        for batch in batches:
            following = (batch, pool.submit(decode, batch))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()
