"""The words of each launcher, and DeepSpeed's JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fine_dist.core.errors import ConfigError, LaunchError
from fine_dist.engine.deepspeed_json import deepspeed_json
from fine_dist.engine.settings import OptimConfig
from fine_dist.engine.world import first_host, read_environment
from tests.engine.toy import engine

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


@pytest.mark.parametrize("words", [TORCHRUN, SRUN])
def test_torchruns_and_sruns_words_say_the_same(words: dict[str, str]) -> None:
    world = read_environment(words)
    assert (world.rank, world.world_size, world.local_rank, world.local_size) == (5, 8, 1, 4)


def test_ranks_of_a_slurm_step_meet_at_its_first_host_at_a_port_of_their_own() -> None:
    meeting = read_environment(SRUN).master
    assert meeting == read_environment({**SRUN, "SLURM_PROCID": "0"}).master
    assert meeting is not None and meeting.startswith("gpu07:")
    assert meeting != read_environment({**SRUN, "SLURM_JOB_ID": "1235"}).master
    assert meeting != read_environment({**SRUN, "SLURM_STEP_ID": "1"}).master
    assert read_environment({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1"}).master == "head:1"


def test_a_batch_script_is_one_process_although_slurm_counts_its_tasks() -> None:
    world = read_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1234"})
    assert (world.rank, world.world_size) == (0, 1)


def test_no_words_mean_one_process_and_impossible_ones_are_an_error() -> None:
    assert read_environment({}).world_size == 1
    with pytest.raises(LaunchError, match="RANK 8 is outside WORLD_SIZE 8"):
        read_environment({**TORCHRUN, "RANK": "8"})


@pytest.mark.parametrize(
    ("nodes", "first"), [("n1", "n1"), ("gpu[03-07,12],cpu1", "gpu03"), ("a-[1,3]-x", "a-1-x"), ("n1,n2", "n1")]
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


# --- DeepSpeed's JSON -----------------------------------------------------------------------------------------------


def extra(folder: Path, **values: object):
    path = folder / "extra.json"
    path.write_text(json.dumps(values))
    return engine(backend="deepspeed", deepspeed={"stage": 2, "extra": str(path)})


def test_the_json_follows_our_config() -> None:
    settings = engine(backend="deepspeed", precision="bf16", deepspeed={"stage": 3, "offload_optimizer": True})
    made = deepspeed_json(OptimConfig(clip_norm=0.5), settings, world_size=4, micro=8, accumulation=2)
    assert made["train_batch_size"] == 64 and made["gradient_clipping"] == 0.5
    zero = made["zero_optimization"]
    assert zero["stage"] == 3 and zero["offload_optimizer"] == {"device": "cpu"} and "offload_param" not in zero
    assert zero["reduce_bucket_size"] < 10**8  # DeepSpeed's own default would be a buffer of 2 GB
    assert made["torch_autocast"]["enabled"] and not made["bf16"]["enabled"]


def test_keys_of_the_extra_file_are_added_and_auto_means_ours(tmp_path: Path) -> None:
    settings = extra(
        tmp_path,
        zero_optimization={"stage": "auto", "reduce_bucket_size": 1000},
        gradient_clipping=1.0,
        train_batch_size="auto",
        wall_clock_breakdown=True,
    )
    made = deepspeed_json(OptimConfig(), settings, world_size=1, micro=8, accumulation=1)
    assert made["zero_optimization"]["stage"] == 2 and made["zero_optimization"]["reduce_bucket_size"] == 1000
    assert made["wall_clock_breakdown"] is True and made["train_batch_size"] == 8


def test_every_key_that_contradicts_our_config_is_named_and_none_is_overridden(tmp_path: Path) -> None:
    settings = extra(
        tmp_path,
        zero_optimization={"stage": 3},
        train_micro_batch_size_per_gpu=4,
        bf16={"enabled": True},
        optimizer={"type": "Adam"},
    )
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(OptimConfig(), settings, world_size=1, micro=8, accumulation=1)
    said = str(caught.value)
    assert "zero_optimization.stage: 3 in the file, 2 by our config" in said
    assert "train_micro_batch_size_per_gpu: 4 in the file, 8 by our config" in said
    assert "bf16.enabled: True in the file, False by our config" in said
    assert "optimizer:" in said and "gradient_clipping" not in said


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"stage": 2, "offload_params": True}, "offload_params needs stage 3"),
        (
            {"stage": 2, "extra": "configs/deepspeed/zero3_offload.json"},
            "offload_param.*engine.deepspeed.offload_params",
        ),
        ({"stage": 0, "offload_optimizer": True}, "offload_optimizer needs stage 1, 2 or 3"),
        ({"stage": 1, "extra": "/nowhere.json"}, "/nowhere.json: No such file"),
    ],
)
def test_impossible_choices_are_errors(choice: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_json(OptimConfig(), engine(backend="deepspeed", deepspeed=choice), 1, 8, 1)


def test_every_file_in_configs_deepspeed_fits_a_stage() -> None:
    folder = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
    files = sorted(folder.glob("*.json"))
    assert files
    for path in files:
        asked = json.loads(path.read_text())["zero_optimization"]
        choice = {
            "stage": asked["stage"],
            "offload_optimizer": "offload_optimizer" in asked,
            "offload_params": "offload_param" in asked,
            "extra": os.fspath(path),
        }
        made = deepspeed_json(OptimConfig(), engine(backend="deepspeed", deepspeed=choice), 4, 8, 1)
        assert made["zero_optimization"].items() >= asked.items()
