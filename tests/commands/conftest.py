"""What the tests of several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fine_dist.__main__ import main as fine_dist

ARCH = [
    *("--arch.hidden-size", "32", "--arch.num-layers", "3", "--arch.num-heads", "4", "--arch.in-channels", "1"),
    *("--arch.input-size", "8", "--arch.num-classes", "10", "--arch.no-learn-sigma"),
]
FAST = [
    "--steps",
    "4",
    "--batch",
    "16",
    "--engine.log-every",
    "2",
    "--engine.eval-every",
    "4",
    "--engine.device",
    "cpu",
]
FAST += ["--sampler.steps", "2", "--sampler.clip", "1"]


def data(shards: Path) -> list[str]:
    return ["--data.shards", str(shards / "train"), "--data.held-out", str(shards / "held_out")]


def command(argv: list[str]) -> int:
    """A command in this process; its exit code."""
    here = [] if argv[0] in ("export", "benchmark") or "--dry-run" in argv else ["--launcher", "here"]
    return fine_dist([*argv, *here])


def refused(argv: list[str], capsys) -> str:
    """The message of a command that must refuse: exit 2, one line, no traceback."""
    try:
        code = command(argv)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, f"exit {code}: {err}"
    assert "Traceback" not in err
    return " ".join(err.split())


@pytest.fixture(scope="session")
def trained(digit_shards, tmp_path_factory):
    """A run of `train`: a tiny model of digits, hardly trained."""
    run = tmp_path_factory.mktemp("trained") / "train"
    assert command(["train", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(run)]) == 0
    return run
