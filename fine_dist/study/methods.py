"""The benchmark of methods: studies under one protocol, one report, and rows of quality beside cost.

A benchmark is a file: settings that its parts share, the parts (a study each: targets of other depths, another domain),
and a `quick` cut of them all. Same data order, same steps after initialisation, same measures; every cost is counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from fine_dist.core.config import Config, validate
from fine_dist.core.errors import ConfigError
from fine_dist.core.yaml_files import load_yaml, parse_word
from fine_dist.study import results_of
from fine_dist.study.config import StudyConfig, merged
from fine_dist.study.graph import plan
from fine_dist.study.report.claims import verdicts
from fine_dist.study.report.results import Results


class BenchmarkConfig(Config):
    """A benchmark of methods."""

    run_dir: str
    """Where everything is written: a folder a part, results.json, results.md and report.html."""
    study: dict[str, Any] = Field(default_factory=dict)
    """Settings of a study that all parts share."""
    parts: dict[str, dict[str, Any]] = Field(min_length=1)
    """The studies: what is laid over the shared settings."""
    quick: dict[str, Any] = Field(default_factory=dict)
    """Laid over every part for a smoke test: small sizes, one seed."""
    quick_parts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The same for one part, over `quick`."""


def load_benchmark(path: str | Path, changes: list[str] | None = None, quick: bool = False) -> dict[str, StudyConfig]:
    """A benchmark's studies by part.

    changes: `KEY=VALUE` with dotted keys of a study, laid over every part; `run_dir` is the whole benchmark's.
    `ConfigError` names what is wrong.
    """
    benchmark = validate(BenchmarkConfig, load_yaml(path), str(path))
    given = [_change(text) for text in changes or []]
    root = next((change["run_dir"] for change in reversed(given) if "run_dir" in change), benchmark.run_dir)
    told = "".join(f" --set {text}" for text in changes or [] if not text.startswith("run_dir="))
    command = f"python -m fine_dist.study --config {_short(path)}{told}{' --quick' if quick else ''}"
    found = {}
    for name, part in benchmark.parts.items():
        values = merged(benchmark.study, part)
        if quick:
            values = merged(merged(values, benchmark.quick), benchmark.quick_parts.get(name, {}))
        for change in given:
            values = merged(values, {key: value for key, value in change.items() if key != "run_dir"})
        values |= {"run_dir": str(Path(root) / name), "command": command}
        found[name] = validate(StudyConfig, values, f"{path}, part {name}")
    return found


def _short(path: str | Path) -> str:
    """A benchmark's file as it is called from the project's folder."""
    root = Path(__file__).resolve().parents[2]
    full = Path(path).resolve()
    return str(full.relative_to(root)) if full.is_relative_to(root) else str(path)


def _change(text: str) -> dict[str, Any]:
    key, found, word = text.partition("=")
    if not found or not key:
        raise ConfigError(f"--set {text!r} is no KEY=VALUE; such as --set seeds=[0] or --set steps.N=100")
    value: Any = parse_word(word)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def outline(studies: dict[str, StudyConfig]) -> list[str]:
    """Every run of every part, and what it all would take."""
    from fine_dist.study import outline as of_study
    from fine_dist.study.budget import estimate, tuning_estimate

    lines = []
    for name, study in studies.items():
        lines += [f"{name}: {study.title}", *of_study(study)]
        tuning = tuning_estimate(study)
        lines += [tuning.line(f"{name}, tuning")] if tuning else []
        lines.append(estimate(study).line(name))
    return lines


def run(studies: dict[str, StudyConfig], launcher: str = "auto") -> dict[str, Any]:
    """Run what is not done, print tables and verdicts, write the reports; rows and verdicts as JSON values.

    Raises `TrainingError` naming the runs that failed, after the others have ended; the same call goes on from there.
    """
    from fine_dist.core.files import write_atomic
    from fine_dist.study.report import write_report
    from fine_dist.study.report.markdown import markdown
    from fine_dist.study.report.page import page

    for study in studies.values():
        plan(study)  # what cannot be planned is said before anything runs
    results = {name: results_of(study, launcher) for name, study in studies.items()}
    root = next(iter(studies.values())).root.parent
    found: dict[str, Any] = {"rows": [], "verdicts": {}}
    for name, part in results.items():
        print(f"\n{name}: {write_report(studies[name].root / 'report', part)}", flush=True)
        found["rows"] += rows(name, part)
        found["verdicts"][name] = [verdict.as_json() for verdict in verdicts(part)]
    write_atomic(root / "results.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_atomic(root / "results.md", "\n".join(markdown(part) for part in results.values()))
    write_atomic(root / "report.html", page(*results.values()))
    print(f"benchmark: {root / 'results.json'}, {root / 'results.md'}, {root / 'report.html'}", flush=True)
    return found


def rows(part: str, results: Results) -> list[dict[str, Any]]:
    """A row a method, target, seed and length of training: what it is worth, and all it has cost.

    flops counts everything behind the model, its ancestors' training and its teacher's forward passes included;
    own_flops its own stages alone. steps are training steps after initialisation.
    """
    found = []
    for row in results.rows:
        if row.stage != "train" or row.step not in results.told_steps(row.series, row.target):
            continue
        where = f"{row.target} layers, {row.step} steps, seed {row.seed}"
        found.append(
            {
                "measure": f"{part}: {results.label(row.series)}, {where}",
                "value": row.held_out_loss,
                "unit": "held-out loss",
                "bar": None,
                "better": "lower",
                "part": part,
                "method": row.method,
                "target": row.target,
                "seed": row.seed,
                "steps": row.step,
                "held_out_loss": row.held_out_loss,
                "frechet": row.frechet,
                "fd_efflite": row.fd_efflite,
                "stored": row.stored,
                "trained": row.trained,
                "flops": row.flops + row.flops_condense,
                "own_flops": row.flops,
                "steps_init": row.steps_init,
                "steps_before": row.steps_condense,
                "samples": row.samples + row.samples_condense,
                "seconds": row.seconds + row.seconds_condense,
            }
        )
    return found
