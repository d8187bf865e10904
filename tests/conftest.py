"""Fixtures that several rooms share. Everything random is seeded."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from fine_dist.testing import inputs, lively, tiny_arch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["DIGITS", "inputs", "lively", "tiny_arch"]


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
