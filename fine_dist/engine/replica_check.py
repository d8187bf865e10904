"""Checks that all ranks hold the same weights: at the start, after rank 0 has broadcast its own, and at checkpoints.

Different processor models round differently. The initial weights that each would compute (a decomposition, a random
draw) can differ by tens of percent, so rank 0 broadcasts its weights. From then on all ranks compute the same updates
up to rounding: a difference of that size is repaired, and a larger one is an error that names the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ReportedElsewhere, TrainingError
from fine_dist.engine import dist
from fine_dist.engine.settings import LoopConfig
from fine_dist.engine.world import World

MAX_DRIFT = 1e-4
"""Relative distance of all weights up to which a difference counts as rounding, which adds some 1e-8 per update."""
BROADCAST_BYTES = 256 * 2**20
"""Maximum bytes of one broadcast. Tensors are concatenated, because thousands of small messages cost latency."""


@torch.no_grad()
def broadcast(model: nn.Module, world: World) -> None:
    """Broadcast the weights and buffers of rank 0, in place."""
    broadcast_tensors([tensor.data for tensor in [*model.parameters(), *model.buffers()]], world)


def broadcast_tensors(tensors: list[Tensor], world: World, source: int = 0, node: Any = None) -> None:
    """Broadcast the values of one rank, in place, in few large messages.

    Tensors on a GPU are sent over NCCL, those in host memory over gloo.

    Args:
        tensors: Tensors of any shapes, the same on every rank.
        world: Rank and world size of this process.
        source: The rank whose values are sent.
        node: Process group of the ranks that take part (`dist.node_group`). None: all ranks.
    """
    if world.world_size == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        # A flat message has one dtype and one device.
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        for bucket in _buckets(group, BROADCAST_BYTES):
            flat = dist.broadcast(torch.cat([tensor.reshape(-1) for tensor in bucket]), world, source, node)
            for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(values.view_as(tensor))


def _buckets(tensors: list[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """Divide tensors, in order, into lists of at most `max_bytes` (or of one larger tensor)."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if buckets[-1] and size + num_bytes > max_bytes:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += num_bytes
    return buckets


def check(model: nn.Module, world: World, engine: LoopConfig, when: str) -> str:
    """Compare the weights of all ranks. All ranks must call it at the same point.

    With the plain backend, differences due to rounding are replaced by rank 0's weights. Backends that shard the
    weights (ZeRO-3, FSDP2) have no replicas to compare.

    Args:
        model: This rank's model.
        world: Rank and world size of this process.
        engine: Settings, which name the backend.
        when: Part of the message, such as "at step 100".

    Returns:
        A sentence for the log if weights had drifted, otherwise an empty string.

    Raises:
        TrainingError: A rank's weights differ from rank 0's (`ReportedElsewhere` on the other ranks).
    """
    if world.world_size == 1 or shards_weights(engine):
        return ""
    # Two integers per rank instead of the weights, because the check runs before every checkpoint and must be cheap.
    fingerprints = dist.gather_objects(fingerprint(model), world)
    differing = [rank for rank, prints in enumerate(fingerprints) if prints != fingerprints[0]]
    if not differing:
        return ""
    ranks = ", ".join(map(str, differing))
    # The weights are sent only after the cheap comparison has failed, to distinguish rounding from a fault.
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
    """Whether the backend shards the weights, so that no rank holds all of them between steps."""
    return engine.backend == "fsdp2" or (engine.backend == "deepspeed" and engine.deepspeed.stage == 3)


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[int]:
    """Two sums over the bits of all parameters, which are equal for equal weights and almost surely different
    otherwise.

    The plain sum detects a changed bit; the sum weighted by position also detects two values that were swapped. Both
    are computed on the model's device and read together, so that the host waits once."""
    sums = []
    for index, p in enumerate(model.parameters()):
        # Bits and not values, because sums of floats round, NaN is unequal to itself, and -0 equals 0.
        bits = p.detach().reshape(-1).view(torch.int32 if p.element_size() == 4 else torch.int16).long()
        # 8191 is prime, and the sum stays far below an overflow
        weights = torch.arange(len(bits), device=bits.device) % 8191 + 1
        sums.append(torch.stack([bits.sum(), (index + 1) * (bits * weights).sum()]))
    plain, weighted = zip(*torch.stack(sums).tolist())
    return [sum(plain), sum(weighted)]


@torch.no_grad()
def distance(model: nn.Module, world: World, adopt: bool) -> float:
    """Relative distance ||w - w0|| / ||w0|| of this rank's weights w from rank 0's w0.

    Args:
        model: This rank's model.
        world: Rank and world size of this process.
        adopt: Whether to copy rank 0's weights when the distance is at most `MAX_DRIFT`.
    """
    difference = norm = 0.0
    references = []
    for p in model.parameters():
        # A clone, because `broadcast` overwrites its argument and this rank's weights are needed for the difference.
        reference = dist.broadcast(p.data.clone(), world)
        difference += float((p.data - reference).double().square().sum())
        norm += float(reference.double().square().sum())
        references.append(reference)
    relative: float = (difference / max(norm, 1e-30)) ** 0.5
    # Larger differences are not repaired: the run stops, and both
    # sets of weights remain available for finding the fault.
    if adopt and relative <= MAX_DRIFT:
        for p, reference in zip(model.parameters(), references):
            p.data.copy_(reference)
    return relative
