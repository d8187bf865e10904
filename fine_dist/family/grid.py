"""A family of targets: its grid as named tasks, what is checked before anything is queued, and the packs it becomes.

Imported by `fine_dist.init`; torch is imported inside functions, because `--help` must answer at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fine_dist.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EngineConfig,
    LaunchConfig,
    OptimConfig,
    expand_path,
)
from fine_dist.errors import ConfigError, DataError, RunDirError, nearest
from fine_dist.jobs import check_name
from fine_dist.methods import AnyMethod, from_manifest
from fine_dist.methods import build as build_method
from fine_dist.model.zoo import Arch
from fine_dist.pack.plan import EarlyStop, Pack, PackConfig, Shape, plan

if TYPE_CHECKING:
    from fine_dist.data.shards import Manifest
    from fine_dist.methods import Method
    from fine_dist.model.artifact import Artifact

CPU_MEMORY = 4 * 2**30
"""Bytes for a pack's activations on a CPU unless the config says."""


class DomainConfig(Config):
    """A data set that targets are initialised on."""

    data: DataConfig = DataConfig()
    """Its latents."""
    labels: Literal["keep", "new"] = "keep"
    """`keep`: its labels mean what the learngene's do; `new`: each target trains a label embedder of its own."""


class InitConfig(Config):
    """Stage 2: initialise a family of targets, depths x data sets x seeds x learning rates x starts, by training sigma.

    The family is packed: targets of one width train as one program, whatever their depth, data, seed and rate.
    """

    run_dir: str = "runs/init"
    """Where everything is written: a folder a target, with its `sigma/`."""
    learngene: str | None = None
    """The learngene that condense wrote; none for a method that needs none."""
    method: AnyMethod | None = None
    """How targets are made; none: the learngene's own method, as it was condensed."""
    arch: Arch | None = None
    """Shape of the targets but for their depth; none: the learngene's."""
    depths: tuple[int, ...] = (4, 6, 8, 10, 12)
    """Layers of the targets."""
    data: DataConfig = DataConfig()
    """The data set, when there is one."""
    domains: dict[str, DomainConfig] = Field(default_factory=dict)
    """Data sets by name, when there are several; `data` is not read then."""
    seeds: tuple[int, ...] = (0,)
    """Each orders the data and draws noise, and whatever of a start is random."""
    lrs: tuple[float, ...] = ()
    """Learning rates of sigma; none: `optim.lr`."""
    starts: tuple[str, ...] = ()
    """Where sigma starts (`method.sigma`); none: the method's own setting."""
    steps: int = Field(300, ge=1)
    """Updates of sigma."""
    batch: int = Field(64, ge=1)
    """Samples an update of one target, over all processes."""
    stop: EarlyStop | None = None
    """End a target early; none: never."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process."""
    optim: OptimConfig = OptimConfig(lr=1e-2)
    """Optimiser of sigma."""
    engine: EngineConfig = EngineConfig(checkpoint_every=100, log_every=25)
    """How the loop runs."""
    pack: PackConfig = PackConfig()
    """How targets are packed."""
    launch: LaunchConfig = LaunchConfig()
    """What a pack needs, where it is submitted."""
    limit: int = Field(200, ge=1)
    """Targets beyond which a grid is refused without `yes`: a family is easily larger than was meant."""
    yes: bool = False
    """Run a grid larger than `limit`."""
    only: tuple[str, ...] = ()
    """Names of the targets to run; none: all."""


@dataclass(frozen=True)
class Member:
    """One target of a family: a point of the grid."""

    name: str
    depth: int
    domain: str
    domain_config: DomainConfig
    seed: int
    lr: float
    start: str | None
    folder: Path


