"""The base class of methods that stitch anchors of several widths.

Stage 1 trains the anchors, one at each step; stage 2 joins them (`stitching.pool`) and trains one random route at each
step; every route can be deployed.

`arch` is the architecture of the *widest* anchor. All anchors have its latents, classes and depth, and the narrower
widths follow from `widths`, so that arch and settings determine the complete pool. A learngene is the anchors (and the
maps that distilled them) without stitches; it is evaluated as its widest anchor. A target is the complete pool with
stitches or, if `route` is set, the modules of that route. A target is not a dense DiT and is loaded as a pool. From a
trained pool (a `model`), setting `route` extracts that route without training.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fine_dist.core.config import validate
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.methods.base import Descent, Method, Parent, needed
from fine_dist.methods.stitching.config import StitchingConfig
from fine_dist.methods.stitching.pool import Imitating, Pool, Route, all_routes, drawn, parse_route, pool_cost
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.flops import ModelCost

S = TypeVar("S", bound=StitchingConfig)


class Stitching(Method[S]):
    """Anchors in stage 1, random routes in stage 2."""

    windows: ClassVar[bool]
    """Whether stitches are shared by sliding windows."""

    # --- abilities --------------------------------------------------------------------------------------------------

    def check_parent(self, parent: Artifact) -> None:
        method = parent.method.get("name")
        takes = self.from_methods if parent.kind == "learngene" else (self.config.name,)
        if method not in takes:
            raise ArtifactError(
                f"{parent.folder} is a {parent.kind} of method {method}, and method {self.config.name} takes one of: "
                + ", ".join(takes)
            )

    def check(self, parent: Artifact | None, target: Arch) -> None:
        super().check(parent, target)
        if parent is None:
            return
        if list(parent.method["widths"]) != list(self.config.widths):
            raise ArtifactError(
                f"{parent.folder} has anchors of widths {list(parent.method['widths'])}, and method.widths says "
                f"{list(self.config.widths)}; give the parent's"
            )
        if parent.kind == "model" and self.config.route is None:
            raise ArtifactError(f"{parent.folder} is stitched already; set method.route to cut one route out of it")
        if parent.kind == "model" and parent.method["route"] is not None:
            raise ArtifactError(f"{parent.folder} holds route {parent.method['route']} alone; give the whole pool")
        if self.config.route is not None:
            self.chosen(target)

    def chosen(self, arch: Arch) -> Route:
        """The route that the settings name. `ArtifactError` when these anchors have none of that name."""
        routes = all_routes(len(self.config.widths), arch.num_layers)
        route = parse_route(str(self.config.route))
        if route not in routes:
            raise ArtifactError(
                f"method.route: {self.config.route!r} is no route through {len(self.config.widths)} anchors of "
                f"{arch.num_layers} blocks; legal: {', '.join(map(str, routes[:8]))}, ..."
            )
        return route

    def archs(self, arch: Arch) -> list[Arch]:
        """The anchors' architectures, narrow ones first. `ConfigError` for a width that is not possible."""
        archs = []
        for fraction in self.config.widths:
            width, heads = arch.hidden_size * fraction, max(1, round(arch.num_heads * fraction))
            if width != int(width):
                raise ConfigError(f"method.widths: {fraction} of hidden_size {arch.hidden_size} is no whole width")
            values = {**arch.model_dump(), "hidden_size": int(width), "num_heads": heads}
            archs.append(validate(Arch, values, f"method.widths: an anchor of {fraction} of arch"))
        return archs

    # --- stages -----------------------------------------------------------------------------------------------------

    def pool_of(self, arch: Arch, generator: torch.Generator | None = None) -> Pool:
        """A pool of the anchors without stitches and maps."""
        return Pool(self.archs(arch), self.windows, generator)

    @abstractmethod
    def begin_stitches(self, pool: Pool, parent: Parent, generator: torch.Generator) -> None:
        """Set the values of all stitches before stage 2."""

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent)
        # A copy, because a parent is used for many targets.
        pool: Any = copy.deepcopy(source.module)
        if source.artifact.kind == "model":
            return Descent(pool.only(self.chosen(target)).requires_grad_(True))
        pool.windows = self.windows
        pool.add_stitches()
        self.begin_stitches(pool, source, generator)
        pool.maps.clear()
        model = pool if self.config.route is None else pool.only(self.chosen(target))
        return Descent(model.requires_grad_(True), "all")

    def before_step(self, model: nn.Module) -> Callable[[int, torch.Generator], None] | None:
        pool: Any = model
        return drawn(pool, pool.routes) if self.config.route is None else None

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        pool = self.pool_of(arch)
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if head == "maps" and rest.endswith(".weight"):
                key = rest.removesuffix(".weight")
                pool.add_map(key, int(key.partition("_")[0]), tensor.shape[0])
        pool.add_stitches([name.split(".")[1] for name in tensors if name.startswith("stitches.")])
        return pool if self.config.route is None else pool.only(self.chosen(arch))

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        """Always a `ConfigError`: a stitched model is not a dense DiT."""
        raise ConfigError(f"method {self.config.name}: a stitched model is no dense DiT, and deploys as it is")

    def deploy(self, model: nn.Module, route: str) -> tuple[Stitching[S], nn.Module]:
        """One route extracted from a trained pool, and the method with the settings under which it is saved."""
        method = type(self)(self.config.model_copy(update={"route": route}))
        pool: Any = model
        return method, pool.only(method.chosen(pool.arch))

    def cost(self, model: nn.Module, batch: int = 1) -> ModelCost:
        pool: Any = model.pool if isinstance(model, Imitating) else model
        maps = sum(pool.arch.num_tokens * m.in_features * m.out_features for m in pool.maps.values())
        routes = pool.routes if self.config.route is None else [pool.route]
        return pool_cost(pool, routes, batch, maps // len(pool.anchors))
