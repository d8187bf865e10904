"""Running the targets of a pack: build them, train them together, and keep what each one became in its own folder."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fine_dist.data.stream import read_all
from fine_dist.diffusion.objective import HeldOut
from fine_dist.engine import dist
from fine_dist.engine.dist import World
from fine_dist.engine.monitor import keep_rows
from fine_dist.engine.run_dir import describe_environment, write_atomic
from fine_dist.engine.stopping import SIGNALS
from fine_dist.errors import DataError, ResumeLater
from fine_dist.family import Family, Member, expand, run_dir_of
from fine_dist.family.table import draw_family, result_of
from fine_dist.jobs import StateTable
from fine_dist.model.artifact import save_artifact
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from fine_dist.pack.loop import PackJob, PackRun, Progress
from fine_dist.pack.model import JobView, PackedDiT, Single, identity
from fine_dist.pack.plan import Pack
from fine_dist.pack.state import SUFFIX
from fine_dist.stages.descendants import descend, save_descendant, trains

HELD_OUT_LIMIT = 2048
"""Held-out samples that are measured, at most."""
DRAW_EVERY_S = 60.0
"""The family's figure is drawn again so often while it runs, and once at the end."""


def run_pack(family: Family, pack: Pack, table: StateTable, world: World) -> None:
    """Train the targets of one pack that are not done; a target that fails is marked and leaves the others alone.

    Raises `ResumeLater` after saving when the process is asked to stop.
    """
    members = {m.name: m for m in family.members}
    todo = [members[name] for name in pack.jobs if result_of(members[name].folder) is None]
    waiting: list[tuple[Member, DiT]] = []
    for member in todo:
        try:
            family.check_data(member)
        except DataError as error:  # another process may have changed it since the family was checked
            if world.is_main:
                table.finish(member.name, "failed", str(error))
            continue
        model = descend(
            family.method(member),
            family.learngene,
            family.arch(member),
            member.seed,
            new_labels=family.new_labels(member),
        )
        if trains(model):
            waiting.append((member, model))
        else:
            _keep_dense(family, member, model, table, world)
    for group in _sharing(waiting):
        _train_group(family, pack, group, table, world)


def _sharing(models: list[tuple[Member, DiT]]) -> Iterator[list[tuple[Member, DiT]]]:
    """Targets that share their genes, together; those that share nothing, alone."""
    groups: dict[str, list[tuple[Member, DiT]]] = {}
    for index, (member, model) in enumerate(models):
        # Only sigma, and labels of a target's own, are known to a pack; anything else that trains is trained alone.
        packable = type(model) is FactoredDiT and all(
            n.endswith(".sigma") or n == "label.weight" for n, p in model.named_parameters() if p.requires_grad
        )
        key = identity(model) if packable and isinstance(model, FactoredDiT) else f"alone {index}"
        groups.setdefault(key, []).append((member, model))
    yield from groups.values()


def _train_group(family: Family, pack: Pack, group: list[tuple[Member, DiT]], table: StateTable, world: World) -> None:
    config = family.config
    members = [member for member, _ in group]
    models = [model for _, model in group]
    packed = PackedDiT(models) if type(models[0]) is FactoredDiT else Single(models[0])  # type: ignore[arg-type]
    packed.to(world.device)
    keeper = Keeper(family, members, packed, table, world)
    # A row that was started before and left no word behind died with its process, most likely for want of memory.
    died = max(((row.attempts if (row := table.get(m.name)) else 1) for m in members), default=1) - 1
    with _Wish() as wish:
        run = PackRun(
            packed,
            [_job(family, member) for member in members],
            batch=config.batch,
            optim=config.optim,
            diffusion=config.diffusion,
            engine=config.engine,
            watcher=keeper,
            world=world,
            chunk=max(1, pack.chunk >> max(0, died)),
            stop=config.stop,
            checkpoint=run_dir_of(config) / "packs" / f"{pack.name}{SUFFIX}",
            wish=wish.asked,
        )
        keeper.start(run.progress)
        try:
            finished = run.train()
        finally:
            keeper.close()
    if not finished:
        raise ResumeLater(
            f"{wish.reason}; the state of {len(run.active())} targets is saved, the same command continues"
        )


