"""Ranks that hold the same weights: made once and sent, then compared at the start and at every checkpoint.

Processors of different kinds round differently. What they would each make for themselves (a decomposition, a draw) can
differ by tens of percent, so rank 0's is sent. From then on they compute the same updates but for rounding: such a
drift is mended where it is found, anything larger is an error.
"""

from __future__ import annotations

import torch
from torch import nn

from fine_dist.core.errors import ToldElsewhere, TrainingError
from fine_dist.engine import dist
from fine_dist.engine.dist import World
from fine_dist.engine.settings import LoopConfig

DRIFT = 1e-4
"""Relative distance of all weights up to which a difference is rounding: some 1e-8 an update."""


@torch.no_grad()
def broadcast(model: nn.Module, world: World) -> None:
    """Rank 0's weights and buffers on every rank."""
    if world.world_size > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, world)


def check(model: nn.Module, world: World, engine: LoopConfig, when: str) -> str:
    """Compare the weights of all ranks; what is worth saying, or nothing. All ranks call it alike.

    A difference of rounding is mended by rank 0's weights (where every rank has its own: the plain backend). Under
    ZeRO-3 no rank holds them all: not asked. `TrainingError` when a rank holds other weights than rank 0.
    """
    if world.world_size == 1 or (engine.backend == "deepspeed" and engine.deepspeed.stage == 3):
        return ""
    prints = dist.gather_objects(fingerprint(model), world)
    odd = [rank for rank, found in enumerate(prints) if found != prints[0]]
    if not odd:
        return ""
    ranks = ", ".join(map(str, odd))
    apart = max(dist.gather_objects(distance(model, world, adopt=engine.backend == "plain"), world))
    if apart <= DRIFT:
        return f"{when}, the weights of rank {ranks} had drifted by {apart:.1e} in rounding (mixed processors?); mended"
    why = (
        f"{when}, the weights of rank {ranks} are not those of rank 0 (relative distance {apart:.1e}); a process "
        "computes differently: another library, or a fault of its memory; look at its machine"
    )
    raise TrainingError(why) if world.is_main else ToldElsewhere(why)


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[int]:
    """Two sums over the bits of all parameters: equal for equal weights, and as good as never for others."""
    plain = weighted = 0
    for index, p in enumerate(model.parameters()):
        bits = p.detach().reshape(-1).view(torch.int32 if p.element_size() == 4 else torch.int16).long()
        places = torch.arange(len(bits), device=bits.device) % 8191 + 1
        plain += int(bits.sum())
        weighted += (index + 1) * int((bits * places).sum())
    return [plain, weighted]


@torch.no_grad()
def distance(model: nn.Module, world: World, adopt: bool) -> float:
    """||w - w0|| / ||w0|| of this rank's weights to rank 0's. adopt: rank 0's are taken, where they are near."""
    apart = whole = 0.0
    kept = []
    for p in model.parameters():
        theirs = dist.broadcast(p.data.clone(), world)
        apart += float((p.data - theirs).double().square().sum())
        whole += float(theirs.double().square().sum())
        kept.append(theirs)
    relative = (apart / max(whole, 1e-30)) ** 0.5
    if adopt and relative <= DRIFT:
        for p, theirs in zip(model.parameters(), kept):
            p.data.copy_(theirs)
    return relative
