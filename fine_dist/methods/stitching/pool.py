"""DiTs of several widths in one module, and routes through them (SN-Net, arXiv 2302.06586; Learngene Pool, 2312.05743).

A route is an anchor, or the first blocks of one, a linear map of its tokens, and the last blocks of the next wider one.
The front anchor embeds the tokens; the back anchor's own conditioning and final layer serve its blocks. A route that
leaves the front after block j enters the back at block k with |j - k| <= 1: for two anchors of L blocks that is 3 L - 2
stitched routes and the two anchors, 18 for L = 6 and 27 for L = 9.

Shapes: B batch, T tokens, D_a and D_b widths of neighboring anchors, D_t a teacher's width.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fine_dist.model.arch import MATRICES, Arch
from fine_dist.model.dit import DiT, ModelOutput
from fine_dist.model.flops import ModelCost, attention_macs
from fine_dist.model.roles import Role


class Route(NamedTuple):
    """A route through `anchor` alone, or through its blocks up to `last` and the next wider anchor's from `first`."""

    anchor: int
    last: int | None = None
    first: int | None = None

    def __str__(self) -> str:
        return str(self.anchor) if self.last is None else f"{self.anchor}.{self.last}-{self.anchor + 1}.{self.first}"


def parse_route(text: str) -> Route | None:
    """The route of a text such as `1` or `0.3-1.2`; None for other texts."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+)-(\d+)\.(\d+))?", text)
    if not match:
        return None
    anchor, last, back, first = (None if part is None else int(part) for part in match.groups())
    assert anchor is not None
    return Route(anchor, last, first) if back in (None, anchor + 1) else None


def all_routes(num_anchors: int, blocks: int) -> list[Route]:
    """The anchors, then every stitched route, narrow ones first."""
    places = range(blocks)
    pairs = [(last, first) for last in places for first in places if abs(last - first) <= 1]
    stitched = [Route(anchor, *pair) for anchor in range(num_anchors - 1) for pair in pairs]
    return [Route(anchor) for anchor in range(num_anchors)] + stitched


class Stitch(nn.Linear):
    """A linear map of tokens between widths, or of a student's features to a teacher's width."""

    roles: ClassVar[dict[str, Role]] = {"weight": "weight", "bias": "bias"}
    multiplied: ClassVar[tuple[str, ...]] = ("weight", "bias")


class Pool(nn.Module):
    """`(z, t, y) -> output` along the current route, `pool.route = Route(...)`; initially the widest anchor.

    archs:   architectures of the anchors, which differ only in width, narrow ones first. `arch` is the widest one.
    windows: whether sliding windows of two blocks share stitches, as in SN-Net; else each (last, first) has its own.
    """

    def __init__(self, archs: Sequence[Arch], windows: bool = False, generator: torch.Generator | None = None):
        super().__init__()
        self.arch, self.windows = archs[-1], windows
        self.anchors = nn.ModuleList(DiT(arch, generator=generator) for arch in archs)
        self.maps = nn.ModuleDict()
        self.stitches = nn.ModuleDict()
        self.route = Route(len(archs) - 1)

    # --- routes -----------------------------------------------------------------------------------------------------

    @property
    def routes(self) -> list[Route]:
        """All routes; only the anchors before stitches are added."""
        routes = all_routes(len(self.anchors), self.arch.num_layers)
        return routes if self.stitches else routes[: len(self.anchors)]

    def stitch_key(self, route: Route) -> str:
        """Key in `stitches` of a route's stitch. The windows are (0, 1), (1, 2), ...; a pair of blocks belongs to the
        first window that contains it."""
        assert route.last is not None and route.first is not None
        if self.windows:
            return f"{route.anchor}_{max(route.last, route.first, 1) - 1}"
        return f"{route.anchor}_{route.last}_{route.first}"

    def add_stitches(self, keys: Sequence[str] | None = None) -> None:
        """Add stitches with arbitrary values: all of them, or those in `keys`."""
        stitched = [route for route in all_routes(len(self.anchors), self.arch.num_layers) if route.last is not None]
        for route in stitched:
            key = self.stitch_key(route)
            if key not in self.stitches and (keys is None or key in keys):
                self.stitches[key] = Stitch(self.width(route.anchor), self.width(route.anchor + 1))

    def add_map(self, key: str, anchor: int, width: int, generator: torch.Generator | None = None) -> None:
        """Add a trainable map from an anchor's features to a teacher's width."""
        self.maps[key] = Stitch(self.width(anchor), width)
        nn.init.xavier_uniform_(self.maps[key].weight, generator=generator)  # type: ignore[arg-type]
        nn.init.zeros_(self.maps[key].bias)  # type: ignore[arg-type]

    def width(self, anchor: int) -> int:
        return self.anchor(anchor).arch.hidden_size

    def anchor(self, index: int) -> DiT:
        return self.anchors[index]  # type: ignore[return-value]

    def segments(self, route: Route) -> list[tuple[DiT, range]]:
        """The anchors of a route, and the range of blocks that it uses of each."""
        everything = range(self.arch.num_layers)
        if route.last is None:
            return [(self.anchor(route.anchor), everything)]
        front, back = self.anchor(route.anchor), self.anchor(route.anchor + 1)
        return [(front, everything[: route.last + 1]), (back, everything[route.first :])]

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.route.last is None:
            output: Tensor = self.anchor(self.route.anchor)(z, t, y)
            return output
        (front, firsts), (back, lasts) = self.segments(self.route)
        x, condition = front.embed(z, t, y)
        for layer in firsts:
            x = front.run(layer, front.blocks[layer], x, condition)  #                                   [B, T, D_a]
        x = self.stitches[self.stitch_key(self.route)](x).to(x.dtype)  #                                 [B, T, D_b]
        # The back anchor's blocks need its own condition, because the widths differ.
        condition = back.condition(t, y)
        for layer in lasts:
            x = back.run(layer, back.blocks[layer], x, condition)
        return back.unpatchify(back.final(x, condition.c))

    def only(self, route: Route) -> Pool:
        """A copy with only the modules that one route needs, under the same names."""
        pool = copy.deepcopy(self)
        pool.route, pool.maps = route, nn.ModuleDict()
        segments = dict((id(anchor), blocks) for anchor, blocks in pool.segments(route))
        stitch_keys = {pool.stitch_key(route)} if route.last is not None else set()
        pool.stitches = nn.ModuleDict({key: stitch for key, stitch in pool.stitches.items() if key in stitch_keys})
        anchor: Any
        for index, anchor in enumerate(pool.anchors):
            blocks = segments.get(id(anchor))
            if blocks is None:
                # A placeholder, so that the names of the remaining parameters do not change.
                pool.anchors[index] = nn.Identity()
                continue
            for layer in set(range(self.arch.num_layers)) - set(blocks):
                anchor.blocks[layer] = nn.Identity()
            if route.last is not None:
                unused = "final" if index == route.anchor else "patch"
                setattr(anchor, unused, nn.Identity())
        return pool

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all anchors."""
        held = [block for anchor in self.anchors if isinstance(anchor, DiT) for block in anchor.blocks]
        return [block for block in held if not isinstance(block, nn.Identity)]

    @property
    def recompute(self) -> str:
        """Blocks whose activations are computed again in the backward pass, as in `DiT`."""
        return next(anchor.recompute for anchor in self.anchors if isinstance(anchor, DiT))

    @recompute.setter
    def recompute(self, value: str) -> None:
        for anchor in self.anchors:
            anchor.recompute = value  # type: ignore[assignment]


