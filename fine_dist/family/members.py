"""The members of a family: its grid of depths, data sets, seeds, learning rates and variants, as named targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fine_dist.core.config import run_dir_of
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.grid import GridAxis
from fine_dist.core.grid import expand as points
from fine_dist.family.config import DomainConfig, InitConfig
from fine_dist.launchers.spec import check_name


@dataclass(frozen=True)
class Member:
    """One target of a family: a point of the grid."""

    name: str
    depth: int
    domain: str
    domain_config: DomainConfig
    seed: int
    lr: float
    variant: tuple[tuple[str, str], ...]
    """Settings of the method that this target varies."""
    folder: Path

    @property
    def point(self) -> dict[str, Any]:
        """The target's coordinates in the grid, as JSON values."""
        coordinates = {"name": self.name, "depth": self.depth, "domain": self.domain, "seed": self.seed, "lr": self.lr}
        return {**coordinates, "variant": dict(self.variant)}


def expand(config: InitConfig) -> list[Member]:
    """The members of the grid, named like `L4-s0-lr0.01-linear`. `ConfigError` when the grid is impossible."""
    domains = config.domains or {"data": DomainConfig(data=config.data, labels=config.labels)}
    rates = config.lrs or (config.optim.lr,)
    for depth in config.depths:
        if depth < 1:
            raise ConfigError(f"depths: {depth} is not a depth; a target has 1 layer or more")
    for rate in rates:
        if not rate > 0:
            raise ConfigError(f"lrs: {rate} is not a learning rate; give numbers above 0")
    # Counted before the members are made, because a typo in a config may ask for a million targets.
    size = len(config.depths) * len(domains) * len(config.seeds) * len(rates)
    for values in config.variants.values():
        size *= len(values)
    if size > config.limit and not config.yes:
        raise ConfigError(f"this grid has {size} targets, more than limit: {config.limit}; add --yes to run it")
    for name in config.domains:
        _named(name)
    axes = [
        GridAxis("depths", config.depths, lambda depth: f"L{depth}"),
        GridAxis("domains", tuple(domains), lambda name: name if config.domains else ""),
        GridAxis("seeds", config.seeds, lambda seed: f"s{seed}"),
        GridAxis("lrs", rates, lambda lr: f"lr{lr:g}"),
        *(GridAxis(f"variants.{name}", values, str) for name, values in config.variants.items()),
    ]
    members = []
    for name, (depth, domain, seed, lr, *chosen) in points(axes):
        variant = tuple(zip(config.variants, chosen))
        folder = run_dir_of(config) / _named(name)
        members.append(Member(name, depth, domain, domains[domain], seed, lr, variant, folder))
    names = [member.name for member in members]
    for name in config.only:
        if name not in names:
            raise ConfigError(f"only: no target is called {name!r}; {nearest(name, names)}")
    return [member for member in members if member.name in config.only] if config.only else members


def _named(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise ConfigError(f"domains: {error}") from None
