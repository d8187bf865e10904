"""Imported by the test tool's server (`fine_dist.testing`): what every rank of a test needs, paid for once."""

from __future__ import annotations

import deepspeed  # noqa: F401
import torch
import torch.utils.tensorboard

import fine_dist.engine.loop  # noqa: F401

torch.set_num_threads(1)
