"""Weights of DiTs inside the checkpoints of training frameworks: every wrapping is recognized and reported."""

from __future__ import annotations

import re

import pytest
import torch

from fine_dist.artifacts.dit_pt import read_dit, to_dit
from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.errors import ArtifactError
from fine_dist.model.dit import DiT
from tests.artifacts.test_dit_pt import arch, saved
from tests.conftest import lively


@pytest.fixture
def model() -> DiT:
    return lively(DiT(arch()), std=0.1)


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


WRAPPED = {
    "ddp": lambda s: {"model": renamed(s, lambda k: f"module.{k}")},
    "compiled": lambda s: renamed(s, lambda k: f"_orig_mod.{k}"),
    "compiled ddp": lambda s: renamed(s, lambda k: f"module._orig_mod.{k}"),
    "compiled blocks": lambda s: {"ema": renamed(s, lambda k: re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", k))},
    "fsdp": lambda s: renamed(
        s,
        lambda k: (
            "_fsdp_wrapped_module."
            + re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module.", k)
        ),
    ),
    "deepspeed": lambda s: {"module": s, "optimizer": None, "global_steps": 3},
    "lightning": lambda s: {"state_dict": renamed(s, lambda k: f"model.{k}"), "epoch": 1, "loops": {"a": {"b": 1}}},
    "lightning with a vae": lambda s: {
        "state_dict": {**renamed(s, lambda k: f"net.dit.{k}"), "vae.conv.weight": torch.zeros(2, 2)}
    },
    "pixart": lambda s: {"state_dict_ema": s, "state_dict": renamed_half(s), "epoch": 1},
    "ema_pytorch": lambda s: {
        "ema": {
            **renamed(s, lambda k: f"ema_model.{k}"),
            **renamed(renamed_half(s), lambda k: f"online_model.{k}"),
            "initted": torch.tensor(True),
            "step": torch.tensor(3),
        }
    },
    "one mapping": lambda s: {**renamed(s, lambda k: f"ema.{k}"), **renamed_half(s)},
    "repa": lambda s: {
        "ema": {**s, "projectors.0.0.weight": torch.zeros(8, 64), "projectors.0.0.bias": torch.zeros(8)}
    },
    "nested twice": lambda s: {"checkpoint": {"model_state_dict": s}, "optimizer_state_dict": {"state": {}}},
}


def renamed_half(state):
    """Raw weights, which are not the average."""
    return {name: tensor if name == "pos_embed" else tensor * 0.5 for name, tensor in state.items()}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_weights_come_in_and_it_is_said_what_was_taken_off(tmp_path, model, name):
    path = saved(tmp_path, WRAPPED[name](to_dit(model.arch, model.state_dict())))
    found = read_dit(path, HintsConfig(num_heads=4))
    assert all(torch.equal(found.state[key], value) for key, value in model.state_dict().items())
    notes = " ".join(found.notes)
    for kind, words in {
        "lightning": "'model.' was removed from every name",
        "lightning with a vae": "dropped, as no part of the model: vae.conv.weight",
        "pixart": "weights: state_dict_ema (not used: state_dict)",
        "ema_pytorch": "dropped, as no part of the model: initted, step",
        "repa": "2 tensors of REPA's projectors.0.0.bias",
    }.items():
        assert name != kind or words in notes, notes


@pytest.mark.parametrize("name", ["pixart", "ema_pytorch", "one mapping"])
def test_raw_weights_are_read_where_they_are_asked_for(tmp_path, model, name):
    state = to_dit(model.arch, model.state_dict())
    found = read_dit(saved(tmp_path, WRAPPED[name](state)), HintsConfig(num_heads=4), "raw")
    assert torch.equal(found.state["label.weight"], state["y_embedder.embedding_table.weight"] * 0.5)


def test_ema_counts_as_a_word_of_a_name_only(tmp_path, model):
    state = to_dit(model.arch, model.state_dict())
    path = saved(tmp_path, {"schema": state, "net_ema": renamed_half(state)})
    for weights, scale in (("raw", 1.0), ("ema", 0.5)):
        found = read_dit(path, HintsConfig(num_heads=4), weights)
        assert torch.equal(found.state["label.weight"], state["y_embedder.embedding_table.weight"] * scale)


def test_averages_are_not_passed_off_as_raw_weights(tmp_path, model):
    path = saved(tmp_path, {"ema": to_dit(model.arch, model.state_dict())})
    with pytest.raises(ArtifactError, match=r"holds averaged weights only \(ema\)"):
        read_dit(path, HintsConfig(num_heads=4), "raw")
