"""The methods, in one dict. To add one: write its file, list it here."""

from __future__ import annotations

from typing import Any

from fine_dist.config import Config, union_of
from fine_dist.methods.base import FitReport, Method, MethodConfig
from fine_dist.methods.fine import Fine, FineConfig
from fine_dist.methods.he import He, HeConfig
from fine_dist.methods.outside import Outside
from fine_dist.methods.random_genes import RandomGenes

METHODS: dict[str, type[Method[Any]]] = {
    "fine": Fine,
    "he": He,
    "outside": Outside,
    "random_genes": RandomGenes,
}

AnyMethod = union_of([method.Config for method in METHODS.values()])
"""Annotation of a config field that holds the settings of any one method."""


def build(config: MethodConfig) -> Method[Any]:
    """The method that these settings are for."""
    return METHODS[config.name](config)


def from_manifest(settings: dict[str, Any]) -> Method[Any]:
    """The method that an artifact's manifest names."""
    from fine_dist.config import validate
    from fine_dist.errors import ArtifactError, nearest

    name = str(settings.get("name"))
    if name not in METHODS:
        raise ArtifactError(f"method {name!r} is not known here; {nearest(name, METHODS)}")
    return build(validate(METHODS[name].Config, settings, "method in the manifest"))


__all__ = [
    "METHODS",
    "AnyMethod",
    "Config",
    "FineConfig",
    "FitReport",
    "HeConfig",
    "Method",
    "MethodConfig",
    "build",
    "from_manifest",
]
