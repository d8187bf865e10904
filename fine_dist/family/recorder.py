"""Writes the files of targets: identity, metrics, trackers, artifact, DONE.json, and the row of the state table."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from fine_dist.artifacts.targets import save_target
from fine_dist.core.config import expand_path, run_dir_of
from fine_dist.core.files import write_atomic
from fine_dist.core.yaml_files import to_yaml
from fine_dist.data.stream import read_all
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.engine.monitor import MetricsLog
from fine_dist.engine.run_cost import RunCost
from fine_dist.engine.run_dir import describe_environment
from fine_dist.engine.trackers import TrackedRun
from fine_dist.engine.world import World
from fine_dist.family.family_plan import Family
from fine_dist.family.members import Member, expand
from fine_dist.family.pack_job import JobProgress
from fine_dist.family.pack_model import JobView, PackedDiT
from fine_dist.family.summary import draw_family
from fine_dist.launchers.state_table import StateTable

DRAW_EVERY_S = 60.0
"""Seconds between two updates of family.png while the family runs; it is also drawn at the end."""


class TargetRecorder:
    """The observer of a pack: writes every target's metrics, evaluates it, and saves it when it ends.

    Args:
        own: For each target, the tensors that are not its parent's, with their values before training.
        names: For each target, the names of all tensors of its state dict.
        flops: For each target, FLOPs of one sample's step.
    """

    def __init__(
        self,
        family: Family,
        members: Sequence[Member],
        packed: PackedDiT,
        *,
        own: Sequence[dict[str, Tensor]],
        names: Sequence[list[str]],
        flops: Sequence[float],
        table: StateTable,
        world: World,
    ):
        self.family, self.members, self.packed, self.table, self.world = family, list(members), packed, table, world
        self.own, self.names, self.flops = list(own), list(names), list(flops)
        self._logs: dict[int, MetricsLog] = {}
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._held_out: dict[tuple[str, int], HeldOutLoss] = {}
        self._measured: dict[tuple[str, int, str], dict[str, float]] = {}
        """Held-out losses by data and weights: seeds of one depth often start as the same model."""
        self._bar: Any = None
        self._drawn = time.monotonic()

    def start(self, progress: Sequence[JobProgress]) -> None:
        """Open the progress bar and the logs; log rows after the step at which a target continues are removed."""
        if not self.world.is_main:
            return
        for index, (member, p) in enumerate(zip(self.members, progress)):
            write_identity(self.family, member)
            settings = to_yaml(self.family.identity(member))
            run = TrackedRun(member.folder, p.step, settings)
            self._logs[index] = MetricsLog(run, self.family.config.engine.tracker)
            rows = [row for row in self._logs[index].rows if "loss" in row]
            if rows:
                self._first[index], self._last[index] = rows[0]["loss"], rows[-1]["loss"]
        total = self.family.config.steps * len(self.members)
        done = sum(p.step for p in progress)
        what = f"{len(self.members)} targets in one pack" if len(self.members) > 1 else self.members[0].name
        print(f"init: {what}; files are in {run_dir_of(self.family.config)}", flush=True)
        # A terminal gets a live bar, a log file a line every 30 seconds.
        quiet = {"mininterval": 0.5} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
        self._bar = tqdm(total=total, initial=done, desc="init", unit="step", **quiet)

    def row(self, job: int, step: int, values: dict[str, float]) -> None:
        """A row of a target's metrics.jsonl and trackers."""
        # The very first row: a resumed target has read it from its log in `start`.
        self._first.setdefault(job, values["loss"])
        self._last[job] = values["loss"]
        self._logs[job].write(step, values)

    def evaluate(self, job: int, step: int) -> None:
        """Log the held-out loss of a target during its training."""
        measured = self._measure(job)
        if measured:
            self._logs[job].write(step, measured)

    def after_step(self, progress: Sequence[JobProgress]) -> None:
        """Update the progress bar, and from time to time the family's figure."""
        if self._bar is not None:
            losses = [v for v in self._last.values() if math.isfinite(v)]
            if losses:
                self._bar.set_postfix_str(f"loss {min(losses):.4f}..{max(losses):.4f}", refresh=False)
            self._bar.update(sum(p.step for p in progress) - self._bar.n)
        if time.monotonic() - self._drawn > DRAW_EVERY_S:
            self._drawn = time.monotonic()
            members = expand(self.family.config.model_copy(update={"only": ()}))
            # during training only in TensorBoard: other trackers take seconds to open
            trackers = [name for name in self.family.config.engine.tracker if name == "tensorboard"]
            draw_family(
                run_dir_of(self.family.config),
                members,
                younger_than_s=DRAW_EVERY_S,
                baselines=self.family.baseline_losses,
                trackers=trackers,
            )

    def ended(self, job: int, progress: JobProgress) -> None:
        """Evaluate a target that is done and write its artifact; record why a target has failed."""
        member = self.members[job]
        if progress.state == "failed":
            self.table.finish(member.name, "failed", progress.reason)
            if self._bar is not None:
                self._bar.write(f"{member.name} failed: {progress.reason}")
            return
        scalers, measured = self.packed.scalers(job), self._measure(job)
        facts: dict[str, Any] = {
            "steps": progress.step,
            "seconds": round(progress.seconds, 3),
            "loss": self._last.get(job),
            "first_loss": self._first.get(job),
            **measured,
            "reason": progress.reason,
            "trained": sum(each.numel() for each in scalers.values()),
        }
        log = self._logs[job]
        if measured:
            log.write(progress.step, measured)
        save_result(
            self.family, member, {**self.own[job], **scalers}, self.names[job], facts, flops_per_sample=self.flops[job]
        )
        losses = {"loss": facts["loss"], **measured}
        log.trackers.finish(progress.step, self.family.hparams(member), losses)
        self._logs.pop(job).close()
        self.table.finish(member.name, "done")

    def _measure(self, job: int) -> dict[str, float]:
        data = self.members[job].domain_config.data
        if not data.held_out:
            return {}
        where = (data.held_out, data.held_out_samples)
        if where not in self._held_out:
            latents, labels = read_all(expand_path(data.held_out), data.held_out_samples)
            self._held_out[where] = HeldOutLoss(latents, labels, self.family.config.diffusion)
        # Measured once for all jobs with the same data and weights: before the first step those are all seeds of a
        # depth.
        key = (*where, self.packed.fingerprint(job))
        if key not in self._measured:
            view: nn.Module = JobView(self.packed, job)
            self._measured[key] = self._held_out[where](view.eval())
        return self._measured[key]

    def close(self) -> None:
        """Close the logs."""
        for log in self._logs.values():
            log.close()
        if self._bar is not None:
            self._bar.close()


