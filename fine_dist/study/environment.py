"""What measurements rest on besides the models: the features of the Fréchet distance, and the machine."""

from __future__ import annotations

import platform
from typing import Any

from fine_dist.study.config import StudyConfig


def features(study: StudyConfig) -> tuple[str | None, float | None]:
    """Folder of the features of the Fréchet distance, and their classifier's held-out accuracy; trained once."""
    from fine_dist.evaluation.classifier import classifier_of_shards, load_classifier

    if study.features is None:
        return None, None
    if study.features != "classifier":
        return study.features, load_classifier(study.features).accuracy
    folder, data = study.root / "features", study.root / next(iter(study.data))
    return str(folder), classifier_of_shards(folder, str(data / "train"), str(data / "held_out")).accuracy


def check_features(study: StudyConfig) -> None:
    """`ArtifactError` when a network's weights are not there: said before hours are spent."""
    from fine_dist.evaluation.classifier import load_classifier

    if study.features not in (None, "classifier"):
        load_classifier(study.features)


def machine() -> dict[str, Any]:
    """The machine and versions, for the report's last section."""
    from fine_dist.engine.run_dir import describe_environment

    facts = describe_environment()
    versions = ", ".join(f"{name} {version}" for name, version in facts.pop("versions").items())
    return {"processor": platform.machine(), **{k: v for k, v in facts.items() if k != "host"}, "versions": versions}
