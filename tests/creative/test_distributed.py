"""The same token from one process, from two, and under DeepSpeed's ZeRO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fine_dist.creative.config import CreativeConfig
from fine_dist.creative.saving import read_token
from fine_dist.testing import run_distributed
from tests.creative.conftest import tiny_config

pytestmark = pytest.mark.distributed


def several(configs: list[str]) -> None:
    """Runs, one after the other, in one world."""
    from fine_dist.creative import command as creative

    for config in configs:
        creative.run(CreativeConfig.model_validate_json(config))


def test_two_processes_and_zero_3_learn_the_token_of_one(tmp_path: Path) -> None:
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    plain = tiny_config(tmp_path / "one").engine.model_dump()
    engines = {
        "plain": plain,
        "zero 3": {**plain, "backend": "deepspeed", "deepspeed": {"stage": 3, "extra": str(extra)}},
    }
    configs = {name: tiny_config(tmp_path / name, steps=5, engine=engine) for name, engine in engines.items()}
    run_distributed(several, 2, [config.model_dump_json() for config in configs.values()], timeout_s=280)
    several([tiny_config(tmp_path / "one", steps=5).model_dump_json()])
    one = read_token(tmp_path / "one")
    for name in configs:
        found = read_token(tmp_path / name)
        for key, row in one.rows.items():
            torch.testing.assert_close(found.rows[key], row, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.control[key], one.control[key], rtol=1e-5, atol=1e-5)
