"""Trains the targets of a family in this process: builds them and trains them in packs or one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fine_dist.artifacts.targets import changed_tensors, descend
from fine_dist.core.config import run_dir_of
from fine_dist.core.errors import DamagedStateError, DataError, LaunchError, ResumeLater
from fine_dist.engine import dist
from fine_dist.engine.heartbeat import Heartbeat
from fine_dist.engine.run_dir import STOP
from fine_dist.engine.stopping import Stopper
from fine_dist.engine.world import World
from fine_dist.family.family_plan import Family
from fine_dist.family.listing import result_of
from fine_dist.family.members import Member, expand
from fine_dist.family.pack_job import PackJob
from fine_dist.family.pack_loop import PackRun
from fine_dist.family.pack_model import PackedDiT, shared_identity
from fine_dist.family.packing import Pack
from fine_dist.family.recorder import TargetRecorder, finish_target, write_identity
from fine_dist.family.single_target import train_single_target
from fine_dist.family.summary import draw_family
from fine_dist.launchers.state_table import StateTable
from fine_dist.methods.base import Descent
from fine_dist.model.artifact import save_artifact
from fine_dist.model.factors import SharedForm


@dataclass
class InitializedTarget:
    """A target that is initialized and not yet trained."""

    member: Member
    descent: Descent
    form: SharedForm | None
    """Its shared form for a pack. None: the target is trained alone."""


def run_family(family: Family, inside: bool) -> Path:
    """Train the targets of a family that are not done (with `only`, the named ones), in this process.

    A target that fails is marked in the state table and does not stop the others.

    Args:
        family: The family.
        inside: Whether this process is a worker of a job, whose launcher has already claimed the tasks.

    Returns:
        The family's folder.

    Raises:
        ResumeLater: A stop was requested; the state is saved.
    """
    world = pack_world(family.config)
    folder = run_dir_of(family.config)
    if not inside:
        family.check()
        family.check_memory()
    _ = family.baseline_losses  # read now, so that an error is raised before training
    table = StateTable(folder)
    names = [member.name for member in family.members]
    if world.is_main:
        table.add(names, {member.name: str(member.folder) for member in family.members})
    claim = None if inside else table.claim(names)
    if claim is None and not inside:
        raise LaunchError(f"{folder}: another live process trains targets of this family; wait for it, or stop it")
    members = {member.name: member for member in family.members}
    refused: list[DamagedStateError] = []
    try:
        if not inside:
            # Starting the family again withdraws an earlier request to stop.
            (folder / STOP).unlink(missing_ok=True)
        for pack in family.packs():
            if claim is not None:
                table.start_all(name for name in pack.jobs if not family.done(members[name]))
            try:
                run_pack(family, pack, table, world)
            except DamagedStateError as error:
                # One pack's damaged states do not keep the other packs from training; the error is raised at the end.
                refused.append(error)
    finally:
        if claim is not None:
            claim.release()
    if world.is_main:
        # targets without a row first: most likely they are not done, and then no other folder is read
        started = table.started()
        others = expand(family.config.model_copy(update={"only": ()}))
        others.sort(key=lambda member: member.name in started)
        if all(result_of(m.folder) or ((row := table.get(m.name)) and row.state == "failed") for m in others):
            # the last pack that ends draws the complete family
            draw_family(folder, others, baselines=family.baseline_losses, trackers=family.config.engine.tracker)
    if refused:
        raise refused[0]
    return folder


def run_pack(family: Family, pack: Pack, table: StateTable, world: World) -> None:
    """Train the targets of one pack that are not done; a target that fails is marked and leaves the others alone.

    Raises:
        ResumeLater: After saving, when the process was asked to stop.
        DamagedStateError: At the end, when targets would have to start over because their states are damaged. They are
            marked as failed; the others were trained.
    """
    refused: list[DamagedStateError] = []
    members = {m.name: m for m in family.members}
    waiting: list[InitializedTarget] = []
    for member in (members[name] for name in pack.jobs):
        if family.done(member):
            continue
        try:
            family.check_data(member)
        except DataError as error:  # the data set may have changed since the family was checked
            if world.is_main:
                table.finish(member.name, "failed", str(error))
            continue
        labels = family.new_labels(member)
        method = family.method(member)
        parent = family.parent_with_samples(member)
        descent = descend(method, parent, family.arch(member), member.seed, new_labels=labels)
        if descent.trains == "nothing":
            if world.is_main:
                _save_untrained(family, member, descent, table)
            continue
        form = method.pack(descent.model) if descent.trains == "some" and family.may_pack else None
        waiting.append(InitializedTarget(member, descent, form))
    with Stopper(
        FamilyRequests(run_dir_of(family.config)), family.config.engine.time_limit_min, world.is_main
    ) as stopper:
        for group in sharing([built for built in waiting if built.form]):
            for part in [[built] for built in group] if pack.sequential else [group]:
                names = [built.member.name for built in part]
                with Heartbeat(world), _collected(refused, names, table, world):
                    _train_packed(family, pack, part, table, world, stopper)
        for built in waiting:
            if not built.form:
                with _collected(refused, [built.member.name], table, world):
                    train_single_target(family, built.member, built.descent, table, world, stopper)
    if refused:
        raise refused[0]


@contextlib.contextmanager
def _collected(refused: list[DamagedStateError], names: list[str], table: StateTable, world: World) -> Iterator[None]:
    """Mark targets whose states are all damaged as failed, and keep the error for when the others are trained."""
    try:
        yield
    except DamagedStateError as error:
        refused.append(error)
        if world.is_main:
            for name in names:
                table.finish(name, "failed", str(error))


class FamilyRequests:
    """Requests by the files STOP and SAVE in a family's folder. STOP stays until the family is started again, so that
    every pack sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take_request(self, name: str) -> bool:
        """Whether the file exists; SAVE is removed."""
        if name == STOP:
            return (self.folder / name).exists()
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        return True


