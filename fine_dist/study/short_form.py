"""From the file of a study to the configs of its studies.

The short form is expanded to the full form: methods become entries (`recipes.yaml`), and the budget becomes steps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fine_dist.artifacts.reading import facts_of
from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError, RunDirError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import Record, read_record
from fine_dist.core.logs import duration
from fine_dist.core.yaml_files import load_yaml, parse_value
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import locate
from fine_dist.methods import SCRATCH, from_manifest
from fine_dist.model.arch import Arch, sides
from fine_dist.planning.devices import CORE_GFLOPS
from fine_dist.study.budget import estimate, measuring_hours, tuning_estimate
from fine_dist.study.config import StudyConfig, merged
from fine_dist.study.study_file import StudyFile, recipes, seconds_of

ANCESTOR = "ancestor"
"""Name of the entry for the trained model in an expanded short form."""
MIN_STEPS = 20
"""Smallest N that a budget may allow."""
SAFETY = 0.85
"""Fraction of a budget that is planned; the rest is for encoding, start-up and the report."""
EXTENSIONS = 1.5
"""Duration of tuning relative to its first grid's: grids are extended while a best value lies at an end."""
PLAN = "planned.json"
"""File in a study's folder with the steps planned for its budget, which later starts reuse."""


class PlannedSteps(Record):
    """planned.json of a study in its short form."""

    asked: dict[str, Any]
    """The settings that the plan depends on. Other settings, such as additional methods, do not change the steps."""
    steps: int = Field(ge=1)
    """N, from which all lengths are derived."""


def studies_of(
    file: StudyFile, source: str, changes: Sequence[str] = (), quick: bool = False, gflops: float | None = None
) -> dict[str, StudyConfig]:
    """The studies of a file by part; the short form has one part, `study`.

    Args:
        file: The file's settings.
        source: Path of the file, for messages and for the command in the report.
        changes: `KEY=VALUE` with dotted keys of a study, which override the settings of every part.
        quick: Whether the quick settings override them as well.
        gflops: Measured GFLOP/s of a core, from which the short form plans steps. None: assumed.

    Raises:
        ConfigError: The settings are not a legal study, or the budget is too small.
    """
    overrides = [_change(text) for text in changes]
    root = next((change["run_dir"] for change in reversed(overrides) if "run_dir" in change), file.run_dir)
    options = "".join(f" --set {text}" for text in changes if not text.startswith("run_dir="))
    command = f"python -m fine_dist.study --config {source}{options}{' --quick' if quick else ''}"
    parts = file.parts or {"study": written_out(file)}
    studies = {}
    for name, part in parts.items():
        values = merged(file.study, part) if file.parts else merged(part, file.study)
        if quick:
            values = merged(merged(values, file.quick_settings), file.quick_part_settings.get(name, {}))
        for change in overrides:
            values = merged(values, {key: value for key, value in change.items() if key != "run_dir"})
        values |= {"run_dir": str(Path(root) / name), "command": command}
        studies[name] = validate(StudyConfig, values, f"{source}, part {name}")
    if plans_steps(file, changes):
        studies = {name: _planned(study, file, gflops) for name, study in studies.items()}
    return studies


def _planned(study: StudyConfig, file: StudyFile, gflops: float | None) -> StudyConfig:
    """The study with the steps that were planned when it first ran, otherwise with a new plan for its budget.

    The measured speed of a machine varies between starts, and with another number of steps no run could be resumed.
    """
    try:
        earlier = read_record(PlannedSteps, study.root / PLAN, RunDirError, "delete it to plan the steps again")
    except FileNotFoundError:
        earlier = None
    if earlier and earlier.asked == _asked(file):
        return _with_steps(study, earlier.steps)
    return fitted(study, seconds_of(file.budget) / 3600, gflops)


def plans_steps(file: StudyFile, changes: Sequence[str]) -> bool:
    """Whether the steps are planned from the budget: in the short form, unless they are set."""
    return file.data is not None and not any("steps" in change for change in [*map(_change, changes), file.study])


def keep_plan(study: StudyConfig, file: StudyFile) -> None:
    """Write the planned steps to planned.json, which `_planned` reads."""
    plan = {"asked": _asked(file), "steps": study.steps["N"]}
    write_atomic(study.root / PLAN, json.dumps(plan, indent=1) + "\n")


def _asked(file: StudyFile) -> dict[str, Any]:
    return file.model_dump(mode="json", include={"data", "ancestor", "arch", "batch", "budget"})


def load_studies(path: str | Path, changes: Sequence[str] = (), quick: bool = False) -> dict[str, StudyConfig]:
    """The studies of a file on disk, as `studies_of`."""
    return studies_of(validate(StudyFile, load_yaml(path), str(path)), str(path), changes, quick)


