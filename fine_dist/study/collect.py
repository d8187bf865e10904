"""What a study's run directories say, as the rows and pictures of its report. Every number is read or measured."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fine_dist.core.files import read_rows
from fine_dist.study import settings
from fine_dist.study.config import Entry
from fine_dist.study.costs import Cost, condense_cost, init_cost, train_cost
from fine_dist.study.environment import machine
from fine_dist.study.measuring import Measuring, measure_ahead
from fine_dist.study.pictures import pictured, real, samples
from fine_dist.study.report.results import Ancestor, Results

if TYPE_CHECKING:
    from fine_dist.model.artifact import Artifact
    from fine_dist.study.graph import Graph, Run


ENOUGH = 0.9
"""Held-out accuracy of a classifier below which its features are not trusted."""


def collect(graph: Graph) -> Results:
    """Measure what the runs made and put it with what they wrote down. Every run must be done."""
    collector = _Collector(graph)
    measure_ahead(collector.measuring)
    return collector.collect()


class _Collector:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.study = graph, graph.study
        self.measuring = Measuring(graph)
        accuracy = self.measuring.accuracy
        if accuracy is not None:
            low = "" if accuracy >= ENOUGH else f"; below {ENOUGH}, so that its Fréchet distances say little"
            print(f"features: a classifier of this data, held-out accuracy {accuracy:.4f}{low}", flush=True)
        self._artifacts: dict[str, Artifact] = {}

    def collect(self) -> Results:
        study = self.study
        floor = self.measuring.on(next(iter(study.data))).references.floors().get("fd_classifier")
        results = Results(
            title=study.title,
            created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            dataset=study.dataset,
            command=study.command,
            main=study.main,
            baseline=study.baseline,
            steps=study.steps,
            labels={**{e.name: settings.label_of(e) for e in study.used}, **study.labels},
            colours={e.name: e.colour for e in study.used if e.colour},
            claims=list(study.claims),
            sections=study.sections,
            tables_note=study.tables_note,
            classifier_accuracy=self.measuring.accuracy,
            frechet_floor=floor,
            frechet_samples=study.samples if floor is not None else None,
            config=self._said(),
            machine=machine(),
        )
        for entry in sorted(study.rows, key=lambda e: e.name != study.main):
            self._ancestor(results, entry)
            for depth in study.depths_of(entry):
                for seed in study.seeds:
                    self._target(results, entry, depth, seed)
        if study.pictures:
            results.pictures.append(real(study))
        return results

    def _said(self) -> dict[str, Any]:
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

    # --- an entry --------------------------------------------------------------------------------------------------

    def _parent(self, entry: Entry, seed: int) -> tuple[Run, Artifact] | None:
        """The run that made what the entry's targets come from, and its product; read once."""
        found = self.graph.parent_of(entry, seed)
        if found is None:
            return None
        return found[0], self._artifact(found[0])

    def _artifact(self, run: Run) -> Artifact:
        from fine_dist.artifacts.load import find_artifact
        from fine_dist.model.artifact import load_artifact

        if run.name not in self._artifacts:
            self._artifacts[run.name] = load_artifact(find_artifact(run.run_dir))
        return self._artifacts[run.name]

    def _shared(self, entry: Entry, seed: int) -> Cost:
        """What an entry's targets share: stage 1 of what they come from, and all training of its ancestors."""
        found = self._parent(entry, seed)
        if found is None:
            return Cost()
        cost = Cost()
        for run in self.graph.lineage(entry, seed):
            cost += condense_cost(run, self._artifact(run).arch)
        return cost

    def _ancestor(self, results: Results, entry: Entry) -> None:
        """What the entry's targets come from."""
        from fine_dist.artifacts.load import load_model

        found = [self._parent(entry, seed) for seed in self.study.seeds]
        parents = [parent for parent in found if parent is not None]
        if not parents:
            return
        costs = [self._shared(entry, seed) for seed in self.study.seeds]
        run, artifact = parents[0]
        models = [self.measuring.parent(entry, seed) for seed in self.study.seeds]
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
            frechet=numbers[0]["frechet"],
        )
        if entry.name == self.study.main:
            for matrix, table in settings.depth_tables(run.run_dir).items():
                results.add_table("learngene", matrix, table)
        if entry.name == self.study.main or entry.name in self.study.pictured:
            who = (
                "condensed ancestor"
                if entry.name == self.study.main
                else f"what {results.label(entry.name)} comes from"
            )
            self._picture(results, entry, run.run_dir, caption=who, target=artifact.arch.num_layers)

    def _target(self, results: Results, entry: Entry, depth: int, seed: int) -> None:
        """All states of one target: untrained, initialised, trained."""
        from fine_dist.artifacts.load import find_artifact
        from fine_dist.model.artifact import load_artifact

        shared = self._shared(entry, seed)
        before, common = Cost(), {"method": entry.name, "target": depth, "seed": seed}
        paid = {
            "steps_condense": shared.steps, "samples_condense": shared.samples,
            "flops_condense": shared.flops, "seconds_condense": shared.seconds,
        }  # fmt: skip
        numbers = [self.measuring.numbers(model) for model in self.measuring.models(entry, depth, seed)]
        if entry.init:
            run = self.graph.init(entry, seed)
            folder = settings.target_folder(run.config, depth)
            artifact = load_artifact(find_artifact(folder))
            before, trained = init_cost(run, folder, depth)
            own = sum(t.numel() for t in artifact.tensors.values())
            initialised = numbers.pop(0)
            if entry.init.final:
                points = self._points(entry, run, folder / "metrics.jsonl")
                self._whole(results, points, before, common | paid | {"stored": own, "trained": trained}, initialised)
                if seed == self.study.seeds[0]:
                    self._picture(results, entry, folder, method=entry.name, target=depth, step=before.steps)
                return
            results.add(
                stage="init", step=0, steps_init=before.steps, samples=before.samples, flops=before.flops,
                seconds=before.seconds, stored=own, trained=trained, **common, **paid, **initialised,
            )  # fmt: skip
            if seed == self.study.seeds[0] and entry.name == self.study.main:
                for matrix, table in settings.depth_tables(folder).items():
                    results.add_table(f"target {depth}", matrix, table)
        for variant, loss in self.measuring.untrained(entry, depth, seed).items():
            results.add(**common, variant=variant, stage="init", step=0, held_out_loss=loss)
        self._trained(results, entry, depth, seed, before, common | paid, numbers)

    def _points(self, entry: Entry, run: Run, metrics: Path) -> dict[int, float]:
        """Held-out losses by step while a run trained; none where it asked fewer samples than are measured here, whose
        mean is another number."""
        held_out = self.measuring.of(entry).held_out
        config = run.config
        data = next((domain.data for domain in getattr(config, "domains", {}).values()), config.data)
        if held_out is not None and data.held_out_samples < held_out.samples:
            return {}
        return {row["step"]: row["held_out_loss"] for row in read_rows(metrics) if "held_out_loss" in row}

    def _whole(
        self, results: Results, points: dict[int, float], cost: Cost, common: dict[str, Any], end: dict[str, Any]
    ) -> None:
        """The curve of a target whose stage 2 is all its training, and what the one that is kept is worth."""
        for step, loss in sorted((points | {cost.steps: end["held_out_loss"]}).items()):
            now, last = cost.share(step), step == cost.steps
            results.add(
                stage="train", step=step, held_out_loss=loss, **_distances(end if last else {}),
                steps_train=step, samples=now.samples, flops=now.flops, seconds=now.seconds, **common,
            )  # fmt: skip

    def _trained(
        self, results: Results, entry: Entry, depth: int, seed: int, before: Cost, common: dict[str, Any],
        ends: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        """The curves of a target's training runs, and the distances of the models they ended with."""
        from fine_dist.artifacts.load import load_model

        runs = self.graph.train(entry, depth, seed)
        if not runs:
            return
        model, _ = load_model(runs[0].run_dir)
        size = sum(p.numel() for p in model.parameters())
        results.target_params[depth] = max(size, results.target_params.get(depth, 0))
        spent = Cost()
        for run, cost, end in zip(runs, train_cost(runs, model.arch), ends):
            start = spent if run.grows else Cost()
            points = self._points(entry, run, run.run_dir / "metrics.jsonl") | {run.steps: end["held_out_loss"]}
            for step, loss in sorted(points.items()):
                if run.grows and step <= start.steps:
                    continue  # in the shorter run's rows
                now = before + start + cost.share(step - start.steps)
                results.add(
                    stage="train", step=step, held_out_loss=loss, **_distances(end if step == run.steps else {}),
                    steps_init=before.steps, steps_train=step, samples=now.samples, flops=now.flops,
                    seconds=now.seconds, stored=size, trained=size, **common,
                )  # fmt: skip
            spent = start + cost
            if seed == self.study.seeds[0]:
                self._picture(results, entry, run.run_dir, method=entry.name, target=depth, step=run.steps)

    def _picture(self, results: Results, entry: Entry, folder: Path, **fields: Any) -> None:
        if pictured(self.study, entry):
            results.pictures.append(samples(self.study, self.measuring.of(entry), folder, **fields))


def _distances(numbers: dict[str, Any]) -> dict[str, float | None]:
    return {key: numbers.get(key) for key in ("frechet",)}
