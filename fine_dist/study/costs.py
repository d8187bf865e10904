"""What a state of a target has cost so far: steps, samples, FLOPs, numbers and seconds, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import RunDirError
from fine_dist.engine.run_dir import RunDir
from fine_dist.study.settings import stage_1_flops, stage_2_cost, step_flops

if TYPE_CHECKING:
    from fine_dist.model.arch import Arch
    from fine_dist.study.graph import Run


@dataclass(frozen=True)
class Cost:
    """Of one stage. FLOPs are of forward and backward passes, seconds wall time."""

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps,
            self.samples + other.samples,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )

    def share(self, steps: int) -> Cost:
        """As much of it as so many of its steps took."""
        part = steps / self.steps if self.steps else 0.0
        return Cost(steps, round(self.samples * part), self.flops * part, self.seconds * part)


def done_facts(folder: Path) -> dict[str, Any]:
    """What a finished run or target says of itself. `RunDirError` when that is damaged or not there."""
    facts = RunDir(folder).done
    if facts is None:
        raise RunDirError(f"{folder} is not finished: it has no DONE.json; run the same command again")
    return facts


def condense_cost(run: Run, arch: Arch) -> Cost:
    """Stage 1, by its method's own count, or a model's whole training; a teacher's forward pass counts where the loss
    asks for it."""
    samples = run.steps * run.config.batch
    flops = samples * (stage_1_flops(run.config) or step_flops(arch))
    return Cost(run.steps, samples, flops, float(done_facts(run.run_dir)["seconds"]))


def init_cost(run: Run, folder: Path, depth: int) -> tuple[Cost, int]:
    """Stage 2 of one target by its method's own count, and the numbers that trained; its seconds are its share of its
    pack's."""
    facts = done_facts(folder)
    samples = int(facts["steps"]) * run.config.batch
    one = stage_2_cost(run.config, depth)
    trained = one.trained if facts["steps"] else 0
    return Cost(int(facts["steps"]), samples, samples * one.training, float(facts["seconds"])), trained


def train_cost(runs: list[Run], arch: Arch) -> list[Cost]:
    """Stage 3, a cost a run; a run that continues a shorter one counts its own part alone."""
    found, steps_before = [], 0
    for run in runs:
        steps = run.steps - (steps_before if run.grows else 0)
        samples = steps * run.config.batch
        flops = samples * step_flops(arch)
        found.append(Cost(steps, samples, flops, float(done_facts(run.run_dir)["seconds"])))
        steps_before = run.steps
    return found
