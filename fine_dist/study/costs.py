"""What a target has cost so far: steps, samples, FLOPs and seconds of each stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.errors import RunDirError
from fine_dist.engine.run_dir import RunDir
from fine_dist.study.settings import stage_1_flops, stage_2_cost, step_flops

if TYPE_CHECKING:
    from fine_dist.model.arch import Arch
    from fine_dist.study.graph import StudyRun


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage: FLOPs of forward and backward passes, and wall-clock seconds."""

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: StageCost) -> StageCost:
        return StageCost(
            self.steps + other.steps,
            self.samples + other.samples,
            self.flops + other.flops,
            self.seconds + other.seconds,
        )

    def share(self, steps: int) -> StageCost:
        """The part of this cost that its first `steps` steps took."""
        part = steps / self.steps if self.steps else 0.0
        return StageCost(steps, round(self.samples * part), self.flops * part, self.seconds * part)


def done_facts(folder: Path) -> dict[str, Any]:
    """DONE.json of a finished run or target.

    Raises:
        RunDirError: The file is damaged or missing.
    """
    facts = RunDir(folder).done
    if facts is None:
        raise RunDirError(f"{folder} is not finished: it has no DONE.json; run the same command again")
    return facts


def condense_cost(run: StudyRun, arch: Arch) -> StageCost:
    """Stage 1, by its method's own count, or a model's whole training; a teacher's forward pass counts where the loss
    asks for it."""
    samples = run.steps * run.config.batch
    flops = samples * (stage_1_flops(run.config) or step_flops(arch))
    return StageCost(run.steps, samples, flops, float(done_facts(run.run_dir)["seconds"]))


def init_cost(run: StudyRun, folder: Path, depth: int) -> tuple[StageCost, int]:
    """Stage 2 of one target by its method's own count, and the numbers that trained; its seconds are its share of its
    pack's."""
    facts = done_facts(folder)
    samples = int(facts["steps"]) * run.config.batch
    one = stage_2_cost(run.config, depth)
    trained = one.trained if facts["steps"] else 0
    return StageCost(int(facts["steps"]), samples, samples * one.training, float(facts["seconds"])), trained


def train_cost(runs: list[StudyRun], arch: Arch) -> list[StageCost]:
    """Stage 3, a cost a run; a run that continues a shorter one counts its own part alone."""
    found, steps_before = [], 0
    for run in runs:
        steps = run.steps - (steps_before if run.grows else 0)
        samples = steps * run.config.batch
        flops = samples * step_flops(arch)
        found.append(StageCost(steps, samples, flops, float(done_facts(run.run_dir)["seconds"])))
        steps_before = run.steps
    return found
