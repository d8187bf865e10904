"""From the run directories of a finished study to the measurements and sample grids of its report."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.locate import find_artifact
from fine_dist.core.errors import RunDirError
from fine_dist.core.regular_files import read_rows
from fine_dist.data.stream import read_all
from fine_dist.engine.run_cost import RunCost
from fine_dist.engine.run_dir import RunDir, describe_environment
from fine_dist.model.artifact import Artifact, load_artifact
from fine_dist.sampling.image_grid import tile_images
from fine_dist.study import settings
from fine_dist.study.config import StudyConfig, StudyEntry
from fine_dist.study.graph import Graph, StudyRun
from fine_dist.study.measuring import DISTANCES, UNTRAINED, Measuring, has_untrained, measure_ahead
from fine_dist.study.report.measurements import Ancestor, Picture
from fine_dist.study.report.results import Results

MIN_ACCURACY = 0.9
"""Held-out accuracy of a classifier below which a note says that its features mean little."""
SMALL, SHOWN = 32, 44
"""Images with fewer pixels on a side than `SMALL` are enlarged smoothly to about `SHOWN` pixels for a grid."""


def collect_results(graph: Graph) -> Results:
    """Measure the models of a study whose runs are all done, and combine the results with the records of the runs."""
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
        """The run that produced the parent, and its artifact, which is read once. None without a parent."""
        parent = self.graph.parent_of(entry, seed)
        return (parent[0], self._artifact(parent[0])) if parent else None

    def _artifact(self, run: StudyRun) -> Artifact:
        # Many targets have the same parent, and hashing its tensors each time would take longer than the report.
        if run.name not in self._artifacts:
            self._artifacts[run.name] = load_artifact(find_artifact(run.run_dir))
        return self._artifacts[run.name]

    def _shared(self, entry: StudyEntry, seed: int) -> tuple[RunCost, float]:
        """(cost that an entry's targets share, the part of its FLOPs spent on training ancestors)."""
        cost, ancestors = RunCost(), 0.0
        for run in self.graph.lineage(entry, seed):
            own = cost_of(run.run_dir)
            cost = together(cost, own)
            ancestors += own.flops if run.module == settings.MODULES["train"] else 0.0
        return cost, ancestors

    def _ancestor(self, results: Results, entry: StudyEntry) -> None:
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
        shared, ancestors = self._shared(entry, seed)
        before, common = RunCost(), {"method": entry.name, "target": depth, "seed": seed}
        paid = {
            "steps_condense": shared.steps, "samples_condense": shared.samples, "flops_condense": shared.flops,
            "flops_ancestor": ancestors, "seconds_condense": shared.seconds,
        }  # fmt: skip
        numbers = [self.measuring.numbers(model) for model in self.measuring.models(entry, depth, seed)]
        sampled = seed == self.study.seeds[0] and self._has_samples(entry, depth)
        if entry.init:
            run = self.graph.init(entry, seed)
            folder = settings.target_folder(run.config, depth)
            before = cost_of(folder)
            initialized = numbers.pop(0)
            if entry.init.final:
                points = self._points(entry, run, folder / "metrics.jsonl")
                stored = {"stored": before.stored, "trained": before.trained}
                self._final_stage(results, points, before, common | paid | stored, initialized)
            else:
                results.add(
                    stage="init", step=0, steps_init=before.steps, samples=before.samples, flops=before.flops,
                    seconds=before.seconds, stored=before.stored, trained=before.trained,
                    **common, **paid, **initialized,
                )  # fmt: skip
            if sampled:
                image = self._samples(entry, load_model(folder)[0])
                step = before.steps if entry.init.final else 0
                results.pictures.append(Picture(image=image, method=entry.name, target=depth, step=step))
            if seed == self.study.seeds[0] and entry.name == self.study.main:
                for matrix, table in settings.depth_tables(folder).items():
                    results.add_table(f"target {depth}", matrix, table)
        if sampled and has_untrained(entry):
            image = self._samples(entry, self.measuring.untrained_model(entry, depth, seed))
            variant = UNTRAINED if entry.init else ""
            results.pictures.append(Picture(image=image, method=entry.name, variant=variant, target=depth, step=0))
        for variant, untrained in self.measuring.untrained(entry, depth, seed).items():
            results.add(**common, **paid, variant=variant, stage="init", step=0, **untrained)
        self._trained(results, entry, depth, seed, before, common | paid, numbers, sampled)

    def _points(self, entry: StudyEntry, run: StudyRun, metrics: Path) -> dict[int, float]:
        """Held-out losses by step during a run; empty if the run used fewer held-out samples than the study, because
        the means would not be comparable."""
        config = run.config
        data = next((domain.data for domain in getattr(config, "domains", {}).values()), config.data)
        if data.held_out_samples < self.measuring.held_out_count(entry):
            return {}
        return {row["step"]: row["held_out_loss"] for row in read_rows(metrics) if "held_out_loss" in row}

    def _final_stage(
        self, results: Results, points: dict[int, float], cost: RunCost, common: dict[str, Any], end: dict[str, Any]
    ) -> None:
        """Add the curve of a target whose stage 2 is its only training."""
        for step, loss in sorted((points | {cost.steps: end["held_out_loss"]}).items()):
            now, last = part_of(cost, step), step == cost.steps
            results.add(
                stage="train", step=step, held_out_loss=loss, **_distances(end if last else {}), end=last,
                steps_train=step, samples=now.samples, flops=now.flops, seconds=now.seconds, **common,
            )  # fmt: skip

    def _trained(
        self, results: Results, entry: StudyEntry, depth: int, seed: int, before: RunCost, common: dict[str, Any],
        ends: list[dict[str, Any]], sampled: bool,
    ) -> None:  # fmt: skip
        """Add the curves of a target's runs of stage 3, with the measurements of their final models."""
        runs = self.graph.train(entry, depth, seed)
        if not runs:
            return
        model, _ = load_model(runs[0].run_dir)
        size = sum(p.numel() for p in model.parameters())
        results.target_params[depth] = max(size, results.target_params.get(depth, 0))
        ended, measured = {run.steps for run in runs}, 0
        for run, end in zip(runs, ends):
            cost = cost_of(run.run_dir)
            points = self._points(entry, run, run.run_dir / "metrics.jsonl")
            if run is not runs[-1] and not run.grows and len(runs) > 1:
                points = {}  # of several runs with separate schedules, only the longest contributes its curve
            points = {s: loss for s, loss in points.items() if s not in ended} | {run.steps: end["held_out_loss"]}
            for step, loss in sorted(points.items()):
                if run.grows and step <= measured:
                    continue  # already added from the shorter run
                now, last = together(before, part_of(cost, step)), step == run.steps
                results.add(
                    stage="train", step=step, held_out_loss=loss, **_distances(end if last else {}), end=last,
                    steps_init=before.steps, steps_train=step, samples=now.samples, flops=now.flops,
                    seconds=now.seconds, stored=size, trained=size, **common,
                )  # fmt: skip
            measured = run.steps
            if sampled:
                image = self._samples(entry, load_model(run.run_dir)[0])
                results.pictures.append(Picture(image=image, method=entry.name, target=depth, step=run.steps))

    # --- sample grids ------------------------------------------------------------------------------------------------

    def _has_samples(self, entry: StudyEntry, depth: int | None = None) -> bool:
        study = self.study
        has_entry = not study.sample_entries or entry.name in study.sample_entries
        has_depth = depth is None or not study.sample_depths or depth in study.sample_depths
        return bool(study.pictures) and has_entry and has_depth

    def _samples(self, entry: StudyEntry, model: Any) -> Tensor:
        """A grid of samples: the same noise and labels for every model of the study."""
        return _grid(self.study, self.measuring.samples(entry, model))


def real_images(study: StudyConfig) -> Picture:
    """A grid of held-out real images, with the labels in the order of the sample grids."""
    images, labels = read_all(study.shards_of(next(iter(study.data))).held_out)
    classes = labels.unique()
    each = max(1, study.pictures // len(classes))
    columns = [(labels == label).nonzero().flatten()[:each] for label in classes]
    order = torch.tensor([int(column[i]) for i in range(each) for column in columns if i < len(column)])
    return Picture(image=_grid(study, images[order]), caption="held-out real images")


def _grid(study: StudyConfig, images: Tensor) -> Tensor:
    """Images [N, C, H, H] as one grid. Small images are enlarged before tiling; a viewer would blur across the gaps."""
    low, high = (1.0, -1.0) if study.invert_colors else (-1.0, 1.0)
    shown = images[:, : 3 if images.shape[1] >= 3 else 1].float()
    if shown.shape[-1] < SMALL:
        shown = F.interpolate(shown, scale_factor=max(1, SHOWN // shown.shape[-1]), mode="bicubic").clamp(-1, 1)
    return tile_images(shown, study.sample_columns, low=low, high=high, gap=3)


def cost_of(folder: Path) -> RunCost:
    """The cost that a finished run or target recorded in its DONE.json.

    Raises:
        RunDirError: DONE.json is missing, damaged, or of an older version without costs.
    """
    done = RunDir(folder).done
    if done is None:
        raise RunDirError(f"{folder} is not finished: it has no DONE.json; run the same command again")
    try:
        return RunCost.from_json(done)
    except (KeyError, TypeError):
        raise RunDirError(f"{folder}/DONE.json records no cost; delete the folder and run again") from None


def together(a: RunCost, b: RunCost) -> RunCost:
    """The cost of two stages in sequence: their sum, with the stored and trained numbers of the second."""
    return RunCost(
        a.steps + b.steps, a.samples + b.samples, a.flops + b.flops, a.seconds + b.seconds, b.stored, b.trained
    )


def part_of(cost: RunCost, steps: int) -> RunCost:
    """The part of a run's cost that belongs to its first `steps` steps."""
    share = steps / cost.steps if cost.steps else 0.0
    return RunCost(
        steps, round(cost.samples * share), cost.flops * share, cost.seconds * share, cost.stored, cost.trained
    )


def _distances(numbers: dict[str, Any]) -> dict[str, float | None]:
    return {key: numbers.get(key) for key in DISTANCES}


def machine() -> dict[str, Any]:
    """Facts about the machine and library versions, for the report's last section."""
    facts = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts.pop("versions").items())
    return {"processor": platform.machine(), **{k: v for k, v in facts.items() if k != "host"}, "versions": versions}
