"""Measurements of a study's models: each model once, several in parallel if the study runs several jobs.

The measurements are stored in RUN_DIR/measures, so that an extended study measures only its new models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fine_dist.artifacts.locate import find_artifact
from fine_dist.artifacts.model_facts import SamplerOverrides
from fine_dist.core.errors import RunDirError, TrainingError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import Record, read_record
from fine_dist.core.limits import num_cores
from fine_dist.core.processes import die_with_parent
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import locate
from fine_dist.diffusion.samplers import sample
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine import dist
from fine_dist.engine.allocator import keep_freed_memory
from fine_dist.engine.dist import pick_device
from fine_dist.evaluation.classifier import classifier_of_shards, load_classifier
from fine_dist.evaluation.evaluator import Evaluator
from fine_dist.evaluation.settings import EvaluateConfig, FeaturesConfig
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import load_artifact, read_manifest
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig, StudyEntry, merged
from fine_dist.study.graph import Graph


class Measure(Record):
    """A file of RUN_DIR/measures with the measurements of one model."""

    key: str
    """sha256 of everything that the numbers depend on."""
    numbers: dict[str, Any]
    """Measured values by name."""


UNTRAINED = "untrained"
"""Variant of a target before stage 2."""
DISTANCES = ("fd_classifier", "accuracy")
"""Measurements that are computed from samples."""


class MeasuredModel(NamedTuple):
    """A finished model of a study that is to be measured."""

    name: str
    """Name of the files of the measurements."""
    folder: Path
    data: str
    """Name of the data set that the model is measured on."""
    distances: bool = False
    """Whether samples are measured as well."""


class Measuring:
    """The measurements of a study's models.

    Attributes:
        accuracy: Held-out accuracy of the classifier behind the Fréchet distance; None without one.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.study = graph, graph.study
        self.features, self.accuracy = classifier_of(self.study)
        self._evaluators: dict[str, Evaluator] = {}

    def on(self, data: str) -> Evaluator:
        """The evaluator of a data set; it is that of `fine-dist evaluate`, so that the numbers are the same."""
        if data not in self._evaluators:
            shards = self.study.shards_of(data)
            config = EvaluateConfig(
                metrics=("held_out_loss", *(["fd_classifier", "accuracy"] if self.features else [])),
                data=DataConfig(shards=shards.train, held_out=shards.held_out),
                features=FeaturesConfig(classifier=self.features),
                samples=self.study.samples,
                sampler=SamplerOverrides(
                    **{key: getattr(self.study.sampler, key) for key in SamplerOverrides.model_fields}
                ),
                run_dir=str(self.study.root),
            )
            self._evaluators[data] = Evaluator(config, dist.single_process())
        return self._evaluators[data]

    def of(self, entry: StudyEntry) -> Evaluator:
        """The evaluator of an entry's targets."""
        return self.on(settings.data_of(self.study, "train", entry))

    @property
    def floor(self) -> tuple[float, int] | None:
        """(Fréchet distance of held-out real images to the training data, their number); None without features."""
        data = next(iter(self.study.data))
        floor = self.on(data).references.floors().get("fd_classifier")
        manifest, _ = locate(self.study.shards_of(data).held_out, DataConfig())
        return None if floor is None else (floor, manifest.count)

    def held_out_count(self, entry: StudyEntry) -> int:
        """Number of samples behind the held-out loss of an entry's targets."""
        shards = self.study.shards_of(settings.data_of(self.study, "train", entry))
        return locate(shards.held_out, DataConfig())[0].count

    def parent(self, entry: StudyEntry, seed: int) -> MeasuredModel | None:
        """The parent of an entry's targets, measured on its own training data set; None without a parent."""
        parent = self.graph.parent_of(entry, seed)
        if parent is None:
            return None
        run = parent[0]
        depth = read_manifest(find_artifact(run.run_dir))["arch"]["num_layers"]
        trained_on = str(getattr(getattr(run.config, "data", None), "shards", ""))
        data = next((n for n in self.study.data if self.study.shards_of(n).train == trained_on), None)
        distances = self._has_distances(entry, depth, seed)
        return MeasuredModel(run.name, run.run_dir, data or next(iter(self.study.data)), distances)

    def models(self, entry: StudyEntry, depth: int, seed: int) -> list[MeasuredModel]:
        """The models of one target: after stage 2, if it has one, and after each run of stage 3."""
        data, distances = settings.data_of(self.study, "train", entry), self._has_distances(entry, depth, seed)
        models = []
        if entry.init:
            run = self.graph.init(entry, seed)
            folder = settings.target_folder(run.config, depth)
            models.append(MeasuredModel(f"{run.name}-L{depth}", folder, data, distances))
        for run in self.graph.train(entry, depth, seed):
            models.append(MeasuredModel(run.name, run.run_dir, data, distances))
        return models

    def _has_distances(self, entry: StudyEntry, depth: int, seed: int) -> bool:
        study = self.study
        filters = ((study.frechet, entry.name), (study.frechet_depths, depth), (study.frechet_seeds, seed))
        return all(not chosen or value in chosen for chosen, value in filters)

    def numbers(self, model: MeasuredModel) -> dict[str, Any]:
        """Held-out loss and distances of a model on disk, measured once for these weights and settings."""
        manifest, evaluator = read_manifest(find_artifact(model.folder)), self.on(model.data)
        data = evaluator.config.data.model_dump(mode="json")

        def loss() -> dict[str, Any]:
            renderer = evaluator.renderer(str(model.folder))
            return {"held_out_loss": evaluator.held_out_loss(renderer.model, renderer.diffusion)}

        def distances() -> dict[str, Any]:
            scores = evaluator.scores(evaluator.renderer(str(model.folder))).numbers()
            return {key: scores.get(key) for key in DISTANCES}

        numbers = self._once(f"{model.name}.loss", [manifest, data], loss)
        if not model.distances or self.features is None:
            return numbers | dict.fromkeys(DISTANCES)
        return numbers | self._once(f"{model.name}.distances", [manifest, evaluator.protocol()], distances)

    def untrained(self, entry: StudyEntry, depth: int, seed: int) -> dict[str, dict[str, Any]]:
        """Measurements of an entry's target before any training, by variant.

        The variant is "" if the entry has no stage 2, so that the untrained target is its step 0, and UNTRAINED if step
        0 is the end of stage 2. For variants of the method (`StudyEntry.untrained`) only the held-out loss is measured.
        """
        if not has_untrained(entry):
            return {}
        evaluator, parent = self.of(entry), self.graph.parent_of(entry, seed)
        distances = bool(self.features and parent and self._has_distances(entry, depth, seed))
        diffusion = self.diffusion_of(entry)

        def measure() -> dict[str, Any]:
            model = self.untrained_model(entry, depth, seed)
            numbers: dict[str, Any] = {"held_out_loss": evaluator.held_out_loss(model, diffusion)}
            if distances and parent:
                # the parent's sampling settings, with the target as the model
                renderer = dataclasses.replace(evaluator.renderer(str(parent[1])), model=model.eval())
                scores = evaluator.scores(renderer).numbers()
                numbers |= {key: scores.get(key) for key in DISTANCES}
            by_variant = {UNTRAINED if entry.init else "": numbers}
            for variant in self._variants(entry, seed) if entry.untrained else ():
                model = self.untrained_model(entry, depth, seed, variant)
                by_variant[variant[1]] = {"held_out_loss": evaluator.held_out_loss(model, diffusion)}
            return by_variant

        manifest = read_manifest(find_artifact(parent[0].run_dir)) if parent else None
        key = [manifest, entry.method, entry.untrained, depth, seed, diffusion.model_dump()]
        key += [evaluator.protocol() if distances else evaluator.config.data.model_dump(mode="json")]
        return self._once(f"{entry.name}-L{depth}-s{seed}.untrained", key, measure)

    def diffusion_of(self, entry: StudyEntry) -> DiffusionConfig:
        """The diffusion process that an entry's targets are trained for."""
        stage = merged(self.study.stages["train"], entry.settings)
        return DiffusionConfig.model_validate(stage.get("diffusion", {}))

    def samples(self, entry: StudyEntry, model: Any) -> Any:
        """Latents [N, C, H, H] of an entry's sample grid; all models of the study get the same noise and labels."""
        labels = torch.arange(self.study.pictures) % model.arch.num_classes
        sampler = self.study.sampler.model_copy(update={"guidance": self.study.sample_guidance})
        return sample(
            model.eval(), labels=labels, arch=model.arch, config=sampler, diffusion=self.diffusion_of(entry), seed=0,
            progress="sample grid",
        )  # fmt: skip

    def _variants(self, entry: StudyEntry, seed: int) -> list[tuple[str, str]]:
        """(axis, value) of every variant of the method that makes an entry's targets."""
        method = settings.method_of(self._method(entry, seed))
        return [(axis, value) for axis, values in method.variants().items() for value in values]

    def _method(self, entry: StudyEntry, seed: int) -> dict[str, Any]:
        """Settings of the method that initializes the targets; from the learngene if the entry has a stage 1."""
        parent = self.graph.parent_of(entry, seed)
        if parent is None or not entry.condense:
            return entry.method
        return dict(read_manifest(find_artifact(parent[0].run_dir))["method"])

    def untrained_model(self, entry: StudyEntry, depth: int, seed: int, variant: tuple[str, str] | None = None) -> Any:
        """An entry's target before any training, as a model."""
        parent = self.graph.parent_of(entry, seed)
        method = settings.method_of(self._method(entry, seed))
        method = method.vary(*variant) if variant else method
        if parent is None:
            arch = Arch.model_validate(self.study.stages["train"]["arch"]).with_depth(depth)
            return settings.untrained(method, None, arch, seed)
        artifact = load_artifact(find_artifact(parent[0].run_dir))
        return settings.untrained(method, artifact, artifact.arch.with_depth(depth), seed)

    def _once(self, name: str, key: list[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored measurement if everything that it depends on (`key`) is unchanged, otherwise a new one."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        file = self.study.root / "measures" / f"{name}.json"
        if file.is_file():
            stored = read_record(Measure, file, RunDirError, "delete it to measure the model again")
            # The key contains the manifest with the hashes of the tensors, so a retrained model is measured again.
            if stored.key == digest:
                return dict(stored.numbers)
        numbers = measure()
        write_atomic(file, json.dumps({"key": digest, "numbers": numbers}) + "\n")
        return numbers


def has_untrained(entry: StudyEntry) -> bool:
    """Whether an entry's targets can be measured before training: their shell and labels must not change later."""
    return entry.shell == "inherited" and entry.labels == "keep" and not (entry.init and entry.init.final)


def classifier_of(study: StudyConfig) -> tuple[str | None, float | None]:
    """(folder, held-out accuracy) of the classifier of the Fréchet distance, trained if needed; Nones without one."""
    if study.features is None:
        return None, None
    if study.features != "classifier":
        return study.features, load_classifier(study.features).accuracy
    folder, shards = study.root / "features", study.shards_of(next(iter(study.data)))
    return str(folder), classifier_of_shards(folder, shards.train, shards.held_out).accuracy


def check_features(study: StudyConfig) -> None:
    """Check before any run that the study's feature network exists.

    Raises:
        ArtifactError: The folder has no classifier.
    """
    if study.features not in (None, "classifier"):
        load_classifier(study.features)


# --- several processes -----------------------------------------------------------------------------------------------


def measure_ahead(measuring: Measuring) -> None:
    """Measure all models of a study in as many processes as the study runs jobs (`launch.max_parallel`).

    Each process gets a share of the cores: for small models two processes are faster than two threads. With one
    process, or on an accelerator, this does nothing, and `Measuring` measures each model when it is needed.

    Raises:
        TrainingError: A process was killed.
    """
    study = measuring.study
    processes = min(study.launch.max_parallel or 1, num_cores())
    if processes < 2 or pick_device("auto").type != "cpu":
        return
    # threads of a small model mostly wait for each other, in particular on a machine with other load
    torch.set_num_threads(num_cores() // processes)
    targets = [(entry, depth, seed) for seed in study.seeds for entry in study.rows for depth in study.depths_of(entry)]
    parents = [measuring.parent(entry, seed) for seed in study.seeds for entry in study.rows]
    models = [*filter(None, parents), *(model for target in targets for model in measuring.models(*target))]
    models = list(dict.fromkeys(models))  # several entries may have the same parent
    arguments = (measuring.graph, num_cores() // processes, os.getpid())
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), _start_worker, arguments) as pool:
            done = itertools.chain(pool.map(_numbers, models), pool.map(_untrained, targets))
            list(tqdm(done, total=len(models) + len(targets), desc="measure", unit="model", leave=False))
    except BrokenProcessPool as error:
        raise TrainingError(
            f"a process that measured models of {study.root} was killed (out of memory?). Finished measurements are "
            "saved; run the same command to resume, with launch.max_parallel 1 to measure one model at a time"
        ) from error


_worker: Measuring
"""The measurements of this worker of the pool."""


def _start_worker(graph: Graph, threads: int, parent: int) -> None:
    global _worker
    die_with_parent(parent)
    # Ctrl-C reaches all processes of the group. The parent reports it; a worker just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["TQDM_DISABLE"] = "1"  # the parent shows the progress
    torch.set_num_threads(threads)
    keep_freed_memory()  # every batch allocates the same sizes as the one before
    _worker = Measuring(graph)


def _numbers(model: MeasuredModel) -> None:
    _worker.numbers(model)


def _untrained(target: tuple[StudyEntry, int, int]) -> None:
    _worker.untrained(*target)