class Imitating(nn.Module):
    """`(z, t, y) -> ModelOutput` of a pool's current anchor, with features projected by its maps, for distillation.

    taps: for each anchor, {key of a map: (`block` or `attention`, layer)}; a feature has the name of its map.
    """

    def __init__(self, pool: Pool, taps: Sequence[dict[str, tuple[str, int]]]):
        super().__init__()
        self.pool, self.arch, self.taps = pool, pool.arch, tuple(taps)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> ModelOutput:
        taps = self.taps[self.pool.route.anchor]
        layers = sorted({layer for _, layer in taps.values()})
        output = self.pool.anchor(self.pool.route.anchor).forward_with_features(z, t, y, layers)
        features = {key: self.pool.maps[key](output.features[f"{kind}.{at}"]) for key, (kind, at) in taps.items()}
        return ModelOutput(output.out, features)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all anchors, which is what is compiled."""
        return self.pool.blocks

    @property
    def recompute(self) -> str:
        return self.pool.recompute

    @recompute.setter
    def recompute(self, value: str) -> None:
        self.pool.recompute = value


def drawn(pool: Pool, routes: Sequence[Route]) -> Callable[[int, torch.Generator], None]:
    """A hook that sets a random route before each step, the same on every rank."""

    def before_step(step: int, generator: torch.Generator) -> None:
        pool.route = routes[int(torch.randint(len(routes), (1,), generator=generator))]

    return before_step


# --- least squares ---------------------------------------------------------------------------------------------------


def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares map of tokens x [N, D_a] to y [N, D_b]: weight [D_b, D_a], bias [D_b], in fp64."""
    # A column of ones makes the bias part of the same solution.
    ones = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(ones, y.double(), driver="gelsd").solution  # minimal norm, whatever the rank
    return solution[:-1].T, solution[-1]