def expand(config: InitConfig) -> list[Member]:
    """The grid as named targets, deepest axis first: `L4-s0-lr0.01-linear`. `ConfigError` for an impossible grid."""
    domains = config.domains or {"data": DomainConfig(data=config.data)}
    axes: dict[str, Sequence[Any]] = {
        "depths": config.depths,
        "domains": list(domains),
        "seeds": config.seeds,
        "lrs": config.lrs or (config.optim.lr,),
        "starts": config.starts or (None,),
    }
    for axis, values in axes.items():
        if not values:
            raise ConfigError(f"{axis}: an empty list makes no target; give one value or more")
        twice = sorted({str(v) for v in values if list(values).count(v) > 1})
        if twice:
            raise ConfigError(f"{axis}: {twice[0]} is listed twice, and two targets would have one name")
    for depth in config.depths:
        if depth < 1:
            raise ConfigError(f"depths: {depth} is no depth; a target has 1 layer or more")
    for rate in axes["lrs"]:
        if not rate > 0:
            raise ConfigError(f"lrs: {rate} is no learning rate; give numbers above 0")
    members = []
    for depth in config.depths:
        for domain, where in domains.items():
            for seed in config.seeds:
                for lr in axes["lrs"]:
                    for start in axes["starts"]:
                        parts = [f"L{depth}", domain if config.domains else "", f"s{seed}", f"lr{lr:g}", start or ""]
                        name = "-".join(part for part in parts if part)
                        folder = run_dir_of(config) / name
                        members.append(Member(_named(name), depth, domain, where, seed, lr, start, folder))
    if len({m.name for m in members}) < len(members):
        raise ConfigError("two targets of this grid have one name: learning rates are told apart by six digits")
    if len(members) > config.limit and not config.yes:
        raise ConfigError(
            f"this grid has {len(members)} targets, more than limit: {config.limit}; add --yes True to run it"
        )
    unknown = [name for name in config.only if name not in {m.name for m in members}]
    if unknown:
        raise ConfigError(f"only: no target is called {unknown[0]!r}; {nearest(unknown[0], [m.name for m in members])}")
    return [m for m in members if m.name in config.only] if config.only else members


