"""Fixtures that several rooms share. Everything random is seeded."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from fine_dist.model.arch import Arch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_arch(**fields) -> Arch:
    """A DiT small enough for a test: width 32, 4 heads, 16 tokens of a 1x8x8 latent, 10 classes."""
    return Arch(
        **{
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "patch_size": 2,
            "in_channels": 1,
            "input_size": 8,
            "num_classes": 10,
            "learn_sigma": False,
            **fields,
        }
    )


def lively(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Every parameter drawn anew, so that nothing is zero and every path matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model


def inputs(arch: Arch, batch: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, t, y) for a forward pass."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, *arch.latent_shape, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    y = torch.randint(0, arch.num_classes + 1, (batch,), generator=generator)
    return z, t, y


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """What a library puts into the environment (DeepSpeed: RANK and friends) must not make a later test's commands
    believe that they are a worker."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


DIGITS = {"in_channels": 1, "input_size": 8, "num_classes": 10, "learn_sigma": False}


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory):
    """The embedded digits as shards: a folder with `train` and `held_out`. Read only."""
    from fine_dist import encode

    out = tmp_path_factory.mktemp("digits")
    encode.run(encode.EncodeConfig(source="digits", out=str(out)))
    return out
