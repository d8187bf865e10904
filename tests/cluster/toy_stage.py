"""A stage small enough to test launchers with: it writes what it saw, and can fail, wait, die or stop early."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from fine_dist.core.config import Config
from fine_dist.core.errors import DataError, ResumeLater, guard
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.spec import Task

PRELOAD = ()
VERSION = "as submitted"


class ToyConfig(Config):
    """What the toy does."""

    run_dir: str = "run"
    """Where it writes."""
    launch: LaunchConfig = LaunchConfig()
    """What it needs."""
    value: int = 0
    """Written to the result."""
    sleep_s: float = 0.0
    """Seconds of work."""
    sleep_first_s: float = 0.0
    """Seconds of work of the first start only."""
    await_save: bool = False
    """Work ends early when a file SAVE appears, which is answered with a file `saved`."""
    fail: str = ""
    """`user`, `crash` or `kill`: every attempt does so; `first`: the first one is killed."""
    stop_times: int = 0
    """Times it asks to be started again."""
    tasks: int = 0
    """Above zero: a fan-out of so many."""
    bad: tuple[int, ...] = ()
    """Tasks of the fan-out that always fail."""


def tasks(config: ToyConfig) -> list[Task] | None:
    if not config.tasks:
        return None
    return [
        Task(f"task{i}", config.model_copy(update={
            "tasks": 0, "bad": (), "value": i, "run_dir": f"{config.run_dir}/out/task{i}",
            "fail": "user" if i in config.bad else config.fail,
        }))
        for i in range(config.tasks)
    ]  # fmt: skip


def run(config: ToyConfig) -> Path:
    out, begun = Path(config.run_dir), time.time()
    out.mkdir(parents=True, exist_ok=True)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    starts = out / f"starts-{rank}"
    with open(starts, "a") as file:
        print(os.getpid(), file=file)
    times = len(starts.read_text().splitlines())
    print(f"toy rank {rank} start {times}", flush=True)
    stop = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    deadline = time.monotonic() + config.sleep_s + (config.sleep_first_s if times == 1 else 0.0)
    while time.monotonic() < deadline and not stop:
        time.sleep(0.02)
        if config.await_save and (out / "SAVE").exists():
            (out / "SAVE").rename(out / "saved")
            break
    if stop:
        raise ResumeLater(f"signal {stop[0]}")
    if times <= config.stop_times:
        raise ResumeLater(f"stop {times}")
    if config.fail == "user":
        raise DataError("this task always fails")
    if config.fail == "crash":
        raise ZeroDivisionError("crashed")
    if config.fail == "kill" or (config.fail == "first" and times == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    seen = {key: os.environ.get(key) for key in keys}
    result = {"value": config.value, "version": VERSION, "starts": times, "rank": rank, "seen": seen}
    result["span"] = [begun, time.time()]
    (out / f"result-{rank}.json").write_text(json.dumps(result))
    return out


def main() -> int:
    def body() -> int:
        from fine_dist.core.arguments import parse
        from fine_dist.launchers.entry import launch

        call = parse(ToyConfig, None, "toy")
        return launch("tests.cluster.toy_stage", call.config, call.launcher)

    return guard(body)


if __name__ == "__main__":
    raise SystemExit(main())