def _named(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise ConfigError(f"domains: {error}") from None


def run_dir_of(config: InitConfig) -> Path:
    """The family's folder, absolute."""
    return Path(expand_path(config.run_dir)).absolute()


class Family:
    """A config with its learngene read and checked: what can be said of every target before it is built."""

    def __init__(self, config: InitConfig):
        self.config = config
        self.members = expand(config)
        self._read: dict[str, list[tuple[str, Manifest]]] = {}

    @cached_property
    def learngene(self) -> Artifact | None:
        """Read and checked against its hash; `ArtifactError` for one that is damaged or was never finished."""
        from fine_dist.model.artifact import load_artifact

        if self.config.learngene is None:
            return None
        return load_artifact(expand_path(self.config.learngene), "learngene")

    def method(self, member: Member) -> Method[Any]:
        """The method of one target, with its start. `ConfigError` for a start that the method does not have."""
        if self.config.method is not None:
            settings = self.config.method.model_dump()
        elif self.learngene is not None:
            settings = dict(self.learngene.method)
        else:
            raise ConfigError(
                "learngene: give the folder that condense wrote, or a method that needs none (method.name)"
            )
        kind = type(from_manifest(settings).config)
        if member.start is not None:
            if "sigma" not in kind.model_fields:
                raise ConfigError(f"starts: method {settings['name']} has no sigma to start; leave starts out")
            from fine_dist.model.depth import STARTS

            if member.start not in STARTS:
                raise ConfigError(f"starts: no start is called {member.start!r}; {nearest(member.start, STARTS)}")
            settings["sigma"] = member.start
        return build_method(kind.model_validate(settings))

    def arch(self, member: Member) -> Arch:
        """The shape of one target; its classes are the data set's where it has labels of its own."""
        arch = self._shape(member)
        if not self.new_labels(member):
            return arch
        return arch.model_copy(update={"num_classes": self._manifests(member)[0][1].num_classes})

    def _shape(self, member: Member) -> Arch:
        base = self.config.arch or (self.learngene.arch if self.learngene else None)
        if base is None:
            raise ConfigError("arch: without a learngene the shape of the targets must be given, such as DiT-B/2")
        return base.with_depth(member.depth)

    def new_labels(self, member: Member) -> bool:
        """Whether the target trains a label embedder of its own."""
        return member.domain_config.labels == "new"

    def check_data(self, member: Member) -> None:
        """`DataError` when the target's data set is not there, is damaged or does not fit it."""
        from fine_dist.data.stream import check_fit

        arch = self.arch(member)
        for where, manifest in self._manifests(member):
            check_fit(manifest, arch, where)

    def _manifests(self, member: Member) -> list[tuple[str, Manifest]]:
        """What the data set's shards hold: those that are trained on first, then the held-out ones if any."""
        from fine_dist.data.reader import ShardSet

        data = member.domain_config.data
        if not data.shards:
            key = f"domains.{member.domain}.data.shards" if self.config.domains else "data.shards"
            raise DataError(f"{key} is not set: give the folder that `python -m fine_dist.encode` wrote")
        if member.domain not in self._read:
            found = []
            for where in filter(None, (data.shards, data.held_out)):
                shards = ShardSet(where, data)
                found.append((where, shards.manifest))
                shards.close()
            self._read[member.domain] = found
        return self._read[member.domain]

    def check(self) -> None:
        """Everything that can be wrong before a target trains; nothing is written."""
        from fine_dist.stages.descendants import descend

        seen = set()
        for member in self.members:
            method = self.method(member)
            if (member.start, member.domain) in seen:
                continue
            seen.add((member.start, member.domain))
            self.check_data(member)
            # One layer of each kind of target is built, which finds whatever the method refuses.
            small = self.arch(member).with_depth(1)
            descend(method, self.learngene, small, member.seed, new_labels=self.new_labels(member))
        for member in self.members:
            self.check_folder(member)

    # --- one target's settings --------------------------------------------------------------------------------------

    def settings(self, member: Member) -> dict[str, Any]:
        """Everything that decides a target's trajectory, as JSON values."""
        config = self.config
        data = member.domain_config.data
        return {
            "method": self.method(member).config.model_dump(mode="json"),
            "learngene": self.learngene.hash if self.learngene else None,
            "arch": self.arch(member).model_dump(mode="json"),
            "data": {"shards": data.shards, "streams": data.streams, "window": data.window},
            "labels": member.domain_config.labels,
            "seed": member.seed,
            "lr": member.lr,
            "steps": config.steps,
            "batch": config.batch,
            "stop": config.stop.model_dump(mode="json") if config.stop else None,
            "optim": config.optim.model_dump(mode="json", exclude={"lr"}),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "precision": config.engine.precision,
        }

    def key(self, member: Member) -> str:
        """A hash of its settings."""
        return hashlib.sha256(json.dumps(self.settings(member), sort_keys=True).encode()).hexdigest()

    def check_folder(self, member: Member) -> None:
        """`RunDirError` when the target's folder was written for other settings, naming them."""
        path = member.folder / "target.json"
        if not path.is_file():
            return
        there, now = json.loads(path.read_text(encoding="utf-8")), self.settings(member)
        differing = [f"{k}: {there.get(k)} there, {now[k]} now" for k in now if there.get(k) != now[k]]
        if differing:
            raise RunDirError(
                f"{member.folder} was made with other settings:\n  "
                + "\n  ".join(differing)
                + "\nchoose another run_dir, or give the same settings to continue"
            )

    # --- packs ------------------------------------------------------------------------------------------------------

    @cached_property
    def rank(self) -> int | None:
        """Components R of the learngene's factors, where it has any."""
        genes = [t for name, t in (self.learngene.tensors if self.learngene else {}).items() if name.endswith(".U")]
        return genes[0].shape[1] if genes else None

    def shapes(self) -> list[Shape]:
        """What the planner needs to know of all targets."""
        found = []
        for member in self.members:
            method = self.method(member).config.model_dump(mode="json", exclude={"sigma"})
            own = self.new_labels(member)
            kin = json.dumps([method, member.domain if own else None])
            found.append(Shape(member.name, self._shape(member), kin, self.config.steps))
        return found

    def packs(self, workers: int | None = None) -> list[Pack]:
        """The packs of this family. workers: over which they are spread; none: as the config and this machine say."""
        config = self.config
        cpu, memory = device_memory(config)
        return plan(
            self.shapes(),
            config.pack,
            workers=workers or config.pack.workers or config.launch.max_parallel or local_workers(config.launch),
            batch=max(1, config.batch // (config.launch.nodes * config.launch.processes)),
            rank=self.rank,
            memory=memory,
            cpu=cpu,
        )


def device_memory(config: InitConfig) -> tuple[bool, int]:
    """(whether packs run on a CPU, bytes for a pack's activations)."""
    import torch

    cpu = config.engine.device == "cpu" or not torch.cuda.is_available()
    if config.pack.memory_gib:
        return cpu, int(config.pack.memory_gib * 2**30)
    if cpu:
        return True, CPU_MEMORY
    return False, int(0.8 * torch.cuda.mem_get_info()[0])


def local_workers(launch: LaunchConfig) -> int:
    """Packs that run at once on this machine."""
    if launch.gpus:
        from launchers.local import visible_devices

        return max(1, int(len(visible_devices()) / (launch.gpus * launch.processes)))
    return max(1, (os.cpu_count() or 1) // (launch.cpus * launch.processes))
