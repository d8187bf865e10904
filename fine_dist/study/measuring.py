"""Measuring a study's models: each once, and several at a time where the study runs several jobs.

A model's measurements are kept in RUN_DIR/measures, so that a study that grows measures only what is new.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fine_dist.core.errors import TrainingError
from fine_dist.core.files import write_atomic
from fine_dist.core.limits import num_cores
from fine_dist.data.settings import DataConfig
from fine_dist.study import settings
from fine_dist.study.config import Entry
from fine_dist.study.environment import features

if TYPE_CHECKING:
    from fine_dist.evaluation.evaluator import Evaluator
    from fine_dist.study.graph import Graph


class Model(NamedTuple):
    """A finished model of a study."""

    name: str
    """Of its measurements' files."""
    folder: Path
    data: str
    """Data set that it is measured on."""
    distances: bool = False
    """Whether a Fréchet distance is wanted."""


class Measuring:
    """The measurements of a study's models.

    accuracy: held-out, of the classifier whose features the Fréchet distance has; none without one.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.study = graph, graph.study
        self.features, self.accuracy = features(self.study)
        self._evaluators: dict[str, Evaluator] = {}

    def on(self, data: str) -> Evaluator:
        """What measures on one data set: the evaluator of `python -m fine_dist.evaluate`, so the numbers are its."""
        from fine_dist.engine import dist
        from fine_dist.evaluation.evaluator import Evaluator
        from fine_dist.evaluation.settings import EvaluateConfig, FeaturesConfig

        if data not in self._evaluators:
            folder = self.study.root / data
            config = EvaluateConfig(
                metrics=("held_out_loss", *(["fd_classifier"] if self.features else [])),
                data=DataConfig(shards=str(folder / "train"), held_out=str(folder / "held_out")),
                features=FeaturesConfig(classifier=self.features),
                samples=self.study.samples,
                sampler=self.study.sampler,  # type: ignore[arg-type]
                run_dir=str(self.study.root),
            )
            self._evaluators[data] = Evaluator(config, dist.alone())
        return self._evaluators[data]

    def of(self, entry: Entry) -> Evaluator:
        """The measurements of an entry's targets."""
        return self.on(settings.data_of(self.study, "train", entry))

    def parent(self, entry: Entry, seed: int) -> Model | None:
        """What an entry's targets come from, on the data that it was trained on, which need not be theirs."""
        from fine_dist.artifacts.load import find_artifact
        from fine_dist.model.artifact import read_manifest

        found = self.graph.parent_of(entry, seed)
        if found is None:
            return None
        run = found[0]
        depth = read_manifest(find_artifact(run.run_dir))["arch"]["num_layers"]
        data = Path(run.config.data.shards).parent.name
        return Model(run.name, run.run_dir, data, self._has_distances(entry, depth, seed))

    def models(self, entry: Entry, depth: int, seed: int) -> list[Model]:
        """What is measured of one target: as initialised, where it has a stage 2, and after each training."""
        data, distances = settings.data_of(self.study, "train", entry), self._has_distances(entry, depth, seed)
        found = []
        if entry.init:
            run = self.graph.init(entry, seed)
            folder = settings.target_folder(run.config, depth)
            found.append(Model(f"{run.name}-L{depth}", folder, data, distances))
        for run in self.graph.train(entry, depth, seed):
            found.append(Model(run.name, run.run_dir, data, distances))
        return found

    def _has_distances(self, entry: Entry, depth: int, seed: int) -> bool:
        study = self.study
        wanted = ((study.frechet, entry.name), (study.frechet_depths, depth), (study.frechet_seeds, seed))
        return all(not chosen or value in chosen for chosen, value in wanted)

    def numbers(self, model: Model) -> dict[str, Any]:
        """Held-out loss and distances of a model on disk, each measured once for these weights and settings."""
        from fine_dist.artifacts.load import find_artifact
        from fine_dist.model.artifact import read_manifest

        manifest, evaluator = read_manifest(find_artifact(model.folder)), self.on(model.data)
        data = evaluator.config.data.model_dump(mode="json")

        def loss() -> dict[str, Any]:
            renderer = evaluator.renderer(str(model.folder))
            return {"held_out_loss": evaluator.held_out_loss(renderer.model, renderer.diffusion)}

        def distances() -> dict[str, Any]:
            return {"frechet": evaluator.scores(evaluator.renderer(str(model.folder))).numbers()["fd_classifier"]}

        found = self._once(f"{model.name}.loss", [manifest, data], loss)
        if not model.distances or self.features is None:
            return found | {"frechet": None}
        return found | self._once(f"{model.name}.distances", [manifest, evaluator.protocol()], distances)

    def untrained(self, entry: Entry, depth: int, seed: int) -> dict[str, float]:
        """Held-out losses of every variant of an entry's target without any training; empty where nobody asks."""
        from fine_dist.artifacts.load import find_artifact
        from fine_dist.artifacts.model_facts import known
        from fine_dist.diffusion.settings import DiffusionConfig
        from fine_dist.model.artifact import load_artifact, read_manifest

        parent, evaluator = self.graph.parent_of(entry, seed), self.of(entry)
        if not entry.untrained or parent is None:
            return {}
        folder, data = find_artifact(parent[0].run_dir), evaluator.config.data.model_dump(mode="json")

        def measure() -> dict[str, float]:
            artifact = load_artifact(folder)
            diffusion = known(artifact.extra).diffusion or DiffusionConfig()
            method = settings.method_of(artifact.method if entry.condense else entry.method)
            return {
                str(value): evaluator.held_out_loss(
                    settings.untrained(method.vary(axis, value), artifact, depth, seed), diffusion
                )
                for axis, values in method.variants().items()
                for value in values
            }

        told = [read_manifest(folder), entry.method, depth, seed, data]
        return self._once(f"{entry.name}-L{depth}-s{seed}.untrained", told, measure)

    def _once(self, name: str, told: list[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured when all that it depends on was the same, or is now."""
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        file = self.study.root / "measures" / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["key"] == key:
                return dict(found["numbers"])
        numbers = measure()
        write_atomic(file, json.dumps({"key": key, "numbers": numbers}) + "\n")
        return numbers


# --- several at a time -----------------------------------------------------------------------------------------------


def measure_ahead(measuring: Measuring) -> None:
    """Measure all models of a study in as many processes as the study runs jobs (`launch.max_parallel`), a share of the
    cores each: small models in two processes are done sooner than by two threads. Nothing where it is one process, or
    models are measured on an accelerator.

    Raises what a measurement raises, and `TrainingError` when a process was killed.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from tqdm import tqdm

    from fine_dist.engine.dist import pick_device

    study = measuring.study
    processes = min(study.launch.max_parallel or 1, num_cores())
    if processes < 2 or pick_device("auto").type != "cpu":
        return
    targets = [(entry, depth, seed) for seed in study.seeds for entry in study.rows for depth in study.depths_of(entry)]
    parents = [measuring.parent(entry, seed) for seed in study.seeds for entry in study.rows]
    models = [*filter(None, parents), *(model for target in targets for model in measuring.models(*target))]
    models = list(dict.fromkeys(models))  # several rows may come from one
    untrained = [target for target in targets if target[0].untrained]
    given = (measuring.graph, num_cores() // processes, os.getpid())
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), _begin, given) as pool:
            done = itertools.chain(pool.map(_numbers, models), pool.map(_untrained, untrained))
            list(tqdm(done, total=len(models) + len(untrained), desc="measure", unit="model", leave=False))
    except BrokenProcessPool as error:
        raise TrainingError(
            f"a process that measured models of {study.root} was killed (out of memory?); what is measured is kept and "
            "the same command goes on; with launch.max_parallel 1 models are measured one after the other"
        ) from error


_here: Measuring
"""Of a process of the pool."""


def _begin(graph: Graph, threads: int, parent: int) -> None:
    import torch

    from fine_dist.core.processes import die_with_parent
    from fine_dist.engine.allocator import keep_freed_memory

    global _here
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends all of the group: the parent alone says so
    os.environ["TQDM_DISABLE"] = "1"  # the parent has the bar
    torch.set_num_threads(threads)
    keep_freed_memory()  # every batch asks for what the one before had
    _here = Measuring(graph)


def _numbers(model: Model) -> None:
    _here.numbers(model)


def _untrained(target: tuple[Entry, int, int]) -> None:
    _here.untrained(*target)
