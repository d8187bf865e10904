"""A long night of fuzzing, and its table: `python -m tests.fuzz_table --times 40` runs the fuzz tests with 40 times as
many examples, other ones each time, and writes what was tried into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fine_dist.core.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- fuzz: written by `make fuzz` -->", "<!-- /fuzz -->"
FILES = ("tests/test_fuzz.py", "tests/test_fuzz_readers.py")


def main() -> int:
    """Run, count, write; the exit code of pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=40, help="how many times as many examples as the suite tries")
    parser.add_argument("--only", default="", help="pytest's -k, to look for a fault again; the page is left alone")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        counts.touch()
        env = {**os.environ, "FINE_DIST_FUZZ": str(options.times), "FINE_DIST_FUZZ_COUNTS": str(counts)}
        words = [sys.executable, "-m", "pytest", *FILES, "-q", "--tb=short", "--timeout=36000", "-rfE"]
        done = subprocess.run([*words, *(["-k", options.only] if options.only else [])], env=env, cwd=ROOT)
        tried = Counter(re.sub(r"\[.*", "", line) for line in counts.read_text().splitlines())
    rows = "\n".join(
        f"| {name.removeprefix('test_').replace('_', ' ')} | {count:,} |" for name, count in sorted(tried.items())
    )
    ended = "all were answered in words" if done.returncode == 0 else "some were not, as pytest says above"
    minutes = (time.monotonic() - began) / 60
    table = (
        f"{BEGIN}\n| what must hold | commands and readers asked |\n|---|---|\n{rows}\n\n"
        f"{sum(tried.values()):,} in {minutes:.0f} minutes: {ended}.\n{END}"
    )
    print(table)
    if not options.only:
        text = PAGE.read_text(encoding="utf-8")
        write_atomic(PAGE, text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
