"""Ranks compare their devices before anything else: a job that asked for GPUs never runs on a CPU, whole or in part."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from fine_dist.core.errors import ConfigError, LaunchError, ReportedElsewhere
from fine_dist.engine import dist
from fine_dist.testing import run_distributed

WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, uuid: str = "") -> None:
    """torch counts so many GPUs, of which the first ones have this identity."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid or str(device)))


@pytest.fixture
def unjoined(monkeypatch: pytest.MonkeyPatch) -> None:
    """No world has been found in this process."""
    monkeypatch.setattr(dist, "_current", None)


@WITHOUT_A_GPU
@pytest.mark.parametrize("start", [dist.world, dist.single_process])
def test_a_process_that_asked_for_a_gpu_says_why_torch_has_none(unjoined, monkeypatch, start) -> None:
    monkeypatch.setenv(dist.GPU_REQUIRED, "1")
    with pytest.raises(
        LaunchError, match=r"the job asked for GPUs, and rank 0 \(.*\) runs on the CPU: torch .* is built"
    ):
        start()


@WITHOUT_A_GPU
def test_a_gpu_of_another_kind_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"Intel GPU \(xpu\); GPUs of NVIDIA and AMD are supported"):
        dist.pick_device("cuda")


def test_a_rank_that_is_shown_one_gpu_takes_it_and_one_beyond_the_last_is_refused(monkeypatch) -> None:
    gpus(monkeypatch, 1)
    assert dist.pick_device("auto", local_rank=3) == torch.device("cuda", 0)  # --gpus-per-task shows each rank its own
    gpus(monkeypatch, 4)
    assert dist.pick_device("auto", local_rank=3) == torch.device("cuda", 3)
    with pytest.raises(ConfigError, match=r"number 4 on .* shows it 4 GPUs"):
        dist.pick_device("auto", local_rank=4)


def meet(counts: list[int], uuid: str, asked: bool) -> tuple[str, str]:
    """What this rank learns when ranks see so many GPUs."""
    import os

    with pytest.MonkeyPatch.context() as patch:
        if asked:
            patch.setenv(dist.GPU_REQUIRED, "1")
        gpus(patch, counts[int(os.environ["RANK"])], uuid)
        try:
            dist.world()
        except (LaunchError, ReportedElsewhere) as error:
            return type(error).__name__, str(error)
    return "", ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("counts", "uuid", "asked", "message"),
    [
        ([0, 0], "", True, "the job asked for GPUs, and rank 0 ("),
        ([2, 0], "", True, "the job asked for GPUs, and rank 1 ("),
        ([2, 0], "", False, "1 of 2 ranks have a GPU, and rank 1 ("),
        ([2, 2, 2], "", False, "rank 2: this process is number 2 on"),
        ([1, 1], "GPU-7", False, "ranks 0 and 1 share one GPU of"),
    ],
)
def test_ranks_whose_devices_do_not_fit_are_refused_at_once_with_their_numbers(counts, uuid, asked, message) -> None:
    begun = time.monotonic()
    answers = run_distributed(meet, len(counts), counts, uuid, asked, timeout_s=60)
    assert time.monotonic() - begun < 50  # a process group of both kinds would wait for half an hour
    assert [kind for kind, _ in answers] == ["LaunchError", *["ReportedElsewhere"] * (len(counts) - 1)]
    assert all(text.startswith(message) for _, text in answers), answers


@pytest.mark.distributed
@WITHOUT_A_GPU
def test_ranks_that_asked_for_nothing_meet_on_the_cpu() -> None:
    assert run_distributed(meet, 2, [0, 0], "", False) == [("", ""), ("", "")]


def test_the_servers_of_tests_leave_deepspeed_to_the_ranks_where_there_is_a_gpu(monkeypatch) -> None:
    from fine_dist.testing.ranks import preloaded

    gpus(monkeypatch, 1)
    assert not [name for name in preloaded() if "deepspeed" in name]  # it would be bound to the CPU for all ranks
    gpus(monkeypatch, 0)
    assert "deepspeed" in preloaded()