def write_identity(family: Family, member: Member) -> None:
    """Make a target's folder and write its identity (`target.json`) into it."""
    member.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(member.folder / "target.json", json.dumps(family.identity(member), indent=1) + "\n")
    environment = member.folder.parent / "environment.json"
    if not environment.exists():
        write_atomic(environment, json.dumps(describe_environment(), indent=1) + "\n")


def save_result(
    family: Family,
    member: Member,
    own: Mapping[str, Tensor],
    names: list[str],
    facts: Mapping[str, Any],
    *,
    flops_per_sample: float,
) -> None:
    """Write a trained target's artifact and DONE.json.

    Args:
        own: The target's tensors that are not its parent's.
        names: Names of all tensors of the target's state dict.
        facts: Steps, seconds, losses and the number of trained parameters.
        flops_per_sample: FLOPs of one sample's step.
    """
    manifest = save_target(
        member.folder / "target",
        method=family.method(member).config.model_dump(mode="json"),
        parent=family.parent,
        arch=family.arch(member),
        tensors=own,
        names=names,
        facts={
            "seed": member.seed,
            "diffusion": family.config.diffusion.model_dump(),
            "init": {**facts, "lr": member.lr, "variant": dict(member.variant), "domain": member.domain},
        },
    )
    finish_target(family, member, facts, manifest, flops_per_sample)


def finish_target(
    family: Family, member: Member, facts: Mapping[str, Any], manifest: Mapping[str, Any], flops_per_sample: float = 0.0
) -> None:
    """Write a target's DONE.json, after which it is not run again; `manifest` is that of its artifact."""
    cost = RunCost.of(
        steps=facts["steps"],
        batch=family.config.batch,
        flops_per_sample=flops_per_sample,
        seconds=facts["seconds"],
        stored=manifest["num_numbers"],
        trained=facts["trained"],
    )
    sizes = {"bytes": manifest["bytes"], "numbers": manifest["num_numbers"]}
    done = {**member.point, **facts, **sizes, "cost": cost.to_json()}
    write_atomic(member.folder / "DONE.json", json.dumps(done, indent=1) + "\n")
