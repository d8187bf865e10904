"""Tiny random encoders with a real BPE vocabulary, and what the tests compare with: transformers' own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fine_dist.creative.config import CreativeConfig
from fine_dist.creative.encoder_sources import load_encoders
from fine_dist.creative.encoders import TextEncoder
from fine_dist.creative.tiny import make_encoders

TOKEN = "<CreTok>"


@pytest.fixture(scope="session")
def encoders() -> list[TextEncoder]:
    """Two encoders, as SD3 has two. Frozen; read only."""
    return load_encoders(["tiny"], TOKEN)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory) -> Path:
    """The tiny encoders on disk as a pipeline's repository has them. Read only."""
    folder = tmp_path_factory.mktemp("pipeline")
    for ending, (model, tokenizer) in zip(("", "_2"), make_encoders()):
        model.save_pretrained(folder / f"text_encoder{ending}")
        tokenizer.save_pretrained(folder / f"tokenizer{ending}")
    return folder


def grown(encoder: TextEncoder, row: Tensor) -> Any:
    """A copy of an encoder's model as textual inversion has it: its table one row longer."""
    model = copy.deepcopy(encoder.model)
    model.resize_token_embeddings(encoder.token_id + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[encoder.token_id] = row
    return model


def whole_forward(encoder: TextEncoder, model: Any, prompts: Sequence[str]) -> Tensor:
    """transformers' text embeddings of prompts padded to full length, as pipelines compute them."""
    ids = encoder.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids
    return model(ids).text_embeds


def tiny_config(run_dir: Path, **fields: Any) -> CreativeConfig:
    """A run of a few steps that logs every one."""
    return CreativeConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "encoders": ["tiny"],
            "steps": 8,
            "batch": 4,
            "optim": {"lr": 1e-2, "schedule": "cosine", "clip_norm": None},
            "engine": {
                "ema_decay": 0.0, "device": "cpu", "log_every": 1, "eval_every": 4, "checkpoint_every": 4,
            },
            **fields,
        }
    )  # fmt: skip
