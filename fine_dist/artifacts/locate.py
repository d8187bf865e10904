"""Where a model comes from: a folder of ours, a run's directory, DiT's `.pt`, diffusers' folder, a name on the hub.

Whatever it is, it is read as an `Artifact`; of another project's, `extra` says under `imported` where it came from.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from fine_dist.core.config import Config, expand_path
from fine_dist.core.errors import ArtifactError
from fine_dist.methods import SCRATCH
from fine_dist.model.arch import Arch

if TYPE_CHECKING:
    from fine_dist.artifacts.imported import Hints
    from fine_dist.model.artifact import Artifact, Weights

ARTIFACT_FOLDERS = ("model", "target", "sigma", "learngene")
"""Folders of a run directory that hold an artifact, in the order in which they are looked for; `sigma` is a target of
earlier versions."""
INHERITED_FACTS = ("licence", "sampler", "codec", "class_names", "diffusion")
"""What a manifest hands on to whatever is made from its artifact, unless that has its own."""


_FOLDERS = ("runs", "models", "data", "checkpoints", "output", "outputs")
"""Folders that people keep models in: a path that begins so is one that is not there yet."""


class HintsConfig(Config):
    """What another project's file may not say of itself; none: as it says, or as is usual."""

    num_heads: int | None = Field(None, ge=1)
    """Attention heads of a state dict whose width is none of DiT's."""
    num_classes: int | None = Field(None, ge=1)
    """Classes without the null label."""
    input_size: int | None = Field(None, ge=1)
    """Side of a latent, where there is no position table."""
    frequency_shift: int | None = Field(None, ge=0, le=1)
    """Time frequencies: 0 as in DiT, 1 as in models trained in diffusers."""
    licence: str | None = None
    """Licence of the weights, as an SPDX name."""


NO_HINTS = HintsConfig()


class Facts(NamedTuple):
    """Of a source, without its tensors. prediction: `noise`, or `velocity` (SiT)."""

    kind: str
    arch: Arch
    hash: str
    prediction: str
    extra: dict[str, Any]


def find_artifact(path: str | Path) -> Path:
    """The artifact of ours in a folder: itself, or the one that lies in a run's directory."""
    folder = Path(expand_path(str(path)))
    found = _own(folder)
    if found is not None:
        return found
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; give a folder that condense, init or train wrote")
    raise ArtifactError(
        f"{folder} holds no model, target or learngene: not a run's directory, or the run is not finished"
    )


def is_foreign(source: str | Path) -> bool:
    """Whether a source is for `interop` to read: a tensor file, a folder of diffusers, or a name on the hub."""
    from fine_dist.artifacts.diffusers_folder import is_diffusers_folder
    from fine_dist.artifacts.tensor_files import SUFFIXES

    path = Path(expand_path(str(source)))
    if path.is_dir():
        return _own(path) is None and is_diffusers_folder(path)
    return path.is_file() or path.suffix in SUFFIXES or is_hub_name(source)


def is_hub_name(source: str | Path) -> bool:
    """Whether it looks like OWNER/MODEL, and neither it nor a folder OWNER is here or usual."""
    text = str(source)
    owner, slash, name = text.partition("/")
    plain = bool(owner and slash and name) and "/" not in name and not text.startswith((".", "~", "$"))
    return plain and owner not in _FOLDERS and not Path(text).exists() and not Path(owner).is_dir()


def exists_locally(source: str | Path) -> bool:
    """Whether there is anything of that name on this machine."""
    return Path(expand_path(str(source))).exists()


def read_artifact(source: str | Path, hints: HintsConfig = NO_HINTS, weights: Weights = "ema") -> Artifact:
    """A source with its tensors; of a target, those that are its own. `ArtifactError` when it cannot be read.

    weights: of a checkpoint that holds both, the averages or the weights themselves.
    """
    from fine_dist.model.artifact import load_artifact

    if not is_foreign(source):
        return load_artifact(find_artifact(source), weights=weights)
    return _imported(str(source), hints, weights)


def facts_of(source: str | Path, hints: HintsConfig = NO_HINTS) -> Facts:
    """What a source is. Of a file of another project's all is read the first time, and remembered."""
    from fine_dist.model.artifact import TENSORS, read_manifest

    if is_foreign(source):
        path = Path(expand_path(str(source)))
        return _facts(str(source), hints.model_dump_json(), path.stat().st_mtime_ns if path.exists() else 0)
    manifest = read_manifest(find_artifact(source))
    extra = manifest["extra"]
    arch = Arch.model_validate(manifest["arch"])
    return Facts(manifest["kind"], arch, str(manifest["sha256"][TENSORS]), "noise", extra)


def hash_of(source: str | Path, hints: HintsConfig = NO_HINTS) -> str:
    """The sha256 of a source's tensors: what says, wherever it lies, that it is the same."""
    return facts_of(source, hints).hash


def inherited_facts(extra: dict[str, Any]) -> dict[str, Any]:
    """What a parent's manifest hands on. A licence may be written beside an ancestor of its own."""
    found = {name: extra[name] for name in INHERITED_FACTS if extra.get(name) not in (None, (), [], {})}
    licence = licence_of(extra)
    return {**found, "licence": licence} if licence else found


def licence_of(extra: dict[str, Any]) -> str | None:
    """The licence that a manifest names, of its weights or of those they were made from."""
    return extra.get("licence") or (extra.get("ancestor") or {}).get("licence")


@lru_cache(maxsize=8)
def _facts(source: str, hints: str, stamp: int) -> Facts:
    """stamp: when the file was last written; it makes another file another entry."""
    found = _imported(source, HintsConfig.model_validate_json(hints), "ema")
    return Facts(found.kind, found.arch, found.hash, found.extra["imported"]["prediction"], found.extra)


def _own(folder: Path) -> Path | None:
    places = (folder, *(folder / name for name in ARTIFACT_FOLDERS))
    return next((place for place in places if (place / "manifest.json").is_file()), None)


def _imported(source: str, hints: HintsConfig, weights: Weights) -> Artifact:
    from fine_dist.artifacts.external import load
    from fine_dist.artifacts.imported import UNKNOWN_LICENCE
    from fine_dist.model.artifact import Artifact

    found = load(source, _hints(source, hints, weights))
    extra: dict[str, Any] = {
        "imported": {**found.provenance(), "hints": hints.model_dump(), "notes": list(found.notes)},
        "diffusion": found.diffusion.model_dump(),
    }
    if found.licence != UNKNOWN_LICENCE:
        extra["licence"] = found.licence
    if found.class_names:
        extra["class_names"] = list(found.class_names)
    if found.scaling_factor is not None:
        extra["codec"] = {"name": "vae", "scaling_factor": found.scaling_factor}
    method = SCRATCH.model_dump(mode="json")
    return Artifact(Path(source), "model", method, found.arch, found.state, extra, found.sha256)


def _hints(source: str, hints: HintsConfig, weights: Weights) -> Hints:
    from fine_dist.artifacts.imported import Hints

    return Hints(**hints.model_dump(), weights="auto" if weights == "ema" else "model")
