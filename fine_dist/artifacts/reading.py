"""Reads a model of any format as an `Artifact`: an artifact, a file in DiT's format, a diffusers folder, a hub name.

For another project's model, `extra["imported"]` holds the origin of its weights.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fine_dist.artifacts.diffusers_folder import read_diffusers
from fine_dist.artifacts.dit_pt import read_dit
from fine_dist.artifacts.imported import UNKNOWN_LICENCE, ImportedModel
from fine_dist.artifacts.layouts import SUFFIXES, is_diffusers_folder
from fine_dist.artifacts.locate import find_artifact, is_foreign
from fine_dist.artifacts.settings import NO_HINTS, HintsConfig
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import SCRATCH
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import TENSORS, Artifact, Weights, load_artifact, read_manifest

INHERITED_FACTS = ("licence", "sampler", "codec", "class_names", "diffusion")
"""Keys of a manifest's `extra` that artifacts made from this one inherit, unless they have their own."""


class SourceFacts(NamedTuple):
    """A source's metadata: kind, architecture, sha256 of its tensors, and `extra` of its manifest."""

    kind: str
    arch: Arch
    hash: str
    extra: dict[str, Any]


def read_artifact(source: str | Path, hints: HintsConfig = NO_HINTS, weights: Weights = "ema") -> Artifact:
    """Read a source with its tensors. For a target these are only the tensors that differ from its parent's.

    Args:
        source: A path or a hub name.
        hints: Facts that another project's file does not state.
        weights: Which weights to read if there are both: the averaged (`ema`) or those of the last step (`raw`).

    Raises:
        ArtifactError: The source cannot be read.
    """
    if not is_foreign(source):
        return load_artifact(find_artifact(source), weights=weights)
    return _read_foreign(str(source), hints, weights)


def facts_of(source: str | Path, hints: HintsConfig = NO_HINTS) -> SourceFacts:
    """Return a source's metadata. Another project's file is read completely once, and the result is cached.

    Raises:
        ArtifactError: The source cannot be read.
    """
    if is_foreign(source):
        path = Path(expand_path(str(source)))
        return _facts(str(source), hints.model_dump_json(), path.stat().st_mtime_ns if path.exists() else 0)
    manifest = read_manifest(find_artifact(source))
    arch = Arch.model_validate(manifest["arch"])
    return SourceFacts(manifest["kind"], arch, str(manifest["sha256"][TENSORS]), manifest["extra"])


def hash_of(source: str | Path, hints: HintsConfig = NO_HINTS) -> str:
    """Return the sha256 of a source's tensors, which identifies it independently of its path."""
    return facts_of(source, hints).hash


def inherited_facts(extra: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a parent's `extra` that an artifact made from it inherits."""
    facts = {name: extra[name] for name in INHERITED_FACTS if extra.get(name) not in (None, (), [], {})}
    licence = licence_of(extra)
    return {**facts, "licence": licence} if licence else facts


def licence_of(extra: dict[str, Any]) -> str | None:
    """Return the licence in `extra` of a manifest, that of the weights or else of their ancestor; None without one."""
    return extra.get("licence") or (extra.get("ancestor") or {}).get("licence")


def import_model(source: str | Path, hints: HintsConfig = NO_HINTS, weights: Weights = "ema") -> ImportedModel:
    """Read another project's model: a tensor file in DiT's format, a diffusers folder, or a hub name.

    Raises:
        ArtifactError: The source is none of these, is damaged or of another model, or cannot be downloaded.
    """
    path = Path(expand_path(str(source)))
    if path.is_dir():
        if is_diffusers_folder(path):
            return read_diffusers(path, hints)
        raise ArtifactError(
            f"{path} holds no model: neither a manifest.json of this project's nor diffusers' model_index.json or "
            "config.json"
        )
    if path.exists() or path.suffix in SUFFIXES:
        return read_dit(path, hints, weights)
    if path.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise ArtifactError(f"{source}: no such file or folder, and a name on the hub looks like OWNER/MODEL")
    return read_diffusers(str(source), hints)


@lru_cache(maxsize=8)
def _facts(source: str, hints: str, mtime_ns: int) -> SourceFacts:
    """Read the metadata of another project's model. `mtime_ns` is only a key of the cache: changed files are reread."""
    artifact = _read_foreign(source, HintsConfig.model_validate_json(hints), "ema")
    return SourceFacts(artifact.kind, artifact.arch, artifact.hash, artifact.extra)


def _read_foreign(source: str, hints: HintsConfig, weights: Weights) -> Artifact:
    imported = import_model(source, hints, weights)
    extra: dict[str, Any] = {
        "imported": {**imported.provenance(), "hints": hints.model_dump(), "notes": list(imported.notes)},
        "diffusion": imported.diffusion.model_dump(),
    }
    if imported.licence != UNKNOWN_LICENCE:
        extra["licence"] = imported.licence
    if imported.class_names:
        extra["class_names"] = list(imported.class_names)
    if imported.scaling_factor is not None:
        extra["codec"] = {"name": "vae", "scaling_factor": imported.scaling_factor}
    method = SCRATCH.model_dump(mode="json")
    return Artifact(Path(source), "model", method, imported.arch, imported.state, extra, imported.sha256)
