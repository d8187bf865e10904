"""What the parameters of a model are for, as the modules that own them declare it.

A module class says `roles = {"U": "gene", ...}` for parameters of its own; what no module declares belongs to the
shell: the embedders and the final layer; inside a module that says `below = "scaler"` it has that role instead, which
is for modules of other libraries. Nothing is told by a parameter's name.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Role = Literal["gene", "scaler", "tailor", "weight", "bias", "shell"]
"""gene: shared by layers or models. scaler: a layer's own, turns genes into weights. tailor: of some classes alone.
weight, bias: a block's own."""


def roles(model: nn.Module) -> dict[str, Role]:
    """Every parameter's role, by its name in `named_parameters`."""
    found: dict[str, Role] = {}
    below: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        kind: Any = type(module)
        parent = prefix.rpartition(".")[0]
        below[prefix] = getattr(kind, "below", below.get(parent, "shell"))
        declared: dict[str, Role] = getattr(kind, "roles", {})
        for name, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{name}" if prefix else name] = declared.get(name, below[prefix])
    return found


def of_role(model: nn.Module, *wanted: Role) -> dict[str, Tensor]:
    """Detached parameters of some roles, by name."""
    known = roles(model)
    return {name: p.detach() for name, p in model.named_parameters() if known[name] in wanted}


def train_only(model: M, *wanted: Role) -> M:
    """Freeze every parameter but those of these roles; the model."""
    known = roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(known[name] in wanted)
    return model


def count_by_role(model: nn.Module) -> dict[Role, int]:
    """Numbers of each role that occurs."""
    known = roles(model)
    counts: dict[Role, int] = {}
    for name, parameter in model.named_parameters():
        counts[known[name]] = counts.get(known[name], 0) + parameter.numel()
    return counts
