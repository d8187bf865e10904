"""A stage that a study can run in milliseconds: it notes that it ran, or fails as its config says."""

from __future__ import annotations

import time
from pathlib import Path

from fine_dist.core.config import Config
from fine_dist.core.errors import ConfigError
from fine_dist.core.settings import LaunchConfig

PRELOAD = ()


class ToyConfig(Config):
    """A toy stage."""

    run_dir: str = "runs/toy"
    """Where it notes."""
    needs: tuple[str, ...] = ()
    """Files that must be there."""
    fail: bool = False
    """End with an error."""
    seconds: float = 0.0
    """How long it takes."""
    launch: LaunchConfig = LaunchConfig(retries=0)
    """What the job needs."""


def run(config: ToyConfig) -> None:
    """Append a line to `ran`; raises what it is told to, or when a file it needs is missing."""
    missing = [name for name in config.needs if not Path(name).exists()]
    if missing or config.fail:
        raise ConfigError(f"this toy fails: {missing or 'as asked'}")
    time.sleep(config.seconds)
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "ran", "a", encoding="utf-8") as file:
        file.write("once\n")


def main() -> int:
    """Follow a graph of toys: `python -m tests.study.toy ROOT LAUNCHER [SECONDS]`; `two` and `three` need `one`."""
    import sys

    from fine_dist.core.errors import guard
    from fine_dist.study.config import load_study
    from fine_dist.study.graph import Graph, StudyRun
    from fine_dist.study.scheduler import follow

    def body() -> int:
        root = Path(sys.argv[1])
        study = load_study("tests/study/digits.yaml", run_dir=str(root))
        graph = Graph(study)
        for name, after in (("two", ("one",)), ("three", ("one",)), ("one", ())):
            needs = tuple(str(root / before / "ran") for before in after)
            config = ToyConfig(run_dir=str(root / name), needs=needs, seconds=float((sys.argv[3:] or ["0"])[0]))
            graph.runs.append(StudyRun(name, "tests.study.toy", config, 1, after))
        follow(graph, sys.argv[2])
        return 0

    return guard(body)


if __name__ == "__main__":
    raise SystemExit(main())