def _change(text: str) -> dict[str, Any]:
    key, equals, word = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r} is not KEY=VALUE, such as --set seeds=[0] or --set steps.N=100")
    value: Any = parse_value(word)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def written_out(file: StudyFile) -> dict[str, Any]:
    """The full form of a short form, with the smallest steps; `fitted` replaces them."""
    assert file.data is not None  # checked when the file was read
    arch = shape_of(file).model_dump()
    num_classes = arch["num_classes"]
    own_ancestor = file.ancestor == "train"
    entries = [_entry(name, own_ancestor) for name in file.methods]
    if any(_uses_ancestor(entry) for entry in entries):
        ancestor = {"name": ANCESTOR, "shown": False}
        ancestor |= (
            {"method": {"name": SCRATCH.name}, "train": ["A"], "depths": [max(file.depths)]}
            if own_ancestor
            else {"source": file.ancestor}
        )
        entries = [ancestor, *entries]
    gpu = file.launch.gpus > 0
    engine = {"ema_decay": 0.999 if gpu else 0.99, "precision": "bf16" if gpu else "fp32", "log_every": 25,
              "checkpoint_every": 500, "eval_every": 100, "preview_every": 10**9}  # fmt: skip
    schedule = {"schedule": "cosine", "warmup_steps": 20}
    shape = {**arch, "num_layers": max(file.depths)}
    return {
        "title": file.title or f"Initializing models of {', '.join(map(str, file.depths))} layers",
        "dataset": file.data.shards,
        "data": {"data": file.data.model_dump()},
        "depths": list(file.depths),
        "seeds": list(file.seeds),
        "steps": steps_for(MIN_STEPS),
        "main": file.methods[0],
        "baseline": file.methods[-1],
        "entries": entries,
        "tune": {"optim.lr": [5e-4, 1e-3, 2e-3]},
        "tune_extend": 2,
        "tune_depth": sorted(file.depths)[len(file.depths) // 2],
        "features": "classifier" if arch["in_channels"] in (1, 3) and num_classes > 1 else None,
        "samples": 500,
        "sampler": {"scheduler": "dpm", "steps": 15},
        "pictures": 20 if arch["in_channels"] in (1, 3) else 0,
        "sample_columns": 20,  # one row of images for each state of a model, so that the figure fits a page
        "sample_depths": [sorted(file.depths)[len(file.depths) // 2]],
        "launch": file.launch.model_dump(),
        "stages": {
            "condense": {
                "batch": file.batch, "optim": {"lr": 1e-3, **schedule}, "engine": engine,
                **({"arch": shape} if own_ancestor else {}),
            },
            "init": {
                "batch": file.batch, "optim": {"lr": 1e-2},
                "engine": {"log_every": 25, "checkpoint_every": 500, "eval_every": 100},
            },
            "train": {"batch": file.batch, "optim": {"lr": 1e-3, **schedule}, "engine": engine, "arch": shape},
        },
    }  # fmt: skip


def _entry(name: str, own_ancestor: bool) -> dict[str, Any]:
    """The entry of a method's name."""
    entry = dict(recipes().get(name) or {"method": {"name": name}})
    traits = from_manifest(entry["method"]).traits
    if "condense" not in entry and "none" not in traits.parents:
        entry["parent"] = ANCESTOR
    return {"name": name, **entry}


def _uses_ancestor(entry: dict[str, Any]) -> bool:
    return entry.get("parent") == ANCESTOR or (entry.get("condense") or {}).get("ancestor") == ANCESTOR


def shape_of(file: StudyFile) -> Arch:
    """The architecture of a short form: the ancestor's, or `arch` with the latents and classes of the data."""
    assert file.data is not None
    if file.ancestor != "train":
        return facts_of(file.ancestor).arch
    manifest, _ = locate(file.data.shards, DataConfig())
    channels, height, width = manifest.latent_shape
    of_data = {"in_channels": channels, "input_size": sides(height, width), "num_classes": manifest.num_classes}
    return validate(Arch, {**of_data, **file.arch}, "arch")


def steps_for(n: int) -> dict[str, int]:
    """All lengths of a study that trains for n steps after initialization."""
    return {"N": n, "I": max(MIN_STEPS, n // 4), "C": 2 * n, "A": 3 * n}


def fitted(study: StudyConfig, hours: float, gflops: float | None = None) -> StudyConfig:
    """The study with as many steps as fit into `hours`, including tuning and measuring.

    Raises:
        ConfigError: Even the smallest number of steps does not fit.
    """
    low, high = MIN_STEPS, MIN_STEPS
    needed = hours_of(_with_steps(study, low), gflops)
    if needed > hours:
        raise ConfigError(
            f"budget: {duration(hours * 3600)} is too little: this study takes {duration(needed * 3600)} even with N = "
            f"{low} steps. Give more time, fewer methods, depths or seeds, or a smaller arch"
        )
    while high < 10**6 and hours_of(_with_steps(study, 2 * high), gflops) <= hours:
        high *= 2
    low, high = high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if hours_of(_with_steps(study, middle), gflops) <= hours else (low, middle)
    return _with_steps(study, low)


def _with_steps(study: StudyConfig, n: int) -> StudyConfig:
    stages = {name: {**stage, "optim": dict(stage["optim"])} for name, stage in study.stages.items()}
    for stage in stages.values():
        if "warmup_steps" in stage["optim"]:
            stage["optim"]["warmup_steps"] = max(1, n // 20)
    return study.model_copy(update={"steps": steps_for(n), "stages": stages})


def hours_of(study: StudyConfig, gflops: float | None = None) -> float:
    """Estimated hours of a study with tuning and measuring, divided by `SAFETY`."""
    rate = gflops or CORE_GFLOPS
    tuning = tuning_estimate(study, rate)
    hours = estimate(study, gflops=rate).hours + (EXTENSIONS * tuning.hours if tuning else 0.0)
    return (hours + measuring_hours(study, rate)) / SAFETY
