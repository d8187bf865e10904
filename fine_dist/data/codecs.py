"""What turns images into latents: pixels as they are, or an autoencoder.

Letters: B images of a batch, C channels of a latent, S image size.
"""

from __future__ import annotations

from typing import Protocol

import torch

from fine_dist.core.errors import DataError


class Codec(Protocol):
    """What turns images into latents."""

    name: str
    scaling_factor: float

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latent of an image [C, S, S]."""

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (None: there is none) of float32 images [B, C, S, S] in [-1, 1]."""


class Identity:
    """Pixels are the latents."""

    name, scaling_factor = "identity", 1.0

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        channels, height, width = image_shape
        return channels, height, width

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images, None


class Autoencoder:
    """diffusers' `AutoencoderKL`, from a local folder or a hub name.

    `DataError` when it cannot be loaded, has no safetensors weights, or shifts its latents.
    """

    def __init__(self, name: str, *, subfolder: str | None, device: str, precision: str) -> None:
        from diffusers import AutoencoderKL

        self.device = torch.device(device)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        try:
            kind = AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name", "AutoencoderKL")
            if kind == "AutoencoderKL":
                vae = AutoencoderKL.from_pretrained(
                    name, subfolder=subfolder, use_safetensors=True, torch_dtype=self.dtype
                )
        except Exception as error:  # what diffusers raises for a folder that is something else is not to be foreseen
            first = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(f"vae: {name}: no AutoencoderKL can be loaded: {first}") from None
        if kind != "AutoencoderKL":
            raise DataError(
                f"vae: {name}: it is a {kind}, and an AutoencoderKL is needed (in a whole pipeline's folder: "
                "--vae-subfolder vae)"
            )
        if getattr(vae.config, "shift_factor", None):
            raise DataError(f"vae: {name}: shift_factor {vae.config.shift_factor} is not supported; use a VAE without")
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.name, self.scaling_factor = name, float(vae.config.scaling_factor)

    def shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        channels, height, width = image_shape
        if channels != self.vae.config.in_channels or height % factor or width % factor:
            raise DataError(
                f"image_size: the VAE takes {self.vae.config.in_channels} channels and sides that are multiples of "
                f"{factor}, not {channels}x{height}x{width}"
            )
        return self.vae.config.latent_channels, height // factor, width // factor

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return found.mean.float().cpu(), found.std.float().cpu()
