"""From the run directories of a finished study to the measurements and sample grids of its report."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.files import read_rows
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig, StudyEntry
from fine_dist.study.costs import StageCost, condense_cost, init_cost, train_cost
from fine_dist.study.measuring import Measuring, measure_ahead
from fine_dist.study.report.results import Ancestor, Picture, Results

if TYPE_CHECKING:
    from torch import Tensor

    from fine_dist.model.artifact import Artifact
    from fine_dist.study.graph import Graph, StudyRun

MIN_ACCURACY = 0.9
"""Held-out accuracy of a classifier below which its features are not trusted."""
COLUMNS = 10
"""Columns of a sample grid, about: a multiple of the number of classes where there are not too many."""


def collect_results(graph: Graph) -> Results:
    """Measure the models of a study whose runs are all done, and put them together with what the runs recorded."""
    collector = _Collector(graph)
    measure_ahead(collector.measuring)
    return collector.collect()


class _Collector:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.study = graph, graph.study
        self.measuring = Measuring(graph)
        accuracy = self.measuring.accuracy
        if accuracy is not None and accuracy < MIN_ACCURACY:
            print(
                f"note: the classifier behind the Fréchet distance gets {accuracy:.1%} of held-out images right; below "
                f"{MIN_ACCURACY:.0%} its distances say little",
                flush=True,
            )
        self._artifacts: dict[str, Artifact] = {}

    def collect(self) -> Results:
        study = self.study
        floor = self.measuring.floor
        results = Results(
            title=study.title,
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            dataset=study.dataset,
            command=study.command,
            main=study.main,
            baseline=study.baseline,
            steps=study.steps,
            display_names={**{e.name: settings.label_of(e) for e in study.used}, **study.display_names},
            colors={e.name: e.color for e in study.used if e.color},
            claims=list(study.claims),
            sections=study.sections,
            tables_note=study.tables_note,
            classifier_accuracy=self.measuring.accuracy,
            fd_floor=floor[0] if floor else None,
            fd_floor_samples=floor[1] if floor else None,
            fd_samples=study.samples if floor else None,
            config=self._settings(),
            machine=machine(),
        )
        for entry in sorted(study.rows, key=lambda e: e.name != study.main):
            self._ancestor(results, entry)
            for depth in study.depths_of(entry):
                for seed in study.seeds:
                    self._target(results, entry, depth, seed)
        if study.pictures:
            results.pictures.append(real_images(study))
        return results

    def _settings(self) -> dict[str, Any]:
        study = self.study
        return {
            "run_dir": study.run_dir,
            "seeds": study.seeds,
            "depths": study.depths,
            "steps": study.steps,
            "entries": [entry.name for entry in study.used],
            "samples": study.samples,
            **({"tuned on seed": study.tune_seed} if study.tune else {}),
        }

    # --- the parent of an entry's targets ----------------------------------------------------------------------------

    def _parent(self, entry: StudyEntry, seed: int) -> tuple[StudyRun, Artifact] | None:
        """The run that made the parent, and its product; read once."""
        found = self.graph.parent_of(entry, seed)
        return (found[0], self._artifact(found[0])) if found else None

    def _artifact(self, run: StudyRun) -> Artifact:
        from fine_dist.artifacts.load import find_artifact
        from fine_dist.model.artifact import load_artifact

        if run.name not in self._artifacts:
            self._artifacts[run.name] = load_artifact(find_artifact(run.run_dir))
        return self._artifacts[run.name]

    def _shared(self, entry: StudyEntry, seed: int) -> tuple[StageCost, float]:
        """The cost that an entry's targets share, and the FLOPs in it that trained ancestors."""
        cost, ancestors = StageCost(), 0.0
        for run in self.graph.lineage(entry, seed) if self.graph.parent_of(entry, seed) else ():
            own = condense_cost(run, self._artifact(run).arch)
            cost += own
            ancestors += own.flops if run.module == settings.MODULES["train"] else 0.0
        return cost, ancestors

    def _ancestor(self, results: Results, entry: StudyEntry) -> None:
        from fine_dist.artifacts.load import load_model

        study = self.study
        parents = [parent for seed in study.seeds if (parent := self._parent(entry, seed))]
        if not parents:
            return
        costs = [self._shared(entry, seed)[0] for seed in study.seeds]
        run, artifact = parents[0]
        models = [self.measuring.parent(entry, seed) for seed in study.seeds]
        numbers = [self.measuring.numbers(model) for model in models if model is not None]
        model, _ = load_model(run.run_dir)
        results.ancestors[entry.name] = Ancestor(
            name=artifact.arch.name,
            layers=artifact.arch.num_layers,
            steps=costs[0].steps,
            seconds=sum(c.seconds for c in costs) / len(costs),
            held_out_loss=sum(n["held_out_loss"] for n in numbers) / len(numbers),
            params=sum(p.numel() for p in model.parameters()),
            stored=sum(t.numel() for t in artifact.tensors.values()),
            samples=costs[0].samples,
            flops=costs[0].flops,
            fd_classifier=numbers[0]["fd_classifier"],
        )
        if entry.name == study.main:
            for matrix, table in settings.depth_tables(run.run_dir).items():
                results.add_table("learngene", matrix, table)
        if entry.name == study.main or entry.name in study.sample_entries:
            kind = "learngene" if entry.condense else "ancestor"
            caption = f"{kind} of {results.name_of(entry.name)}, {artifact.arch.num_layers} layers"
            if self._has_samples(entry):
                image = self._samples(entry, model)
                results.pictures.append(Picture(image=image, caption=caption, target=artifact.arch.num_layers))

    # --- targets -----------------------------------------------------------------------------------------------------

    def _target(self, results: Results, entry: StudyEntry, depth: int, seed: int) -> None:
        """All states of one target: untrained, initialized, trained."""
        from fine_dist.artifacts.load import find_artifact, load_model
        from fine_dist.model.artifact import load_artifact

        shared, ancestors = self._shared(entry, seed)
        before, common = StageCost(), {"method": entry.name, "target": depth, "seed": seed}
        paid = {
            "steps_condense": shared.steps, "samples_condense": shared.samples, "flops_condense": shared.flops,
            "flops_ancestor": ancestors, "seconds_condense": shared.seconds,
        }  # fmt: skip
        numbers = [self.measuring.numbers(model) for model in self.measuring.models(entry, depth, seed)]
        sampled = seed == self.study.seeds[0] and self._has_samples(entry, depth)
        if entry.init:
            run = self.graph.init(entry, seed)
            folder = settings.target_folder(run.config, depth)
            artifact = load_artifact(find_artifact(folder))
            before, trained = init_cost(run, folder, depth)
            own = sum(t.numel() for t in artifact.tensors.values())
            initialized = numbers.pop(0)
            if entry.init.final:
                points = self._points(entry, run, folder / "metrics.jsonl")
                stored = {"stored": own, "trained": trained}
                self._final_stage(results, points, before, common | paid | stored, initialized)
            else:
                results.add(
                    stage="init", step=0, steps_init=before.steps, samples=before.samples, flops=before.flops,
                    seconds=before.seconds, stored=own, trained=trained, **common, **paid, **initialized,
                )  # fmt: skip
            if sampled:
                image = self._samples(entry, load_model(folder)[0])
                step = before.steps if entry.init.final else 0
                results.pictures.append(Picture(image=image, method=entry.name, target=depth, step=step))
            if seed == self.study.seeds[0] and entry.name == self.study.main:
                for matrix, table in settings.depth_tables(folder).items():
                    results.add_table(f"target {depth}", matrix, table)
        elif sampled and entry.shell == "inherited":
            image = self._samples(entry, self.measuring.untrained_model(entry, depth, seed))
            results.pictures.append(Picture(image=image, method=entry.name, target=depth, step=0))
        for variant, loss in self.measuring.untrained(entry, depth, seed).items():
            results.add(**common, **paid, variant=variant, stage="init", step=0, held_out_loss=loss)
        self._trained(results, entry, depth, seed, before, common | paid, numbers, sampled)

    def _points(self, entry: StudyEntry, run: StudyRun, metrics: Path) -> dict[int, float]:
        """Held-out losses by step during a run; none where it measured fewer samples than the study does, because the
        mean over other samples is another number."""
        config = run.config
        data = next((domain.data for domain in getattr(config, "domains", {}).values()), config.data)
        if data.held_out_samples < self.measuring.held_out_count(entry):
            return {}
        return {row["step"]: row["held_out_loss"] for row in read_rows(metrics) if "held_out_loss" in row}

    def _final_stage(
        self, results: Results, points: dict[int, float], cost: StageCost, common: dict[str, Any], end: dict[str, Any]
    ) -> None:
        """The curve of a target whose stage 2 is all its training."""
        for step, loss in sorted((points | {cost.steps: end["held_out_loss"]}).items()):
            now, last = cost.share(step), step == cost.steps
            results.add(
                stage="train", step=step, held_out_loss=loss, **_distances(end if last else {}), end=last,
                steps_train=step, samples=now.samples, flops=now.flops, seconds=now.seconds, **common,
            )  # fmt: skip

    def _trained(
        self, results: Results, entry: StudyEntry, depth: int, seed: int, before: StageCost, common: dict[str, Any],
        ends: list[dict[str, Any]], sampled: bool,
    ) -> None:  # fmt: skip
        """The curves of a target's runs of stage 3, and the measurements of the models they ended with."""
        from fine_dist.artifacts.load import load_model

        runs = self.graph.train(entry, depth, seed)
        if not runs:
            return
        model, _ = load_model(runs[0].run_dir)
        size = sum(p.numel() for p in model.parameters())
        results.target_params[depth] = max(size, results.target_params.get(depth, 0))
        spent = StageCost()
        ended = {run.steps for run in runs}
        for run, cost, end in zip(runs, train_cost(runs, model.arch), ends):
            start = spent if run.grows else StageCost()
            points = self._points(entry, run, run.run_dir / "metrics.jsonl")
            if run is not runs[-1] and not run.grows and len(runs) > 1:
                points = {}  # of several runs with schedules of their own, the longest gives the curve
            points = {s: loss for s, loss in points.items() if s not in ended} | {run.steps: end["held_out_loss"]}
            for step, loss in sorted(points.items()):
                if run.grows and step <= start.steps:
                    continue  # measured by the shorter run already
                now, last = before + start + cost.share(step - start.steps), step == run.steps
                results.add(
                    stage="train", step=step, held_out_loss=loss, **_distances(end if last else {}), end=last,
                    steps_init=before.steps, steps_train=step, samples=now.samples, flops=now.flops,
                    seconds=now.seconds, stored=size, trained=size, **common,
                )  # fmt: skip
            spent = start + cost
            if sampled:
                image = self._samples(entry, load_model(run.run_dir)[0])
                results.pictures.append(Picture(image=image, method=entry.name, target=depth, step=run.steps))

    # --- sample grids ------------------------------------------------------------------------------------------------

    def _has_samples(self, entry: StudyEntry, depth: int | None = None) -> bool:
        study = self.study
        wanted = not study.sample_entries or entry.name in study.sample_entries
        deep = depth is None or not study.sample_depths or depth in study.sample_depths
        return bool(study.pictures) and wanted and deep

    def _samples(self, entry: StudyEntry, model: Any) -> Tensor:
        """A grid of samples: the same noise and labels for every model of the study."""
        return _grid(self.study, self.measuring.samples(entry, model), model.arch.num_classes)


