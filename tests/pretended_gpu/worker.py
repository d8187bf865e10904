"""A process that has the pretended GPU, and runs the scenarios that tests ask it for: one JSON object a line.

It is a process of its own because the library must be loaded before torch, and because a torch that believes in CUDA is
no place for other tests.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """The process, from a test's side; it starts with the first scenario that is asked for."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self._env = env or {}
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def run(self, scenario: str, **settings: Any) -> dict[str, Any]:
        """What the function `scenario` of `scenarios.py` returns. Its errors are raised here, with their traceback."""
        self.start(scenario, **settings)
        return self.answer()

    def start(self, scenario: str, **settings: Any) -> None:
        """Ask for a scenario; `answer` waits for it."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"scenario": scenario, "settings": settings}) + "\n")
        process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the scenario that was asked for first found."""
        process = self._started()
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process with the pretended GPU ended with code {process.wait()}:\n{self._said()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["found"]

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"the process with the pretended GPU has ended before:\n{self._said()}")
        if self._process is None:
            self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process lives
            env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **self._env}
            env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
            command = [sys.executable, "-m", "tests.pretended_gpu.worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)  # type: ignore[call-overload]
        return self._process

    def _said(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read()[-4000:]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)


def main() -> None:
    """Answer scenarios until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the product prints is no answer
    scenarios = importlib.import_module("tests.pretended_gpu.scenarios")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"found": getattr(scenarios, asked["scenario"])(**asked["settings"])}
        except Exception:  # whatever went wrong is the test's to report
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
