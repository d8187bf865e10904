"""Imported by the test tool's server: what every rank of a test needs, once."""

from __future__ import annotations

import torch
import torch.utils.tensorboard

import fine_dist.engine.loop  # noqa: F401

torch.set_num_threads(1)
