"""What the demo's run directories say, as the rows and pictures of its report. Every number is read or measured."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fine_dist.demo import Plan, Work
    from fine_dist.evaluate import Measures
    from fine_dist.report import Results

SHOWN = 40
"""Images of a sample grid: four rows of the ten digits."""


def metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that is still being written is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def train_features(root: Path) -> float:
    """The digits classifier in ROOT/features, trained once; its held-out accuracy."""
    import torch

    from fine_dist.data.digits import digits
    from fine_dist.errors import ArtifactError
    from fine_dist.metrics.features import load_classifier, save_classifier, train_classifier

    folder = root / "features"
    try:
        return load_classifier(folder).accuracy
    except ArtifactError:
        images, labels, held_images, held_labels = (
            torch.as_tensor(part) for split in ("train", "held_out") for part in digits(split)
        )
        trained = train_classifier(images, labels, (held_images, held_labels))
        save_classifier(folder, trained)
        return trained.accuracy


def collect(plan: Plan, accuracy: float) -> Results:
    """Measure what the jobs made and put it with what they wrote down."""
    from fine_dist.config import DataConfig
    from fine_dist.evaluate import EvaluateConfig, Measures
    from fine_dist.report import Results

    config, root = plan.config, Path(plan.config.run_dir)
    evaluate = EvaluateConfig(
        data=DataConfig(shards=str(root / "data" / "train"), held_out=str(root / "data" / "held_out")),
        features=str(root / "features"),
        samples=config.samples,
        sampler=plan.works[0].config.sampler,  # type: ignore[attr-defined]
    )
    measure = Measures(evaluate)
    results = Results(
        title="FINE on the embedded digits",
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        classifier_accuracy=accuracy,
        frechet_floor=measure.floor,
        frechet_samples=config.samples,
        config=config.model_dump(mode="json"),
        machine=machine(),
    )
    _ancestor(plan, measure, results)
    for seed in range(config.seeds):
        for depth in config.depths:
            _initialised(plan, measure, results, depth, seed)
            _starts(plan, measure, results, depth, seed)
    for work in sorted(plan.works, key=lambda work: work.name):  # FINE's pictures before scratch's
        if work.module.endswith("train"):
            _trained(plan, work, measure, results)
    _real_images(root, results)
    return results


def _ancestor(plan: Plan, measure: Measures, results: Results) -> None:
    import torch

    from fine_dist.model.artifact import load_artifact
    from fine_dist.model.dit import DiT
    from fine_dist.model.zoo import MATRICES
    from fine_dist.report import Ancestor
    from fine_dist.stages import load_model

    works = [work for work in plan.works if work.module.endswith("condense")]
    facts = [json.loads((work.run_dir / "DONE.json").read_text()) for work in works]
    artifact = load_artifact(works[0].run_dir / "learngene")
    model, _ = load_model(works[0].run_dir)
    results.ancestor = Ancestor(
        name=artifact.arch.name,
        layers=artifact.arch.num_layers,
        steps=works[0].steps,
        seconds=sum(f["seconds"] for f in facts) / len(facts),
        held_out_loss=sum(f["losses"]["held_out_loss"] for f in facts) / len(facts),
        params=sum(p.numel() for p in model.parameters()),
        learngene_params=sum(t.numel() for t in artifact.tensors.values()),
        frechet=measure.frechet(model, "learngene"),
    )
    for kind in MATRICES:
        table = torch.stack([artifact.tensors[f"blocks.{i}.{kind}.sigma"] for i in range(artifact.arch.num_layers)])
        results.add_sigma("learngene", kind, table)
    for depth in plan.config.depths:
        with torch.device("meta"):
            results.target_params[depth] = sum(p.numel() for p in DiT(artifact.arch.with_depth(depth)).parameters())
    _picture(results, measure, model, "condensed ancestor", target=artifact.arch.num_layers, step=0, seed=0)


def _initialised(plan: Plan, measure: Measures, results: Results, depth: int, seed: int) -> None:
    """The target after sigma was trained, before any other training."""
    from fine_dist.demo import target_folder
    from fine_dist.stages import load_model

    folder = target_folder(plan.config, depth, seed)
    model, _ = load_model(folder)
    numbers = measure(model, f"initialised L{depth}")
    results.add(
        method="fine", target=depth, seed=seed, stage="init", step=0, steps_init=plan.config.init_steps,
        seconds=init_seconds(folder), **numbers,
    )  # fmt: skip
    if seed == 0:
        import torch

        from fine_dist.model.artifact import load_artifact
        from fine_dist.model.zoo import MATRICES
        from fine_dist.stages import find_artifact

        tensors = load_artifact(find_artifact(folder)).tensors
        for kind in MATRICES:
            results.add_sigma(
                f"target {depth}", kind, torch.stack([tensors[f"blocks.{i}.{kind}.sigma"] for i in range(depth)])
            )


def _starts(plan: Plan, measure: Measures, results: Results, depth: int, seed: int) -> None:
    """What each start of sigma is worth without any training."""
    import torch

    from fine_dist.methods import FineConfig, build
    from fine_dist.model.artifact import load_artifact
    from fine_dist.model.depth import STARTS

    artifact = load_artifact(Path(plan.config.run_dir) / f"condense-s{seed}" / "learngene")
    for start in STARTS:
        method = build(FineConfig.model_validate({"sigma": start}))
        model = method.descend(artifact, artifact.arch.with_depth(depth), torch.Generator().manual_seed(seed))
        loss = measure.held_out(model.eval())["held_out_loss"]  # type: ignore[misc]
        results.add(method="fine", variant=start, target=depth, seed=seed, stage="init", step=0, held_out_loss=loss)


def _trained(plan: Plan, work: Work, measure: Measures, results: Results) -> None:
    """The curve of one training job, and the distance of the model it ended with."""
    from fine_dist.demo import target_folder
    from fine_dist.stages import load_model

    method, depth, seed = (work.name.split("-")[0], int(work.name.split("-L")[1].split("-")[0]), int(work.name[-1]))
    before, spent = 0.0, 0
    if method == "fine":
        folder = target_folder(plan.config, depth, seed)
        before, spent = init_seconds(folder), plan.config.init_steps
    shared, shared_s = (plan[work.grows].steps, train_seconds(plan[work.grows])) if work.grows else (0, 0.0)
    seconds = train_seconds(work)
    model, _ = load_model(work.run_dir)
    distance = measure.frechet(model, work.name)
    for row in metrics(work.run_dir / "metrics.jsonl"):
        if "held_out_loss" not in row or row["step"] <= shared:
            continue  # in the shorter run's rows
        last = row["step"] == work.steps
        share = (row["step"] - shared) / (work.steps - shared)
        results.add(
            method=method, target=depth, seed=seed, stage="train", step=row["step"],
            held_out_loss=row["held_out_loss"], frechet=distance if last else None,
            steps_init=spent, steps_train=row["step"], seconds=before + shared_s + seconds * share,
        )  # fmt: skip
    if seed == 0:
        _picture(results, measure, model, "", method=method, target=depth, step=work.steps, seed=seed)


def train_seconds(work: Work) -> float:
    """Wall time of a finished training job, without what it inherited."""
    return float(json.loads((work.run_dir / "DONE.json").read_text())["seconds"])


def init_seconds(folder: Path) -> float:
    """The share of a pack's wall time that one target took."""
    done = json.loads((folder / "DONE.json").read_text())
    return float(done["seconds"])


