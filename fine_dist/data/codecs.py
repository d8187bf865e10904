"""Codecs that turn images into latents: the identity (pixels), or an autoencoder of diffusers.

Letters: B images of a batch, C channels of a latent, H, W height and width of an image.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fine_dist.core.errors import DataError
from fine_dist.data.shards import Channels


class Codec(Protocol):
    """Turns images into latents; the stream later gives `(latent - shift_factor) * scaling_factor`.

    Both are one number for all channels, or one for each.
    """

    name: str
    scaling_factor: Channels
    shift_factor: Channels

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image [C, H, W]."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (None: the codec is deterministic) of float32 images [B, C, H, W] in [-1, 1]."""


class TokenEncoder(Protocol):
    """An image encoder whose tokens are stored beside the latents."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str:
        """sha256 of its weights."""

    def grid_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, E, h, w] of float32 images [B, C, H, W] in [-1, 1], C being 1 or 3."""


class Identity:
    """Pixels are the latents."""

    name = "identity"
    scaling_factor: Channels = 1.0
    shift_factor: Channels = 0.0

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        return channels, height, width

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images, None


def load_autoencoder(name: str, *, subfolder: str | None, dtype: torch.dtype) -> Any:
    """An autoencoder of diffusers, of whichever class its config names, from a local folder or a hub name.

    Raises `DataError` when it cannot be loaded, has no safetensors weights, or is no autoencoder.
    """
    import diffusers

    try:
        # The config's own class name decides: loading DC-AE's weights
        # into AutoencoderKL would fail with a wall of missing keys.
        kind = str(diffusers.AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name", "AutoencoderKL"))
        model_class: Any = getattr(diffusers, kind, None)
        if callable(getattr(model_class, "encode", None)) and callable(getattr(model_class, "decode", None)):
            return model_class.from_pretrained(name, subfolder=subfolder, use_safetensors=True, torch_dtype=dtype)
    except Exception as error:  # diffusers raises many kinds of errors for a folder that holds something else
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"vae: {name}: no autoencoder can be loaded: {first}") from None
    raise DataError(
        f"vae: {name}: it is a {kind}, and an autoencoder is needed, such as AutoencoderKL or AutoencoderDC (in a "
        "whole pipeline's folder: --vae-subfolder vae)"
    )


def scaling_of(vae: Any) -> tuple[Channels, Channels]:
    """(scale, shift) by which a pipeline of diffusers uses this autoencoder's latents: `(latent - shift) * scale`.

    With `latents_mean` and `latents_std` in its config, each channel has its own.
    """
    if scales_itself(vae):
        return 1.0, 0.0
    scale = float(getattr(vae.config, "scaling_factor", None) or 1.0)
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean and std:
        return tuple(scale / float(value) for value in std), tuple(map(float, mean))
    return scale, float(getattr(vae.config, "shift_factor", None) or 0.0)


def scales_itself(vae: Any) -> bool:
    """Whether encoding and decoding apply the config's scale and statistics themselves, and images are 0 to 1, not -1
    to 1: representation autoencoders (RAE, arXiv 2510.11690)."""
    return type(vae).__name__ == "AutoencoderRAE"


class Autoencoder:
    """An image autoencoder of diffusers: AutoencoderKL, AutoencoderDC and others that encode [B, C, H, W].

    Channels and down-sampling are the autoencoder's own: 4 x 32 x 32 of 256 pixels for Stable Diffusion's, 16 channels
    for SD3's, 32 x 8 x 8 for DC-AE f32.
    """

    def __init__(self, name: str, *, subfolder: str | None, device: str, precision: str) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        vae = load_autoencoder(name, subfolder=subfolder, dtype=self.dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.name = name
        self.scaling_factor, self.shift_factor = scaling_of(vae)

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image; a blank image is encoded, because autoencoders name their factors
        differently."""
        blank = torch.zeros(1, *image_shape)
        try:
            latent = self.encode(blank)[0]
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"vae: {self.name} does not encode images {list(image_shape)}: {reason}") from None
        for size, side in zip(image_shape[1:], latent.shape[2:]):
            factor = round(size / side)
            if latent.ndim != 4 or side * factor != size:
                raise DataError(
                    f"image_size: {size} pixels give latents of {side}: the autoencoder down-samples by {factor}; use "
                    f"a multiple of {factor}, such as {side * factor}"
                )
        channels, height, width = latent.shape[1:]
        return int(channels), int(height), int(width)

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        images = images.to(self.device, self.dtype)
        found = self.vae.encode((images + 1) / 2 if scales_itself(self.vae) else images)
        # KL autoencoders return a distribution, deterministic ones a `latent` or `latents`, by class.
        if hasattr(found, "latent_dist"):
            return found.latent_dist.mean.float().cpu(), found.latent_dist.std.float().cpu()
        latent = found.latent if hasattr(found, "latent") else found.latents
        return latent.float().cpu(), None