@torch.no_grad()
def trace(model: DiT, z: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """The tokens before every block and after the last one: L + 1 of [B T, D]."""
    x, condition = model.embed(z, t, y)
    tokens_before = [x]
    for block in model.blocks:
        tokens_before.append(x := block(x, condition))
    return [tokens.flatten(0, 1) for tokens in tokens_before]


def fit_stitches(pool: Pool, z: Tensor, t: Tensor, y: Tensor) -> None:
    """Initialize every stitch as the mean, over the routes that share it, of the least-squares maps from the output of
    the front block to the usual input of the back block."""
    traces = [trace(anchor, z, t, y) for anchor in pool.anchors]  # type: ignore[arg-type]
    solved: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for route in pool.routes:
        if route.last is not None and route.first is not None:
            source, target = traces[route.anchor][route.last + 1], traces[route.anchor + 1][route.first]
            solved.setdefault(pool.stitch_key(route), []).append(least_squares(source, target))
    with torch.no_grad():
        for key, maps in solved.items():
            stitch = pool.stitches[key]
            stitch.weight.copy_(torch.stack([weight for weight, _ in maps]).mean(0))  # type: ignore[operator]
            stitch.bias.copy_(torch.stack([bias for _, bias in maps]).mean(0))  # type: ignore[operator]


# --- cost ------------------------------------------------------------------------------------------------------------


def pool_cost(pool: Pool, routes: Sequence[Route], batch: int, also: int = 0) -> ModelCost:
    """The mean cost of a sample over these routes. `also`: additional forward multiply-adds, such as those of maps."""
    parts = [_route_macs(pool, route, batch) for route in routes]
    forward, training, saved = (math.fsum(values) / len(parts) for values in zip(*parts))
    numbers = [(p.numel(), p.requires_grad) for p in pool.parameters()]
    return ModelCost(
        forward=2 * forward,
        training=2 * (training + 3 * also),
        saved_for_backward=saved,
        stored=sum(n for n, _ in numbers),
        trained=sum(n for n, trains in numbers if trains),
    )


def _route_macs(pool: Pool, route: Route, batch: int) -> tuple[float, float, float]:
    """(multiply-adds forward, forward and backward, numbers saved for the backward pass) of a sample on a route."""
    forward = training = saved = 0.0
    segments = pool.segments(route)
    for index, (anchor, blocks) in enumerate(segments):
        arch, d = anchor.arch, anchor.arch.hidden_size
        for layer in blocks:
            for matrix in MATRICES:
                module = anchor.blocks[layer].get_submodule(matrix)
                rows = arch.rows(matrix, batch)
                forward += module.multiply_adds(rows, backward=False) / batch  # type: ignore[operator]
                training += module.multiply_adds(rows, backward=True) / batch  # type: ignore[operator]
        first, last = index == 0, index == len(segments) - 1
        patches = arch.num_tokens * d * arch.patch_size**2
        outside = (
            256 * d + d * d + first * patches * arch.in_channels + last * (patches * arch.out_channels + 2 * d * d)
        )
        if not last:
            outside += arch.num_tokens * d * pool.width(route.anchor + 1)  # the stitch
        rest = attention_macs(arch.with_depth(1)) * len(blocks) + outside
        forward, training = forward + rest, training + 3 * rest
    return forward, training, saved