def _picture(results: Results, measure: Measures, model: Any, caption: str, seed: int, **fields: Any) -> None:
    from fine_dist.report import Picture

    images = measure.draw(model, SHOWN, "pictures")
    results.pictures.append(Picture(image=ink(images), caption=caption, **{"method": "fine", **fields}))


def ink(images: Any) -> Any:
    """A picture of digits, dark ink on white paper, ten a row."""
    from fine_dist.diffusion.sample import grid

    return grid(images, 10, low=1.0, high=-1.0, zoom=6, gap=2)


def _real_images(root: Path, results: Results) -> None:
    import torch

    from fine_dist.data.stream import read_all
    from fine_dist.report import Picture

    images, labels = read_all(str(root / "data" / "held_out"))
    order = torch.cat([(labels == digit).nonzero().flatten()[: SHOWN // 10] for digit in range(10)])
    order = order.reshape(10, -1).T.flatten()
    results.pictures.append(Picture(image=ink(images[order]), caption="held-out real scans"))


def machine() -> dict[str, Any]:
    """The machine and versions, for the report's last section."""
    from fine_dist.engine.run_dir import describe_environment

    facts = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts.pop("versions").items())
    return {"processor": platform.machine(), **{k: v for k, v in facts.items() if k != "host"}, "versions": versions}
