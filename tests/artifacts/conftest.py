"""What the tests of several formats share."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fine_dist.artifacts.card import ModelCard
from fine_dist.artifacts.diffusers_export import write_diffusers
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT
from tests.conftest import lively, tiny_arch


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


def diffusers_arch(**fields) -> Arch:
    """The smallest model that every layout of diffusers can hold."""
    return tiny_arch(**{"num_layers": 2, "in_channels": 4, "learn_sigma": True, **fields})


@pytest.fixture(scope="session")
def model() -> DiT:
    return lively(DiT(diffusers_arch()), std=0.1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory, model, vae):
    folder = tmp_path_factory.mktemp("out") / "pipe"
    names = tuple(f"class {i}" for i in range(10))
    card = ModelCard("fine", "ab" * 32, "cc-by-nc-4.0", "facebook/DiT-XL-2-256", {"FID-5k (ddim 50, guidance 1)": 12.5})
    written = write_diffusers(
        folder, model.arch, model.state_dict(), vae=vae, scaling_factor=0.5, class_names=names, card=card
    )
    return folder, written


def copied(folder, tmp_path):
    """A copy of an exported folder, which a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(path, **values):
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
