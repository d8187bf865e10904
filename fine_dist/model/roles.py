"""Roles of a model's parameters, declared by the modules that own them.

A module class declares `roles = {"U": "gene", ...}` for its own parameters. A parameter without a declaration belongs
to the shell (embedders and final layer), or, inside a module with `below = "scaler"`, has that role; this is for
modules of other libraries. Names of parameters are never parsed.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Role = Literal["gene", "scaler", "tailor", "weight", "bias", "shell"]
"""gene: shared by layers or models. scaler: belongs to one layer and turns genes into weights. tailor: used by some
classes only. weight, bias: ordinary parameters of a block. shell: embedders and final layer."""


def roles(model: nn.Module) -> dict[str, Role]:
    """Every parameter's role, by its name in `named_parameters`."""
    role_of: dict[str, Role] = {}
    below: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        kind: Any = type(module)
        # `named_modules` lists a parent before its children, so the parent's entry exists.
        parent = prefix.rpartition(".")[0]
        below[prefix] = getattr(kind, "below", below.get(parent, "shell"))
        declared: dict[str, Role] = getattr(kind, "roles", {})
        # Not recursive: each parameter is declared by the module that owns it.
        for name, _ in module.named_parameters(recurse=False):
            role_of[f"{prefix}.{name}" if prefix else name] = declared.get(name, below[prefix])
    return role_of


def of_role(model: nn.Module, *wanted: Role) -> dict[str, Tensor]:
    """Detached parameters of some roles, by name."""
    known = roles(model)
    return {name: p.detach() for name, p in model.named_parameters() if known[name] in wanted}


def train_only(model: M, *wanted: Role) -> M:
    """Freeze all parameters except those of some roles; returns the model."""
    known = roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(known[name] in wanted)
    return model


def count_by_role(model: nn.Module) -> dict[Role, int]:
    """How many numbers the parameters of each role hold."""
    known = roles(model)
    counts: dict[Role, int] = {}
    for name, parameter in model.named_parameters():
        counts[known[name]] = counts.get(known[name], 0) + parameter.numel()
    return counts