def real_images(study: StudyConfig) -> Picture:
    """Held-out real images in the order of the sample grids: the labels in turn."""
    import torch

    from fine_dist.data.stream import read_all

    images, labels = read_all(study.shards_of(next(iter(study.data))).held_out)
    classes = labels.unique()
    each = max(1, study.pictures // len(classes))
    columns = [(labels == label).nonzero().flatten()[:each] for label in classes]
    order = torch.tensor([int(column[i]) for i in range(each) for column in columns if i < len(column)])
    return Picture(image=_grid(study, images[order], len(classes)), caption="held-out real images")


def _grid(study: StudyConfig, images: Tensor, num_classes: int) -> Tensor:
    from fine_dist.sampling.image_grid import tile_images

    low, high = (1.0, -1.0) if study.invert_colors else (-1.0, 1.0)
    columns = num_classes * max(1, COLUMNS // num_classes) if num_classes <= 2 * COLUMNS else COLUMNS
    return tile_images(images[:, :3], columns, low=low, high=high, zoom=max(1, 48 // images.shape[-1]), gap=2)


def _distances(numbers: dict[str, Any]) -> dict[str, float | None]:
    return {key: numbers.get(key) for key in ("fd_classifier", "accuracy")}


def machine() -> dict[str, Any]:
    """The machine and the versions, for the report's last section."""
    from fine_dist.engine.run_dir import describe_environment

    facts = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts.pop("versions").items())
    return {"processor": platform.machine(), **{k: v for k, v in facts.items() if k != "host"}, "versions": versions}
