"""Finds a DiT's weights in a training checkpoint, and removes nesting and prefixes that frameworks add to their names.

Checkpoints nest their weights (`{"ema": {...}, "model": {...}, "opt": ...}`), and frameworks change names: DataParallel
and DDP add `module.`, torch.compile `_orig_mod.` (in front or per block), FSDP `_fsdp_wrapped_module.`, activation
checkpointing `_checkpoint_wrapped_module.`, Lightning the attribute's name, ema_pytorch `ema_model.` and
`online_model.`. One rule covers all of them: components in `WRAPPERS` are removed wherever they are in a name, and
whatever then precedes the name of the patch embedder is a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fine_dist.core.errors import ArtifactError

ANCHOR = "x_embedder.proj.weight"
"""Name of the patch embedder's weight, by which a DiT's weights are found."""
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Components that frameworks insert into names, at any depth."""
NOT_WEIGHTS = ("opt", "optimizer", "optimizer_states", "optimizer_state_dict", "scheduler", "lr_schedulers", "args")
"""Entries of a checkpoint that are never searched for weights."""
PROJECTORS = ("projectors.",)
"""Prefixes of modules that are used in training only: REPA's projectors."""
_DEPTH = 4
"""Levels of nesting that are searched. No known framework has more."""


@dataclass
class Unwrapped:
    """The result of `unwrap`."""

    state: dict[str, Tensor]
    """Weights, by names without wrappers and prefixes."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the training script, if the checkpoint holds them."""
    dropped: tuple[str, ...] = ()
    """Names of tensors of `PROJECTORS`, which are not in `state`."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user: which weights were chosen, and which prefixes and tensors were removed."""


@dataclass(frozen=True)
class _Candidate:
    """A DiT in a checkpoint: the keys of the mapping it is in, the prefix of its names, and the mapping's tensors."""

    path: tuple[str, ...]
    prefix: str
    tensors: Mapping[str, Tensor]

    @property
    def is_average(self) -> bool:
        # In ema_pytorch's checkpoints online_model holds the trained weights, inside a mapping that may be named ema.
        # `ema` counts as a word only, for it is a part of others, such as schema.
        words = re.split(r"[^a-z]+", "/".join((*self.path, self.prefix)).lower())
        return "ema" in words and "online" not in words

    @property
    def name(self) -> str:
        return ".".join((*self.path, self.prefix.rstrip("."))).strip(".") or "the file itself"


def unwrap(content: Mapping[Any, Any], weights: Literal["ema", "raw"], path: Path) -> Unwrapped:
    """Find the weights of a DiT in a checkpoint.

    Args:
        content: The checkpoint, as `read_tensor_file` returns it.
        weights: `ema` for the averaged weights, or the trained ones if there are no others; `raw` for the trained ones.
        path: Path of the checkpoint, for messages.

    Raises:
        ArtifactError: There are no tensors, or `raw` weights are asked for and there are only averaged ones.
    """
    candidates = _candidates(content, ())
    if not candidates:
        return _without_anchor(content, path)
    averages = [candidate for candidate in candidates if candidate.is_average]
    plain = [candidate for candidate in candidates if not candidate.is_average]
    if weights == "raw" and not plain:
        raise ArtifactError(f"{path} holds averaged weights only ({_names(averages)}); leave weights at ema")
    # The average is preferred, because published results are sampled with it.
    choice = (plain if weights == "raw" else averages or plain)[0]
    named = choice.tensors
    # Models of one mapping, by their longest prefix: a model without a prefix may lie next to one that has `ema.`.
    others = [c.prefix for c in candidates if c.tensors is named and len(c.prefix) > len(choice.prefix)]
    state = {
        name[len(choice.prefix) :]: tensor
        for name, tensor in named.items()
        if name.startswith(choice.prefix) and not name.startswith(tuple(others))
    }
    dropped = tuple(sorted(name for name in state if name.startswith(PROJECTORS)))
    for name in dropped:
        del state[name]
    result = Unwrapped(state, _arguments(content), dropped)
    if len(candidates) > 1 or choice.path:
        unused = [candidate for candidate in candidates if candidate is not choice]
        others_text = f" (not used: {_names(unused)})" if unused else ""
        result.notes.append(f"weights: {choice.name}{others_text}")
    if choice.prefix:
        result.notes.append(f"the prefix {choice.prefix!r} was removed from every name")
    left = sorted(name for name in named if not name.startswith(choice.prefix))
    # Without tensors of other candidates in this mapping, which the first note mentions.
    left = [name for name in left if not any(name.startswith(c.prefix) for c in candidates if c.tensors is named)]
    if left:
        result.notes.append(f"dropped, as no part of the model: {_few(left)}")
    if dropped:
        result.notes.append(f"dropped, as used in training only: {len(dropped)} tensors of REPA's {_few(dropped)}")
    return result


def _candidates(content: Mapping[Any, Any], path: tuple[str, ...]) -> list[_Candidate]:
    """Return all DiTs in a mapping and, up to `_DEPTH` levels, in the mappings nested in it."""
    tensors = {
        _plain(key): value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    # One mapping may hold several models, as in ema_pytorch, so each patch embedder makes a candidate.
    prefixes = sorted(name[: -len(ANCHOR)] for name in tensors if name.endswith(ANCHOR))
    candidates = [_Candidate(path, prefix, tensors) for prefix in prefixes]
    if len(path) < _DEPTH:
        for key, value in content.items():
            if isinstance(key, str) and isinstance(value, Mapping) and key not in NOT_WEIGHTS:
                candidates += _candidates(value, (*path, key))
    return candidates


def _plain(name: str) -> str:
    """Return a name without the components in `WRAPPERS` and without the leading `module` of DataParallel and DDP."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    # Only in front, because a model may have a submodule of that name.
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _without_anchor(content: Mapping[Any, Any], path: Path) -> Unwrapped:
    """Return the tensors of a file without a patch embedder, so that the caller can list the missing names."""
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
    """Return the arguments that a training script saved; empty without any."""
    args = content.get("args")
    values = dict(args) if isinstance(args, Mapping) else dict(vars(args)) if hasattr(args, "__dict__") else {}
    return {str(key): value for key, value in values.items()}


def _names(candidates: list[_Candidate]) -> str:
    return ", ".join(dict.fromkeys(candidate.name for candidate in candidates))


def _few(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
