"""What the tests of several formats share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A tiny random autoencoder: 4 latent channels, images twice as large as latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder
