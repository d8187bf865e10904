"""A family before its targets are built: their methods, shapes and identities, the checks, and the packs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fine_dist.artifacts.model_facts import check_parent_process, diffusion_of
from fine_dist.artifacts.reading import read_artifact
from fine_dist.artifacts.targets import check_target, descend
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError, DataError, RunDirError
from fine_dist.core.files import sha256_text
from fine_dist.core.json_files import as_record, read_json
from fine_dist.core.limits import FAR_BEYOND, GIB, memory_bytes
from fine_dist.data.manifest import Manifest
from fine_dist.data.reader import ShardSet
from fine_dist.data.stream import check_fit, read_all
from fine_dist.engine.trackers import check_installed
from fine_dist.family.config import InitConfig
from fine_dist.family.listing import baselines, result_of
from fine_dist.family.members import Member, expand
from fine_dist.family.packing import Pack, Shape, plan, sample_bytes
from fine_dist.launchers.spec import Capacity
from fine_dist.methods import build, from_manifest, parent_of
from fine_dist.methods.base import Method, MethodConfig, Parent
from fine_dist.model.arch import Arch
from fine_dist.stages.blueprint import check_labels, fit_arch, hparams

CPU_MEMORY = 4 * 2**30
"""Bytes for a pack's activations on a CPU, unless `pack.memory_gib` is set."""


class Family:
    """A config with its parent, its targets, and everything that is known of them before they are built."""

    def __init__(self, config: InitConfig):
        self.config = config
        self.members = expand(config)
        self._read: dict[str, list[tuple[str, Manifest]]] = {}
        self._methods: dict[tuple[tuple[str, str], ...], Method[MethodConfig]] = {}

    @cached_property
    def parent(self) -> Parent | None:
        """The parent, read and verified by its hash. `ArtifactError` when it is damaged or incomplete."""
        return parent_of(read_artifact(self.config.parent, self.config.hints)) if self.config.parent else None

    @cached_property
    def baseline_losses(self) -> dict[str, list[tuple[int, float]]]:
        """(depth, held-out loss) of the baselines by label, for family.png. `ArtifactError` when one has no model."""
        return baselines(self.parent, self.config.baselines)

    def parent_with_samples(self, member: Member) -> Parent | None:
        """The parent, with the samples of the target's data that its method needs (`Traits.samples`)."""
        count, shards = self.method(member).traits.samples, member.domain_config.data.shards
        if self.parent is None or not count or not shards:
            return self.parent
        latents, labels = read_all(expand_path(shards), count)
        if self.new_labels(member):  # the parent was not trained on these classes: use its null label
            labels = labels.new_full(labels.shape, self.parent.arch.num_classes)
        return replace(self.parent, samples=(latents, labels))

    def method(self, member: Member) -> Method[MethodConfig]:
        """The method of a target with its variant. `ConfigError` when the method has no such variant."""
        if member.variant not in self._methods:
            if self.config.method is not None:
                method = build(self.config.method)
            elif self.parent is not None:
                method = from_manifest(self.parent.artifact.method)
            else:
                raise ConfigError(
                    "parent: give the folder that condense wrote, or a method without a parent (method.name)"
                )
            for axis, value in member.variant:
                method = method.vary(axis, value)
            self._methods[member.variant] = method
        return self._methods[member.variant]

    def arch(self, member: Member) -> Arch:
        """The architecture of one target; a target with new labels has the classes of its data set."""
        arch = self._shape(member)
        if not self.new_labels(member):
            return arch
        return arch.model_copy(update={"num_classes": self.manifests(member)[0][1].num_classes})

    def _shape(self, member: Member) -> Arch:
        base = self.parent.arch if self.parent else None
        if self.config.arch:
            base = fit_arch(self.config.arch, member.domain_config.data)
        if base is None:
            raise ConfigError("arch: without a parent the architecture of the targets must be given, such as DiT-B/2")
        shape = base.with_depth(member.depth)
        return self.method(member).shape_of(shape, self.parent.arch) if self.parent else shape

    def new_labels(self, member: Member) -> bool:
        """Whether the target trains its own label embedder."""
        return member.domain_config.labels == "new"

    def check_data(self, member: Member) -> None:
        """Check the target's data set. `DataError` when it is missing or damaged, or does not fit the target."""
        arch = self.arch(member)
        for where, manifest in self.manifests(member):
            check_fit(manifest, arch, where)
        if self.parent is not None and self.method(member).traits.parents != ("none",):
            key = f"domains.{member.domain}.labels" if self.config.domains else "labels"
            check_labels(
                self.parent.artifact.extra.get("class_names") or (),
                self.parent.arch.num_classes,
                str(self.config.parent),
                member.domain_config.data,
                keep_labels=member.domain_config.labels != "same" or arch.num_classes != self.parent.arch.num_classes,
                remedy=f"set {key}: new to train a label embedder anew, or {key}: keep to use them as they are",
            )

    def manifests(self, member: Member) -> list[tuple[str, Manifest]]:
        """(path, manifest) of the target's training shards, then of its held-out shards if there are any."""
        data = member.domain_config.data
        if not data.shards:
            key = f"domains.{member.domain}.data.shards" if self.config.domains else "data.shards"
            raise DataError(f"{key} is not set: give the folder that `fine-dist encode` wrote")
        if member.domain not in self._read:
            manifests = []
            for where in filter(None, (data.shards, data.held_out)):
                shards = ShardSet(where, data)
                manifests.append((where, shards.manifest))
                shards.close()
            self._read[member.domain] = manifests
        return self._read[member.domain]

    def check(self) -> None:
        """Check everything that can be wrong before a target trains; nothing is written."""
        check_installed(self.config.engine.tracker)
        seen: set[Any] = set()
        for member in self.members:
            method = self.method(member)
            if self.parent is not None and method.traits.parents != ("none",):
                parent = self.parent.artifact
                check_parent_process(diffusion_of(parent.extra), self.config.diffusion, str(parent.folder))
            # Data and method do not depend on depth, seed or rate, so thousands of targets are checked in seconds.
            if (member.variant, member.domain) not in seen:
                seen.add((member.variant, member.domain))
                self.check_data(member)
            check_target(method, self.parent, self.arch(member), new_labels=self.new_labels(member))
            # The smallest target of each kind is built, which finds all remaining errors.
            small = method.smallest(self.arch(member))
            if (member.variant, member.domain, small) in seen:
                continue
            seen.add((member.variant, member.domain, small))
            descend(method, self.parent, small, member.seed, new_labels=self.new_labels(member))
        for member in self.members:
            self.check_folder(member)
        _ = self.baseline_losses

    # --- one target's identity --------------------------------------------------------------------------------------

    def identity(self, member: Member) -> dict[str, Any]:
        """The settings and inputs that determine a target's result, as JSON values; paths are not among them."""
        config = self.config
        data = member.domain_config.data
        identity = {
            "method": self.method(member).config.model_dump(mode="json"),
            "parent": self.parent.artifact.hash if self.parent else None,
            "arch": self.arch(member).model_dump(mode="json"),
            "data": {"hash": self.manifests(member)[0][1].hash, "streams": data.streams, "window": data.window},
            "labels": "new" if self.new_labels(member) else "keep",
            "seed": member.seed,
            "lr": member.lr,
            "batch": config.batch,
            "stop": config.stop.model_dump(mode="json") if config.stop else None,
            "optim": config.optim.model_dump(mode="json", exclude={"lr"}),
            "diffusion": config.diffusion.model_dump(mode="json"),
            "precision": config.engine.precision,
        }
        # With a schedule over all steps, another number of steps changes every learning rate. Otherwise more steps
        # continue the same run.
        if config.optim.depends_on_steps:
            identity["steps"] = config.steps
        return identity

    def hparams(self, member: Member) -> dict[str, Any]:
        """A target's settings for the tables of runs in trackers."""
        config, method = self.config, self.method(member).config
        return {
            **hparams("init", method, self.arch(member), config, seed=member.seed, lr=member.lr),
            **{"domain": member.domain, **dict(member.variant)},
        }

    def key(self, member: Member) -> str:
        """sha256 of a target's identity."""
        return sha256_text(json.dumps(self.identity(member), sort_keys=True))

    def done(self, member: Member) -> bool:
        """Whether a target is done: its artifact exists and was trained for the requested number of steps."""
        result = result_of(member.folder)
        return result is not None and (
            result["steps"] >= self.config.steps or result["steps"] == 0 or bool(result.get("reason"))
        )

    def check_folder(self, member: Member) -> None:
        """Check that a target's folder was not written with other settings. `RunDirError` names the differences."""
        path = member.folder / "target.json"
        if not path.is_file():
            return
        remedy = "choose another run_dir, or delete that folder"
        stored = as_record(dict[str, Any], read_json(path, RunDirError, remedy), path, RunDirError, remedy)
        now = self.identity(member)
        differing = [f"{k}: {stored.get(k)} there, {now.get(k)} now" for k in now if stored.get(k) != now[k]]
        if differing:
            raise RunDirError(
                f"{member.folder} was made with other settings:\n  "
                + "\n  ".join(differing)
                + "\nchoose another run_dir, or give the same settings to continue"
            )

    # --- packs ------------------------------------------------------------------------------------------------------

    @property
    def may_pack(self) -> bool:
        """Whether the settings allow packs; other backends than `plain` use the engine's loop for each target."""
        return self.config.engine.backend == "plain"

    def shapes(self) -> list[Shape]:
        """The planner's description of all targets. A target that cannot be packed forms its own group."""
        return [self._shape_of(member) for member in self.members]

    def _shape_of(self, member: Member) -> Shape:
        arch = self._shape(member)
        rank = self._rank(member)
        bf16 = self.config.engine.precision == "bf16"
        # With new labels each data set is a separate group, because label tables have its number of classes.
        group = json.dumps(["packed", rank, member.domain if self.new_labels(member) else None])
        if rank is None:
            group = json.dumps(["single", member.name])
        size = sample_bytes(arch, rank or 0, bf16=bf16)
        return Shape(member.name, arch, group, self.config.steps, size, json.dumps([member.domain, member.seed]))

    @cached_property
    def _ranks(self) -> dict[Any, int | None]:
        return {}

    def _rank(self, member: Member) -> int | None:
        """Rank of the factors that targets of this variant and data set share. None if they cannot be packed."""
        if not self.may_pack:
            return None
        key = (member.variant, member.domain)
        if key not in self._ranks:
            method = self.method(member)
            small = method.smallest(self.arch(member))
            descent = descend(method, self.parent, small, member.seed, new_labels=self.new_labels(member))
            form = method.pack(descent.model) if descent.trains == "some" else None
            self._ranks[key] = form.rank if form else None
        return self._ranks[key]

    def check_memory(self, capacity: Capacity | None = None) -> None:
        """Refuse a batch that is far too large for the memory of a CPU: the kernel would kill the process.

        Accelerators are not checked, because they report an allocation that fails.

        Raises:
            ConfigError: One target needs more than `FAR_BEYOND` times the memory.
        """
        cpu, _ = pack_memory(self.config, capacity)
        most = capacity.host_bytes if capacity else memory_bytes()
        if not cpu or not most or self.config.launch.preflight == "off":
            return
        world_size = self.config.launch.nodes * self.config.launch.processes
        micro = self.config.engine.micro_batch or max(1, self.config.batch // world_size)
        deepest = max(self.shapes(), key=lambda shape: shape.sample_bytes)
        need = micro * deepest.sample_bytes
        if need > FAR_BEYOND * most:
            raise ConfigError(
                f"batch {self.config.batch}: {deepest.name} alone needs {need / GIB:.1f} GiB at {micro} samples, and "
                f"there are {most / GIB:.1f}; lower batch or engine.micro_batch"
            )

    def packs(self, capacity: Capacity | None = None) -> list[Pack]:
        """The packs of this family for the machines of `capacity`; None: for this process."""
        config = self.config
        cpu, memory = pack_memory(config, capacity)
        workers = 1 if capacity is None else config.pack.workers or config.launch.max_parallel or capacity.workers
        return plan(
            self.shapes(),
            config.pack,
            workers=workers,
            batch=max(1, config.batch // (config.launch.nodes * config.launch.processes)),
            memory=memory,
            cpu=cpu,
        )


def pack_memory(config: InitConfig, capacity: Capacity | None) -> tuple[bool, int]:
    """(whether packs run on a CPU, bytes for a pack's activations), for `capacity` or for this process."""
    if capacity is not None:
        cpu = capacity.cpu or config.engine.device == "cpu"
        size = None if cpu else capacity.accelerator_bytes
        # A fifth is reserved for fragmentation, the factors and the CUDA context.
        free = int(0.8 * size) if size else CPU_MEMORY
    else:
        cpu = config.engine.device == "cpu" or not torch.cuda.is_available()
        free = CPU_MEMORY if cpu else int(0.8 * torch.cuda.mem_get_info()[0])
    return cpu, int(config.pack.memory_gib * 2**30) if config.pack.memory_gib else free
