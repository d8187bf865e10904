"""Codecs that encode images as latents: the identity (pixels), or an autoencoder of diffusers.

Letters: B images of a batch, C channels of a latent, H, W height and width of an image.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fine_dist.core.errors import DataError
from fine_dist.data.manifest import Channels


class Codec(Protocol):
    """Encodes images as latents. The stream later yields `(latent - shift_factor) * scaling_factor`.

    The scaling factor and the shift are one number for all channels or one for each.
    """

    name: str
    scaling_factor: Channels
    shift_factor: Channels

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of an image of shape (channels, H, W)."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (None: the codec is deterministic) of float32 images [B, C, H, W] in [-1, 1]."""


class TokenEncoder(Protocol):
    """An image encoder whose tokens are stored with the latents."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> str:
        """sha256 of the weights."""

    def grid_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Tokens [B, E, h, w] of float32 images [B, C, H, W] in [-1, 1], C being 1 or 3."""


class Identity:
    """The codec whose latents are the pixels."""

    name = "identity"
    scaling_factor: Channels = 1.0
    shift_factor: Channels = 0.0

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        return channels, height, width

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images, None


def load_autoencoder(name: str, *, subfolder: str | None, dtype: torch.dtype) -> Any:
    """Load an autoencoder of diffusers, of the class that its config names.

    Args:
        name: A local folder or a hub name.
        subfolder: Folder of the autoencoder in a pipeline's repository. None: the root.
        dtype: Data type of the weights.

    Raises:
        DataError: It cannot be loaded, has no safetensors weights, or is no autoencoder.
    """
    import diffusers

    try:
        # The class is the one in the config: DC-AE's weights in an AutoencoderKL would be a list of missing keys.
        kind = str(diffusers.AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name", "AutoencoderKL"))
        model_class: Any = getattr(diffusers, kind, None)
        if callable(getattr(model_class, "encode", None)) and callable(getattr(model_class, "decode", None)):
            return model_class.from_pretrained(name, subfolder=subfolder, use_safetensors=True, torch_dtype=dtype)
    except Exception as error:  # diffusers raises many kinds of errors for a folder that holds something else
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"vae: {name}: no autoencoder can be loaded: {first}") from None
    raise DataError(
        f"vae: {name}: it is a {kind}, and an autoencoder is needed, such as AutoencoderKL or AutoencoderDC (in a "
        "complete pipeline's folder: --vae-subfolder vae)"
    )


def scaling_of(vae: Any) -> tuple[Channels, Channels]:
    """(scale, shift) that diffusers' pipelines apply to this autoencoder's latents: `(latent - shift) * scale`.

    They are channel-wise if the config has `latents_mean` and `latents_std`.
    """
    if scales_itself(vae):
        return 1.0, 0.0
    scale = float(getattr(vae.config, "scaling_factor", None) or 1.0)
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean and std:
        return tuple(scale / float(value) for value in std), tuple(map(float, mean))
    return scale, float(getattr(vae.config, "shift_factor", None) or 0.0)


def scales_itself(vae: Any) -> bool:
    """Whether the model applies the config's scale and statistics itself and expects images in [0, 1]: representation
    autoencoders (RAE, arXiv 2510.11690)."""
    return type(vae).__name__ == "AutoencoderRAE"


class Autoencoder:
    """An image autoencoder of diffusers: AutoencoderKL, AutoencoderDC and others that encode [B, C, H, W].

    The shape of a latent depends on the autoencoder: for images of 256 pixels it is 4 x 32 x 32 with Stable
    Diffusion's, 16 x 32 x 32 with SD3's and 32 x 8 x 8 with DC-AE f32.
    """

    def __init__(self, name: str, *, subfolder: str | None, device: str, precision: str) -> None:
        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        vae = load_autoencoder(name, subfolder=subfolder, dtype=self.dtype)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.name = name
        self.scaling_factor, self.shift_factor = scaling_of(vae)

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of an image's latent, found by encoding a blank image: configs name the down-sampling differently."""
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
        encoding = self.vae.encode((images + 1) / 2 if scales_itself(self.vae) else images)
        # KL autoencoders return a distribution; deterministic ones have `latent` or `latents`, depending on the class.
        if hasattr(encoding, "latent_dist"):
            return encoding.latent_dist.mean.float().cpu(), encoding.latent_dist.std.float().cpu()
        latent = encoding.latent if hasattr(encoding, "latent") else encoding.latents
        return latent.float().cpu(), None