def _job(family: Family, member: Member) -> PackJob:
    arch = family.arch(member)
    return PackJob(
        name=member.name,
        key=family.key(member),
        domain=member.domain,
        data=member.domain_config.data,
        num_classes=arch.num_classes,
        seed=member.seed,
        lr=member.lr,
        steps=family.config.steps,
    )


def _keep_dense(family: Family, member: Member, model: DiT, table: StateTable, world: World) -> None:
    """A method that leaves nothing for stage 2: the target as it is."""
    if world.is_main:
        _write_settings(family, member)
        manifest = save_artifact(
            member.folder / "model",
            kind="model",
            method=family.method(member).config.model_dump(mode="json"),
            arch=model.arch,
            tensors=model.state_dict(),
            extra={"init": {"steps": 0, "seed": member.seed}},
        )
        finish(member, {"steps": 0, "seconds": 0.0, "bytes": manifest["bytes"]})
        table.finish(member.name, "done")


class Keeper:
    """Writes down what becomes of every target: rows, TensorBoard, the artifact, DONE.json and the state table."""

    def __init__(
        self, family: Family, members: Sequence[Member], packed: PackedDiT | Single, table: StateTable, world: World
    ):
        self.family, self.members, self.packed, self.table, self.world = family, list(members), packed, table, world
        self._boards: dict[int, Any] = {}
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._held_out: dict[str, HeldOut] = {}
        self._bar: Any = None
        self._drawn = time.monotonic()

    def start(self, progress: Sequence[Progress]) -> None:
        """Open the bar, and cut the logs back to where the targets go on."""
        if not self.world.is_main:
            return
        from tqdm import tqdm

        for member, p in zip(self.members, progress):
            _write_settings(self.family, member)
            rows = keep_rows(member.folder / "metrics.jsonl", p.step)
            index = self.members.index(member)
            if rows:
                self._first[index], self._last[index] = rows[0]["loss"], rows[-1]["loss"]
        total = self.family.config.steps * len(self.members)
        done = sum(p.step for p in progress)
        print(
            f"init: {len(self.members)} targets in one pack; files are in {run_dir_of(self.family.config)}", flush=True
        )
        # A log file gets a line now and then, a terminal a live bar.
        quiet = {"mininterval": 0.5} if sys.stderr.isatty() else {"mininterval": 30.0, "ascii": True, "ncols": 100}
        self._bar = tqdm(total=total, initial=done, desc="init", unit="step", **quiet)

    def row(self, job: int, step: int, values: dict[str, float]) -> None:
        """A row of a target's metrics.jsonl and TensorBoard."""
        self._first.setdefault(job, values["loss"])
        self._last[job] = values["loss"]
        folder = self.members[job].folder
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            self._board(job, step).add_scalar(f"init/{key}", value, step)

    def tick(self, progress: Sequence[Progress]) -> None:
        """The bar, and now and then the family's figure."""
        if self._bar is not None:
            losses = [v for v in self._last.values() if math.isfinite(v)]
            if losses:
                self._bar.set_postfix_str(f"loss {min(losses):.4f}..{max(losses):.4f}", refresh=False)
            self._bar.update(sum(p.step for p in progress) - self._bar.n)
        if time.monotonic() - self._drawn > DRAW_EVERY_S:
            self._drawn = time.monotonic()
            draw_family(run_dir_of(self.family.config), everyone(self.family), younger_than_s=DRAW_EVERY_S)

    def ended(self, job: int, progress: Progress) -> None:
        """Measure a target that is done and write its artifact; say why one has failed."""
        member = self.members[job]
        if progress.state == "failed":
            self.table.finish(member.name, "failed", progress.reason)
            if self._bar is not None:
                self._bar.write(f"{member.name} failed: {progress.reason}")
            return
        facts: dict[str, Any] = {
            "steps": progress.step,
            "seconds": round(progress.seconds, 3),
            "loss": self._last.get(job),
            "first_loss": self._first.get(job),
            **self._measure(job),
            "reason": progress.reason,
        }
        learngene = self.family.learngene
        assert learngene is not None  # what trains after descending has descended from something
        manifest = save_descendant(
            member.folder / "sigma",
            method=self.family.method(member).config.model_dump(mode="json"),
            learngene=learngene,
            arch=self.family.arch(member),
            seed=member.seed,
            new_labels=self.family.new_labels(member),
            tensors=self.packed.scalers(job),
            init={**facts, "lr": member.lr, "start": member.start, "domain": member.domain},
        )
        finish(member, {**facts, "bytes": manifest["bytes"], "numbers": manifest["num_numbers"]})
        self._hparams(job, progress.step, facts)
        self.table.finish(member.name, "done")

    def _measure(self, job: int) -> dict[str, float]:
        where = self.members[job].domain_config.data.held_out
        if not where:
            return {}
        if where not in self._held_out:
            self._held_out[where] = HeldOut(*read_all(where, HELD_OUT_LIMIT), self.family.config.diffusion)
        view: nn.Module = JobView(self.packed, job)
        return self._held_out[where](view.eval())

    def _board(self, job: int, step: int) -> Any:
        if job not in self._boards:
            from torch.utils.tensorboard import SummaryWriter

            self._boards[job] = SummaryWriter(str(self.members[job].folder / "tensorboard"), purge_step=step)
        return self._boards[job]

    def _hparams(self, job: int, step: int, facts: dict[str, Any]) -> None:
        """The target as a row of TensorBoard's table of hyperparameters, in its own run."""
        from torch.utils.tensorboard.summary import hparams

        member, board = self.members[job], self._board(job, step)
        settings = {"depth": member.depth, "domain": member.domain, "lr": member.lr, "seed": member.seed}
        settings["start"] = member.start or "default"
        metric, name = facts.get("held_out_loss", facts["loss"]), "init/final_held_out_loss"
        for summary in hparams(settings, {name: metric}):
            board.file_writer.add_summary(summary)
        board.add_scalar(name, metric, step)
        self._boards.pop(job).close()

    def close(self) -> None:
        """Close the logs."""
        for board in self._boards.values():
            board.close()
        if self._bar is not None:
            self._bar.close()


