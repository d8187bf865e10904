"""Programs timed by turns."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.timing import wall_times

BURN = "import time; end = time.process_time() + {0}\nwhile time.process_time() < end: pass"


def burn(cpu_s: float) -> list[str]:
    return [sys.executable, "-c", BURN.format(cpu_s)]


def test_only_a_programs_own_turns_count_and_what_it_started_stops_with_it():
    # xargs runs two children at once, so stopping xargs alone would let them go on in the others' turns
    both = ["sh", "-c", "printf '1\\n1\\n' | xargs -P 2 -I{} " + f"{sys.executable} -c '{BURN.format('{}')}'"]
    took = wall_times({"short": burn(0.4), "long": burn(1.2), "two at once": both}, slice_s=0.2)
    assert 0.4 <= took["short"] < took["long"] and took["long"] >= 1.2
    # Each child burns one second of processor time; two on two cores take at least one second of turns.
    assert took["two at once"] >= 0.95  # a poll of the parent is up to 50 ms late


def test_a_program_that_fails_ends_the_others_and_is_named():
    fails = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match=r"(?s)broken ended with 1.*no such thing"):
        wall_times(
            {"endless": [sys.executable, "-c", BURN.format(1e9) + " # fine-dist-turn"], "broken": fails}, slice_s=0.2
        )
    found = subprocess.run(["pgrep", "-f", "fine-dist-turn"], capture_output=True, text=True, check=False).stdout
    assert found == ""
