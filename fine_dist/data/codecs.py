"""Codecs that turn images into latents: the identity (pixels), or an autoencoder of diffusers.

Letters: B images of a batch, C channels of a latent, S image size.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fine_dist.core.errors import DataError


class Codec(Protocol):
    """Turns images into latents; the stream later gives `(latent - shift_factor) * scaling_factor`."""

    name: str
    scaling_factor: float
    shift_factor: float

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image [C, S, S]."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (None: the codec is deterministic) of float32 images [B, C, S, S] in [-1, 1]."""


class Identity:
    """Pixels are the latents."""

    name, scaling_factor, shift_factor = "identity", 1.0, 0.0

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


class Autoencoder:
    """An image autoencoder of diffusers: AutoencoderKL, AutoencoderDC and others that encode [B, C, S, S].

    Channels and down-sampling are the autoencoder's own: 4 x 32 x 32 of 256 pixels for Stable Diffusion's, 16 channels
    for SD3's, 32 x 8 x 8 for DC-AE f32.
    """

    def __init__(self, name: str, *, subfolder: str | None, device: str, precision: str) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        vae = load_autoencoder(name, subfolder=subfolder, dtype=self.dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.name = name
        self.scaling_factor = float(getattr(vae.config, "scaling_factor", None) or 1.0)
        self.shift_factor = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image; a blank image is encoded, because autoencoders name their factors
        differently."""
        blank = torch.zeros(1, *image_shape)
        try:
            latent = self.encode(blank)[0]
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise DataError(f"vae: {self.name} does not encode images {list(image_shape)}: {reason}") from None
        size, side = int(image_shape[-1]), int(latent.shape[-1])
        factor = round(size / side)
        if latent.ndim != 4 or side * factor != size:
            raise DataError(
                f"image_size: {size} pixels give latents of {side}: the autoencoder down-samples by {factor}; use a "
                f"multiple of {factor}, such as {side * factor}"
            )
        channels, height, width = latent.shape[1:]
        return int(channels), int(height), int(width)

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = self.vae.encode(images.to(self.device, self.dtype))
        # KL autoencoders return a distribution, deterministic ones a `latent` or `latents`, by class.
        if hasattr(found, "latent_dist"):
            return found.latent_dist.mean.float().cpu(), found.latent_dist.std.float().cpu()
        latent = found.latent if hasattr(found, "latent") else found.latents
        return latent.float().cpu(), None