def everyone(family: Family) -> list[Member]:
    """All targets of the family, whatever `only` says."""
    return expand(family.config.model_copy(update={"only": ()}))


def _write_settings(family: Family, member: Member) -> None:
    member.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(member.folder / "target.json", json.dumps(family.settings(member), indent=1) + "\n")
    environment = member.folder.parent / "environment.json"
    if not environment.exists():
        write_atomic(environment, json.dumps(describe_environment(), indent=1) + "\n")


def finish(member: Member, facts: dict[str, Any]) -> None:
    """Write a target's DONE.json: it is not run again."""
    point = {"name": member.name, "depth": member.depth, "domain": member.domain, "seed": member.seed}
    values = {**point, "lr": member.lr, "start": member.start, **facts}
    write_atomic(member.folder / "DONE.json", json.dumps(values, indent=1) + "\n")


class _Wish:
    """A context in which the signals of schedulers ask for a stop at the end of the step."""

    def __init__(self) -> None:
        self.reason = "asked to stop"
        self._signal: int | None = None
        self._old: dict[int, Any] = {}

    def asked(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> _Wish:
        if threading.current_thread() is threading.main_thread():  # in a Ray worker signals are Ray's own
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: Any) -> None:
        self._signal = number
        self.reason = f"received {signal.Signals(number).name}"


def pack_world(config: Any) -> World:
    """This process's world, with the config's device and threads."""
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    return dist.world(config.engine.device)
