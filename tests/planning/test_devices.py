"""The device that estimates assume."""

from __future__ import annotations

import re

import pytest

from fine_dist.condense import main as condense
from fine_dist.core.errors import ConfigError
from fine_dist.core.settings import LaunchConfig
from fine_dist.engine.settings import EngineConfig
from fine_dist.plan import main as plan
from fine_dist.planning.devices import device_for

ON_CPU = EngineConfig(device="cpu", threads=4)


def test_a_job_on_the_cpu_is_estimated_for_its_cores_and_one_with_gpus_for_an_accelerator():
    cores = device_for(None, LaunchConfig(), ON_CPU)
    assert cores.flops_per_s == 4 * 40e9 and not cores.accelerator
    gpu = device_for(None, LaunchConfig(gpus=1), EngineConfig(precision="bf16"))
    assert gpu.accelerator and gpu.flops_per_s > 50e12


def test_the_device_that_is_named_is_assumed_whatever_its_spelling_and_the_precision_counts():
    bf16, fp32 = (device_for("gpu:h100", LaunchConfig(), EngineConfig(precision=p)) for p in ("bf16", "fp32"))
    assert (bf16.name, bf16.memory_bytes) == ("an H100 80GB HBM3", 80 * 2**30)
    assert bf16.flops_per_s == pytest.approx(0.4 * 989.4e12) and fp32.flops_per_s < bf16.flops_per_s
    assert device_for("gpu:rtx-4090", LaunchConfig()).name == "an RTX 4090"
    assert device_for("gpu:mi300x", LaunchConfig()).memory_bytes == 192 * 2**30
    assert device_for("gpu:A100-SXM4-80GB", LaunchConfig()).memory_bytes == 80 * 2**30
    assert device_for("cpu:16", LaunchConfig(gpus=1)).flops_per_s == 16 * 40e9


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("gpu:h1000", "no such accelerator is known; did you mean 'H"),
        ("tpu", "legal: gpu:NAME"),
        ("cpu:many", "number of cores"),
        ("gpu:", "legal"),
    ],
)
def test_a_device_that_nobody_knows_is_refused_with_the_legal_ones(wish, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        device_for(wish, LaunchConfig())


def test_a_dry_run_and_a_plan_for_another_machine_give_estimates_with_what_is_missing_here_as_a_note(tmp_path, capsys):
    words = ["--arch", "DiT-S/2", "--run-dir", str(tmp_path / "run"), "--launch.gpus", "1", "--for", "gpu:h100"]
    words += ["--data.shards", str(tmp_path / "not-here"), "--engine.precision", "bf16"]
    assert condense([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "396 TFLOP/s (an H100 80GB HBM3 at 40% of its peak)" in said and "note: launch.gpus 1" in said
    assert re.search("note: .*there is no such folder of shards", said)
    assert (
        plan(["--stage", "condense", *words, "--launcher", "slurm"]) == 2
    )  # no cluster is asked, but the data is missing
    said = capsys.readouterr().out
    assert "an accelerator has 78.4" in said and "an H100 80GB HBM3 at 40%" in said and "gpus" not in said
