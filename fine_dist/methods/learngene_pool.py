"""Learngene Pool (arXiv 2312.05743): small anchors distilled from an ancestor, stitched into models of many sizes.

Stage 1 distils anchors of several widths, each by 0.1 of the diffusion loss and 0.9 of (output + block MSE + attention
MSE). The narrowest anchor's blocks d/3, 2d/3, d imitate the ancestor's 4 of 12, 8 of 12, 12 of 12 (by thirds of
whatever depths); wider anchors imitate its last block alone. Stage 2 joins them (`model.stitch`): from narrow to wide,
neighbouring widths, |j - k| <= 1; each step trains one random route (the paper's lr 5e-5). Any route deploys.

What an artifact holds. `arch` is the *widest* anchor's shape: latents, classes and depth are every anchor's, and the
narrower widths follow from `widths`, so arch and settings rebuild the whole pool. A learngene is the anchors and their
maps, without stitches; it answers as its widest anchor. A target is all of it, the stitches with it, or with `route`
set what that one route needs. A product is no dense DiT and loads as itself. Of a pool that was trained on (a `model`),
setting `route` cuts that route out, ready to use.

*Choices*: an anchor a step, drawn uniformly. Maps go from the anchor's features to the ancestor's width (the authors'
go the other way): a map of the target features could shrink both sides to nothing. So a stitch begins as the mean of
the narrow anchor's block maps as they are, where the authors transpose, weight only; where the back anchor is narrower
than the ancestor, the pseudo-inverse of its own mean map leads back. Features are averaged over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import field_validator

from fine_dist.errors import ArtifactError, ConfigError
from fine_dist.methods.base import Condensation, Descent, Method, MethodConfig, Parent, Traits, Weights, needed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fine_dist.model.artifact import Artifact
    from fine_dist.model.cost import Cost
    from fine_dist.model.dit import DiT
    from fine_dist.model.stitch import Pool, Route
    from fine_dist.model.zoo import Arch


class StitchingConfig(MethodConfig):
    """Settings of both methods that stitch."""

    widths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Widths of the anchors as fractions of arch's, narrow ones first; the last is 1 (192, 384 and 768 of DiT-B)."""
    route: str | None = None
    """The one route that a target keeps: an anchor (`1`), or block 3 of anchor 0 to block 2 of anchor 1 (`0.3-1.2`)."""

    @field_validator("route", mode="before")
    @classmethod
    def _word(cls, route: Any) -> Any:
        return str(route) if isinstance(route, int) else route  # `1` on a command line is a number

    @field_validator("widths")
    @classmethod
    def _rising(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if len(widths) < 2 or list(widths) != sorted(set(widths)) or widths[0] <= 0 or widths[-1] != 1:
            raise ValueError(f"{list(widths)} are no widths: give two fractions or more, rising, the last one 1")
        return widths


S = TypeVar("S", bound=StitchingConfig)


class Stitching(Method[S]):
    """What both have in common: anchors in stage 1, random routes in stage 2."""

    windows: ClassVar[bool]
    """Whether stitches are shared by sliding windows."""

    # --- what it can do ---------------------------------------------------------------------------------------------

    def check_parent(self, parent: Artifact) -> None:
        made = parent.method.get("name")
        takes = self.from_methods if parent.kind == "learngene" else (self.config.name,)
        if made not in takes:
            raise ArtifactError(
                f"{parent.folder} is a {parent.kind} of method {made}, and method {self.config.name} takes one of: "
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
        if self.config.route is not None:
            self.chosen(target)

    def chosen(self, arch: Arch) -> Route:
        """The route that the settings name. `ArtifactError` when these anchors have none of that name."""
        from fine_dist.model.stitch import all_routes, parse_route

        routes = all_routes(len(self.config.widths), arch.num_layers)
        route = parse_route(str(self.config.route))
        if route not in routes:
            raise ArtifactError(
                f"method.route: {self.config.route!r} is no route through {len(self.config.widths)} anchors of "
                f"{arch.num_layers} blocks; legal: {', '.join(map(str, routes[:8]))}, ..."
            )
        return route

    def archs(self, arch: Arch) -> list[Arch]:
        """The anchors' shapes, narrow ones first. `ConfigError` for a width that no DiT has."""
        from fine_dist.config import validate
        from fine_dist.model.zoo import Arch as Shape

        found = []
        for fraction in self.config.widths:
            width, heads = arch.hidden_size * fraction, max(1, round(arch.num_heads * fraction))
            if width != int(width):
                raise ConfigError(f"method.widths: {fraction} of hidden_size {arch.hidden_size} is no whole width")
            values = {**arch.model_dump(), "hidden_size": int(width), "num_heads": heads}
            found.append(validate(Shape, values, f"method.widths: an anchor of {fraction} of arch"))
        return found

    # --- stages -----------------------------------------------------------------------------------------------------

    def pool_of(self, arch: Arch, generator: torch.Generator | None = None) -> Pool:
        """Anchors alone."""
        from fine_dist.model.stitch import Pool

        return Pool(self.archs(arch), self.windows, generator)

    def begin_stitches(self, pool: Pool, parent: Parent, generator: torch.Generator) -> None:
        """Set the values of all stitches before stage 2."""
        raise NotImplementedError

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        import copy

        source = needed(parent)
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
        from fine_dist.model.stitch import drawn

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
        """The widest anchor of a pool without stitches; a stitched one is no dense DiT."""
        raise ConfigError(f"method {self.config.name}: a stitched model is no dense DiT, and deploys as it is")

    def deploy(self, model: nn.Module, route: str) -> tuple[Stitching[S], nn.Module]:
        """One route cut out of a trained pool, with the method of the settings that it is saved under."""
        method = type(self)(self.config.model_copy(update={"route": route}))
        pool: Any = model
        return method, pool.only(method.chosen(pool.arch))

    def cost(self, model: nn.Module, batch: int = 1) -> Cost:
        from fine_dist.model.stitch import Imitating, pool_cost

        pool: Any = model.pool if isinstance(model, Imitating) else model
        maps = sum(pool.arch.num_tokens * m.in_features * m.out_features for m in pool.maps.values())
        routes = pool.routes if self.config.route is None else [pool.route]
        return pool_cost(pool, routes, batch, maps // len(pool.anchors))


class LearngenePoolConfig(StitchingConfig):
    """Learngene Pool: distilled anchors of several widths, stitched."""

    name: Literal["learngene_pool"] = "learngene_pool"
    """Learngene Pool."""


class LearngenePool(Stitching[LearngenePoolConfig]):
    """Stitches begin as the distillation's own maps."""

    Config: ClassVar[type[MethodConfig]] = LearngenePoolConfig
    label: ClassVar[str] = "Learngene Pool"
    paper: ClassVar[str] = "Learngene Pool, arXiv 2312.05743"
    summary: ClassVar[str] = "distilled anchors of several widths, stitched by their maps"
    windows: ClassVar[bool] = False

    @property
    def traits(self) -> Traits:
        return Traits(
            parents=("learngene", "model"),
            varies=frozenset(),
            condenses=True,
            ancestor="must",
            # the features' term is the mean over both sorts of features: twice its weight is the sum of the two
            loss=Weights(diffusion=0.1, output=0.9, features=1.8),
            dense=False,
        )

    def condense(self, arch: Arch, ancestor: DiT | None, generator: torch.Generator) -> Condensation:
        from fine_dist.model.stitch import drawn

        if ancestor is None:
            raise ArtifactError(f"method {self.config.name} distils an ancestor; give its folder as ancestor")
        module = self.blueprint(arch, ancestor.arch, generator)
        pool: Any = module.pool
        pairs = []
        for taps in module.taps:  # type: ignore[union-attr]
            for name, (kind, _) in taps.items():
                third = int(name.rpartition("_")[2])
                pairs.append((name, f"{kind}.{thirds(ancestor.arch.num_layers)[third]}"))
        return Condensation(module, pairs=pairs, before_step=drawn(pool, pool.routes), prefix="pool.")

    def blueprint(self, arch: Arch, teacher: Arch | None = None, generator: torch.Generator | None = None) -> nn.Module:
        from fine_dist.model.stitch import Imitating

        pool = self.pool_of(arch, generator)
        taps: list[dict[str, tuple[str, int]]] = []
        for anchor in range(len(self.config.widths)):
            places = thirds(arch.num_layers)
            own = {
                f"{anchor}_{kind}_{third}": (kind, places[third])
                for third in ((0, 1, 2) if anchor == 0 else (2,))
                for kind in ("block", "attention")
            }
            for key in own:
                pool.add_map(key, anchor, (teacher or arch).hidden_size, generator)
            taps.append(own)
        return Imitating(pool, taps)

    def begin_stitches(self, pool: Pool, parent: Parent, generator: torch.Generator) -> None:
        import torch

        with torch.no_grad():
            for route in pool.routes:
                if route.last is None:
                    continue
                stitch = pool.stitches[pool.stitch_key(route)]
                stitch.weight.copy_(between(pool, route.anchor))  # type: ignore[operator]
                stitch.bias.zero_()  # type: ignore[operator]


def thirds(num_layers: int) -> list[int]:
    """The blocks at the ends of the thirds of a depth, counted from 0: 3, 7 and 11 of 12."""
    return [math.ceil(num_layers * part / 3) - 1 for part in (1, 2, 3)]


def mean_map(pool: Pool, anchor: int) -> Tensor:
    """The mean of an anchor's block maps, [D_t, D]."""
    import torch

    maps: Any = [m.weight for key, m in pool.maps.items() if key.startswith(f"{anchor}_block_")]
    return torch.stack(maps).mean(0)


def between(pool: Pool, anchor: int) -> Tensor:
    """Where a stitch from an anchor to the next wider one begins, [D_b, D_a]."""
    import torch

    to_teacher = mean_map(pool, anchor)
    if len(to_teacher) == pool.width(anchor + 1):
        return to_teacher
    from_teacher: Tensor = torch.linalg.pinv(mean_map(pool, anchor + 1))
    return from_teacher @ to_teacher
