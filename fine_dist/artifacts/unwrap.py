"""A training checkpoint's weights without what a framework wrapped around them.

Checkpoints nest their weights (`{"ema": {...}, "model": {...}, "opt": ...}`) and prefix their names: DataParallel and
DDP with `module.`, torch.compile with `_orig_mod.` (in front or per block), FSDP with `_fsdp_wrapped_module.`,
activation checkpointing with `_checkpoint_wrapped_module.`, Lightning with the attribute's name, ema_pytorch with
`ema_model.` and `online_model.`. All of them are recognized by one rule: words of wrappers are deleted wherever they
stand, and what then stands before the patch embedder's name is a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fine_dist.core.errors import ArtifactError

ANCHOR = "x_embedder.proj.weight"
"""The tensor by which a DiT's weights are found."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that frameworks put into names, wherever they stand."""
NOT_WEIGHTS = ("opt", "optimizer", "optimizer_states", "optimizer_state_dict", "scheduler", "lr_schedulers", "args")
"""Entries of a checkpoint that are never searched for weights."""
PROJECTORS = ("projectors.",)
"""Names of modules that are used in training only: REPA's projectors."""
_DEPTH = 4
"""Levels of nesting that are searched; more is no checkpoint of a known framework."""


@dataclass
class Unwrapped:
    """Weights by plain names, the arguments saved beside them, and sentences on what was taken off or dropped."""

    state: dict[str, Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Candidate:
    """A place in a checkpoint that holds a DiT: the keys that lead there, a prefix of names, and the tensors."""

    path: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Tensor]

    @property
    def is_average(self) -> bool:
        # ema_pytorch keeps the trained weights beside their average, as online_model.
        return "ema" in "/".join((*self.path, self.prefix)).lower() and "online" not in self.prefix

    @property
    def name(self) -> str:
        return ".".join((*self.path, self.prefix.rstrip("."))).strip(".") or "the file itself"


def unwrap(content: Mapping[Any, Any], weights: Literal["ema", "raw"], path: Path) -> Unwrapped:
    """The weights of a checkpoint, its average (`ema`) or what was trained (`raw`).

    Where there is one set only, `ema` takes it; `raw` refuses a file of averages alone. `ArtifactError` when there are
    no tensors by name.
    """
    candidates = _candidates(content, ())
    if not candidates:
        return _without_anchor(content, path)
    averages = [candidate for candidate in candidates if candidate.is_average]
    plain = [candidate for candidate in candidates if not candidate.is_average]
    if weights == "raw" and not plain:
        raise ArtifactError(f"{path} holds averaged weights only ({_names(averages)}); leave weights at ema")
    # The average first: published figures were sampled with it.
    choice = (plain if weights == "raw" else averages or plain)[0]
    named = choice.tensors
    state = {name[len(choice.prefix) :]: tensor for name, tensor in named.items() if name.startswith(choice.prefix)}
    dropped = tuple(sorted(name for name in state if name.startswith(PROJECTORS)))
    for name in dropped:
        del state[name]
    result = Unwrapped(state, _arguments(content), dropped)
    if len(candidates) > 1 or choice.path:
        unused = [candidate for candidate in candidates if candidate is not choice]
        beside = f" (beside {_names(unused)})" if unused else ""
        result.notes.append(f"weights: {choice.name}{beside}")
    if choice.prefix:
        result.notes.append(f"the prefix {choice.prefix!r} was taken off every name")
    left = sorted(name for name in named if not name.startswith(choice.prefix))
    # Tensors of the other candidates were not dropped but not chosen, which the note above says already.
    left = [name for name in left if not any(name.startswith(c.prefix) for c in candidates if c.tensors is named)]
    if left:
        result.notes.append(f"dropped, as no part of the model: {_few(left)}")
    if dropped:
        result.notes.append(f"dropped, as used in training only: {len(dropped)} tensors of REPA's {_few(dropped)}")
    return result


def _candidates(content: Mapping[Any, Any], path: tuple[str, ...]) -> list[_Candidate]:
    tensors = {
        _plain(key): value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    # One mapping may hold several models (ema_pytorch stores both), so every patch embedder is a candidate of its own.
    prefixes = sorted(name[: -len(ANCHOR)] for name in tensors if name.endswith(ANCHOR))
    candidates = [_Candidate(path, prefix, tensors) for prefix in prefixes]
    if len(path) < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping) and key not in NOT_WEIGHTS:
                candidates += _candidates(value, (*path, key))
    return candidates


def _plain(name: str) -> str:
    """A name without the words of wrappers; `module` comes off the front only, where it is DataParallel's or DDP's."""
    parts = [word for word in name.split(".") if word not in WRAPPERS]
    # Behind the front, `module` may be the name of a model's own part.
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _without_anchor(content: Mapping[Any, Any], path: Path) -> Unwrapped:
    """A file without a patch embedder: its tensors as they are, so that the reader can say what is missing."""
    mapping: Mapping[Any, Any] = content
    for _ in range(_DEPTH):
        nested = [v for k, v in mapping.items() if k not in NOT_WEIGHTS and isinstance(v, Mapping)]
        if any(isinstance(value, Tensor) for value in mapping.values()) or not nested:
            break
        mapping = nested[0]
    state = {_plain(k): v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        keys = ", ".join(str(key)[:40] for key in list(mapping)[:8])
        raise ArtifactError(f"{path} holds no tensors by name (its keys: {keys or 'none'})")
    return Unwrapped(state, _arguments(content))


def _arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    """What a training script saved of its arguments; they are believed only where the tensors are silent."""
    args = content.get("args")
    values = dict(args) if isinstance(args, Mapping) else dict(vars(args)) if hasattr(args, "__dict__") else {}
    return {str(key): value for key, value in values.items()}


def _names(candidates: list[_Candidate]) -> str:
    return ", ".join(dict.fromkeys(candidate.name for candidate in candidates))


def _few(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
