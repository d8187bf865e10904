"""Log lines: their ranks, one line for a library's warning, levels by flags, streams that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEAKING = """
import argparse, logging, sys, warnings
from fine_dist.core import logs
parser = argparse.ArgumentParser(); logs.add_flags(parser); logs.configure(parser.parse_args(sys.argv[1:]))
ours, theirs = logging.getLogger("fine_dist.engine.loop"), logging.getLogger("some_library")
ours.debug("a detail"); ours.info("writes to %s", "runs/a"); ours.warning("one checkpoint is damaged")
for _ in range(3):
    theirs.warning("this option is old"); warnings.warn("a tensor was copied", UserWarning)
theirs.info("chatter"); theirs.error("a real failure")
"""


def said(*flags: str, **env: str) -> list[str]:
    """What a process logs, as lines."""
    words = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "FINE_DIST_LOG_LEVEL")
    }
    words["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", SPEAKING, *flags], env=words | env, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_one_process_logs_ours_and_a_librarys_warnings_once():
    lines = said()
    assert lines[:2] == ["writes to runs/a", "warning: one checkpoint is damaged"]
    assert lines[2] == "warning: this option is old"
    assert lines[3].startswith("warning: UserWarning: a tensor was copied (")
    assert lines[4:] == ["error: a real failure"]


def test_quiet_leaves_warnings_and_verbose_adds_details():
    assert said("--quiet")[0] == "warning: one checkpoint is damaged"
    verbose = said("--verbose")
    assert "debug: a detail" in verbose and "chatter" in verbose
    assert verbose.count("warning: this option is old") == 3
    assert said(FINE_DIST_LOG_LEVEL="warning") == said("--quiet")  # how the processes of a command hear of it
    assert said(FINE_DIST_LOG_LEVEL="nonsense") == said()


def test_every_rank_names_itself_and_only_the_first_repeats_a_library():
    first, third = (said(RANK=rank, WORLD_SIZE="4") for rank in ("0", "2"))
    assert first[0] == "[rank 0] writes to runs/a" and "[rank 0] warning: this option is old" in first
    assert third == [
        "[rank 2] writes to runs/a", "[rank 2] warning: one checkpoint is damaged", "[rank 2] error: a real failure",
    ]  # fmt: skip
    assert said(RANK="x", WORLD_SIZE="y") == said()


@pytest.mark.parametrize("end", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_stderr_that_cannot_be_written_ends_nothing(end):
    script = f'PYTHONPATH={ROOT} "$0" -c "$1" {end}'
    assert subprocess.run(["bash", "-c", script, sys.executable, SPEAKING]).returncode == 0


def test_a_line_is_written_above_the_bars_that_are_shown():
    code = (
        "import logging, sys, time; from tqdm import tqdm; from fine_dist.core import logs; logs.configure()\n"
        "with tqdm(total=2, file=sys.stderr, mininterval=0) as bar:\n"
        "    bar.update(); logging.getLogger('fine_dist').info('between'); bar.update()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert any(line.rstrip().rpartition("\r")[2] == "between" for line in done.stderr.split("\n")), done.stderr
