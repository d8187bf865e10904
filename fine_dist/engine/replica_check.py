"""Checks that all ranks hold the same weights: at the start, after rank 0 has sent its own, and at every checkpoint.

Processors of different kinds round differently. What each would compute for itself at the start (a decomposition, a
random draw) can differ by tens of percent, so rank 0's weights are sent to all. From then on every rank computes the
same update but for rounding: a difference of that size is repaired, and a larger one is an error that names the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ReportedElsewhere, TrainingError
from fine_dist.engine import dist
from fine_dist.engine.settings import LoopConfig
from fine_dist.engine.world import World

MAX_DRIFT = 1e-4
"""Relative distance of all weights up to which a difference counts as rounding, which adds some 1e-8 an update."""
BROADCAST_BYTES = 256 * 2**20
"""Weights are sent in flat messages of at most this size: thousands of small ones would each cost a latency."""


@torch.no_grad()
def broadcast(model: nn.Module, world: World) -> None:
    """Give every rank the weights and buffers of rank 0, in place."""
    broadcast_tensors([tensor.data for tensor in [*model.parameters(), *model.buffers()]], world)


def broadcast_tensors(tensors: list[Tensor], world: World, source: int = 0, node: Any = None) -> None:
    """Give every rank the values of one rank, in place, in few large messages.

    Tensors travel from where they are: over NCCL on a GPU, over gloo in host memory.

    Args:
        source: The rank whose values are taken.
        node: Process group of the ranks that take part (`dist.node_group`); None: all.
    """
    if world.world_size == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        # A flat message has one type and one device.
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        for bucket in _buckets(group, BROADCAST_BYTES):
            flat = dist.broadcast(torch.cat([tensor.reshape(-1) for tensor in bucket]), world, source, node)
            for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(values.view_as(tensor))


def _buckets(tensors: list[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """The tensors in order, in lists of at most `max_bytes` (or of one tensor that is larger)."""
    found: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if found[-1] and size + num_bytes > max_bytes:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += num_bytes
    return found


def check(model: nn.Module, world: World, engine: LoopConfig, when: str) -> str:
    """Compare the weights of all ranks. All ranks call it at the same point.

    A difference of rounding is repaired with rank 0's weights where every rank holds its own (the plain backend). Where
    no rank holds all weights (ZeRO-3, FSDP2) there is nothing to compare.

    Args:
        model: What this rank holds.
        engine: Says which backend holds it.
        when: Part of the message: "at step 100".

    Returns:
        A sentence for the log when weights had drifted, otherwise an empty string.

    Raises:
        TrainingError: A rank holds other weights than rank 0 (`ReportedElsewhere` on the other ranks).
    """
    if world.world_size == 1 or shards_weights(engine):
        return ""
    # Two integers a rank instead of the weights: the check runs before every checkpoint and must cost next to nothing.
    fingerprints = dist.gather_objects(fingerprint(model), world)
    differing = [rank for rank, found in enumerate(fingerprints) if found != fingerprints[0]]
    if not differing:
        return ""
    ranks = ", ".join(map(str, differing))
    # Only after the cheap comparison has failed are the weights themselves sent, to tell rounding from a fault.
    drift = max(dist.gather_objects(distance(model, world, adopt=engine.backend == "plain"), world))
    if drift <= MAX_DRIFT:
        return (
            f"{when}, the weights of rank {ranks} had drifted by {drift:.1e} in rounding (mixed processors?); they "
            "were replaced by those of rank 0"
        )
    why = (
        f"{when}, the weights of rank {ranks} are not those of rank 0 (relative distance {drift:.1e}); that process "
        "computes differently: it has another library, or its memory is faulty. Check its machine"
    )
    raise TrainingError(why) if world.is_main else ReportedElsewhere(why)


def shards_weights(engine: LoopConfig) -> bool:
    """Whether no rank holds all weights between two steps."""
    return engine.backend == "fsdp2" or (engine.backend == "deepspeed" and engine.deepspeed.stage == 3)


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[int]:
    """Two sums over the bits of all parameters: equal for equal weights, and almost surely different for others.

    The plain sum finds a changed bit; the sum weighted by position also finds two values that changed places. Both are
    taken on the model's device and read together, so the host waits once.
    """
    sums = []
    for index, p in enumerate(model.parameters()):
        # Bits and not values: sums of floats round, NaN is unequal to itself, and -0 equals 0.
        bits = p.detach().reshape(-1).view(torch.int32 if p.element_size() == 4 else torch.int16).long()
        weights = torch.arange(len(bits), device=bits.device) % 8191 + 1  # a prime period, far below an overflow
        sums.append(torch.stack([bits.sum(), (index + 1) * (bits * weights).sum()]))
    plain, weighted = zip(*torch.stack(sums).tolist())
    return [sum(plain), sum(weighted)]


@torch.no_grad()
def distance(model: nn.Module, world: World, adopt: bool) -> float:
    """||w - w0|| / ||w0|| of this rank's weights w to rank 0's w0.

    Args:
        adopt: Take rank 0's weights when the distance is at most `MAX_DRIFT`.
    """
    difference = norm = 0.0
    references = []
    for p in model.parameters():
        # A clone, because `broadcast` writes into its argument and the own weights are still needed for the difference.
        reference = dist.broadcast(p.data.clone(), world)
        difference += float((p.data - reference).double().square().sum())
        norm += float(reference.double().square().sum())
        references.append(reference)
    relative: float = (difference / max(norm, 1e-30)) ** 0.5
    # Larger differences are left as they are: the run stops, and
    # whoever looks for the fault finds both sets of weights.
    if adopt and relative <= MAX_DRIFT:
        for p, reference in zip(model.parameters(), references):
            p.data.copy_(reference)
    return relative