def sharing(waiting: list[InitializedTarget]) -> Iterator[list[InitializedTarget]]:
    """Groups of targets that share their genes."""
    groups: dict[str, list[InitializedTarget]] = {}
    for built in waiting:
        assert built.form is not None
        groups.setdefault(shared_identity(built.form), []).append(built)
    yield from groups.values()


def _train_packed(
    family: Family, pack: Pack, group: list[InitializedTarget], table: StateTable, world: World, stopper: Stopper
) -> None:
    config = family.config
    members = [built.member for built in group]
    # A generator: the forms are read one at a time, so only one model's weights are in memory beside the pack's.
    packed = PackedDiT((built.form for built in group if built.form), config.engine.activation_checkpointing)
    packed.to(world.device)
    # A pack whose process was killed most likely ran out of memory; a clean stop does not count as a death.
    deaths = max((row.deaths for m in members if (row := table.get(m.name))), default=0)
    models = [built.descent.model for built in group]
    recorder = TargetRecorder(
        family,
        members,
        packed,
        own=[changed_tensors(model, family.parent) for model in models],
        names=[list(model.state_dict()) for model in models],
        flops=[family.method(m).cost(model, config.batch).training for m, model in zip(members, models)],
        table=table,
        world=world,
    )
    models.clear()
    group.clear()  # the pack holds the tensors of the models, which are freed here
    run = PackRun(
        packed,
        [_job(family, member) for member in members],
        batch=config.batch,
        optim=config.optim,
        diffusion=config.diffusion,
        engine=config.engine,
        observer=recorder,
        world=world,
        # Halved for every death, so that the next attempt takes half the memory.
        chunk=max(1, pack.chunk >> deaths),
        stop=config.stop,
        states=(run_dir_of(config) / "packs", members[0].name if pack.sequential else pack.name),
        stop_request=stopper.stop_request,
    )
    recorder.start(run.progress)
    try:
        finished = run.train()
    finally:
        recorder.close()
    if not finished:
        raise ResumeLater(
            f"{stopper.reason}; the state of {len(run.active())} targets is saved, the same command continues"
        )


def _job(family: Family, member: Member) -> PackJob:
    return PackJob(
        name=member.name,
        key=family.key(member),
        domain=member.domain,
        data=member.domain_config.data,
        num_classes=family.arch(member).num_classes,
        seed=member.seed,
        lr=member.lr,
        steps=family.config.steps,
    )


def _save_untrained(family: Family, member: Member, descent: Descent, table: StateTable) -> None:
    """Save a target whose method leaves nothing to train in stage 2."""
    write_identity(family, member)
    manifest = save_artifact(
        member.folder / "model",
        kind="model",
        method=family.method(member).config.model_dump(mode="json"),
        arch=family.arch(member),
        tensors=descent.model.state_dict(),
        extra={"seed": member.seed, "diffusion": family.config.diffusion.model_dump(), "init": {"steps": 0}},
    )
    finish_target(family, member, {"steps": 0, "seconds": 0.0, "trained": 0}, manifest)
    table.finish(member.name, "done")


def pack_world(config: Any) -> World:
    """This process's world, with the config's device and threads."""
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    return dist.world(config.engine.device)
