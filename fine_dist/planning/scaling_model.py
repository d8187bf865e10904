"""The time of a step on P processes, predicted from its parts on one: the model behind `fine-dist plan --scale`.

P processes, k micro-batches of b samples per process and step, n trained parameters; messages are fp32, 4 bytes each.

    compute   s (k (forward(b) + backward(b)) + fixed + n-work)      n-work (AdamW, EMA): all, or 1/P under ZeRO
    ring      all-reduce      2 (P - 1) (a + m / (P B))              m bytes, a seconds per hop, B bytes/s
              all-gather        (P - 1) (a + m / (P B))              reduce-scatter is the same
    step      compute + communication - communication that overlaps with the passes

(ring: Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.) All
hops of a ring advance together, so a and B are those of the slowest link. s >= 1 is the slowdown of a process by the
others of its node, such as four on two cores.

The messages are those of the engine, which `tests/planning/test_scale.py` counts:

    ZeRO-0 (plain)  all-reduces of n in buckets during the backward pass
    ZeRO-1          all-reduces of n in buckets, once per step; an all-gather of the n updated weights
    ZeRO-2          the same, but gradients are summed for every micro-batch
    ZeRO-3          an all-gather of n for every micro-batch, in the backward pass again of what exceeds `LIVE`
                    parameters, and a reduce-scatter of n; tensors of at most `PERSISTENT` values are gathered once
                    instead, after the update
    FSDP2           for every micro-batch an all-gather of the root's parameters and of each block's, again of each
                    block's in the backward pass, frozen ones too (in bf16: half the bytes), and a reduce-scatter of n,
                    a message for each block and the root
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from fine_dist.core.errors import ConfigError
from fine_dist.engine.deepspeed_json import BUCKET, LIVE
from fine_dist.engine.settings import BUCKET_BYTES
from fine_dist.planning.memory import Groups

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
HOPS: dict[Collective, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Passes around the ring of each collective."""
Sharding: TypeAlias = int | str
"""A stage of ZeRO, 0 being the plain backend, or `fsdp2`."""
FSDP2 = "fsdp2"
STAGES: tuple[Sharding, ...] = (0, 1, 2, 3, FSDP2)
SIZE = 4
"""Bytes of each value that is sent: gradients and weights are fp32 in every precision."""


PERSISTENT = 100_000
"""Maximum number of values of a tensor that ZeRO-3 does not partition: DeepSpeed's default."""


class Affine(NamedTuple):
    """Seconds of a pass over b samples: base + b * sample."""

    base: float
    sample: float

    def at(self, samples: int) -> float:
        """Seconds of a number of samples."""
        return self.base + self.sample * samples


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of a step of a single process, and sizes of its model."""

    forward: Affine
    backward: Affine
    per_number_s: float
    """Seconds of AdamW and the EMA over all trained parameters, which ZeRO divides."""
    fixed_s: float
    """Seconds of the work of every process, whatever their number: the loop, copies of gradients, clipping."""
    trained: int
    """Number of trained parameters."""
    tensors: int = 1
    """Number of their tensors; ZeRO-3 gathers each separately if messages are not grouped."""
    small: int = 0
    """Number of trained parameters in tensors of at most `PERSISTENT` values."""
    small_tensors: int = 0
    groups: Groups | None = None
    """Groups that fsdp2 gathers. None, as in files of an earlier version: all trained parameters in one group."""


def counts(trained: Sequence[Any]) -> tuple[int, int, int, int]:
    """(values, tensors) of trained parameters, and the same for tensors of at most `PERSISTENT` values."""
    sizes = [p.numel() for p in trained]
    small = [size for size in sizes if size <= PERSISTENT]
    return sum(sizes), len(sizes), sum(small), len(small)


class Link(NamedTuple):
    """The time of one hop of a ring: latency_s + bytes / bytes_per_s."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Network:
    """Nodes of `per_node` processes, and the links of a ring over them.

    Attributes:
        inside: Link of a process inside its node.
        between: Link from a node to the next; a ring leaves each node once.
        per_node: Processes per node.
        measured: A link for each collective, which replaces both for the number of processes that was measured.
        grouped: Whether messages of one bucket share their latency (NCCL's groups) or follow each other (gloo).
    """

    inside: Link
    between: Link
    per_node: int = 8
    measured: Mapping[Collective, Link] = field(default_factory=dict)
    grouped: bool = True

    def link(self, kind: Collective, processes: int) -> Link:
        """The slowest link that a ring of this many processes crosses, which determines its time."""
        if kind in self.measured:
            return self.measured[kind]
        if processes <= self.per_node:
            return self.inside
        # All hops of a ring advance together, so each takes as long as the
        # slowest, even if only one in eight leaves the node.
        bandwidth = min(self.inside.bytes_per_s, self.between.bytes_per_s)
        return Link(bandwidth, max(self.inside.latency_s, self.between.latency_s))


class Message(NamedTuple):
    """`times` collectives in a step, which together move `numbers` values."""

    kind: Collective
    numbers: float
    times: int
    behind: Literal["forward", "backward"] | None = None
    """The pass with which the backend can overlap it. None: it does not overlap."""


@dataclass(frozen=True)
class Prediction:
    """A step of P processes, whose batch is P * micro * accumulation samples."""

    processes: int
    stage: Sharding
    micro: int
    accumulation: int
    compute_s: float
    communication_s: float
    hidden_s: float
    """Communication that overlaps with the passes."""
    sent_bytes: float
    """Bytes that a process sends in a step (it receives as many)."""
    alone_s: float
    """Time of a single process's step over the same number of samples."""
    memory_bytes: float = 0.0
    """Memory of a process in bytes; 0: not computed."""

    @property
    def step_s(self) -> float:
        return self.compute_s + self.communication_s - self.hidden_s

    @property
    def batch(self) -> int:
        """Samples of a step over all processes."""
        return self.processes * self.micro * self.accumulation

    @property
    def images_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def efficiency(self) -> float:
        """Images per second, divided by P times those of a single process."""
        return self.alone_s / self.step_s


def messages(
    stage: Sharding, parts: Parts, accumulation: int, grouped: bool = True, gathered: float = 1.0
) -> list[Message]:
    """The messages of the engine in a step (see the head of this file), except those of a few bytes.

    Args:
        grouped: Whether messages of one bucket share their latency.
        gathered: Bytes of a gathered value divided by `SIZE`: 0.5 if fsdp2 gathers bf16.
    """
    if stage == FSDP2:
        groups, k = parts.groups or Groups(1, parts.trained, 0, 1, False), accumulation
        inside = Message("all_gather", k * gathered * groups.in_blocks, k * groups.num_blocks, "forward")
        root = Message("all_gather", k * gathered * groups.at_root, k * (groups.at_root > 0), "forward")
        times = groups.trained_blocks + groups.trained_root
        summed = Message("reduce_scatter", k * parts.trained, k * times, "backward")
        return [message for message in (inside, root, inside._replace(behind="backward"), summed) if message.numbers]
    n, buckets = parts.trained, max(1, math.ceil(parts.trained / BUCKET))
    if stage == 0:
        return [Message("all_reduce", n, max(1, math.ceil(SIZE * n / BUCKET_BYTES)), "backward")]
    if stage in (1, 2):
        # ZeRO-2 stores only its share of the gradients, so it reduces them after every micro-batch.
        times = accumulation if stage == 2 else 1
        return [Message("all_reduce", n * times, buckets * times, "backward"), Message("all_gather", n, 1)]
    sent = [Message("reduce_scatter", n * accumulation, buckets * accumulation, "backward")]
    if parts.small:
        sent.append(Message("all_gather", parts.small, 1 if grouped else parts.small_tensors))
    if large := n - parts.small:
        gathers = max(1, math.ceil(large / BUCKET)) if grouped else parts.tensors - parts.small_tensors
        sent.append(Message("all_gather", large * accumulation, gathers * accumulation, "forward"))
        # Up to LIVE parameters stay gathered after the forward pass; only the rest is gathered again.
        if released := max(0, large - LIVE):
            share = max(1, round(gathers * released / large))
            sent.append(Message("all_gather", released * accumulation, share * accumulation, "backward"))
    return sent


def predict(
    parts: Parts, stage: Sharding, network: Network, processes: int, micro: int, accumulation: int = 1, *,
    overlap: float = 0.0, slowdown: float = 1.0, gathered: float = 1.0,
) -> Prediction:  # fmt: skip
    """Predict a step of `processes`, each of which computes `accumulation` micro-batches of `micro` samples.

    Args:
        parts: Timings of a step of a single process.
        stage: Way of sharding.
        network: Links between the processes.
        overlap: Share (0 to 1) of a pass's time with which communication may overlap.
        slowdown: Factor by which the other processes of its node slow a process down.
        gathered: As in `messages`.
    """
    if stage not in STAGES:
        raise ConfigError(f"ZeRO stage {stage}: legal: {', '.join(map(str, STAGES))}")
    passes = {"forward": accumulation * parts.forward.at(micro), "backward": accumulation * parts.backward.at(micro)}
    share = 1 / processes if stage else 1.0
    alone = sum(passes.values()) + parts.fixed_s + parts.per_number_s
    compute = slowdown * (sum(passes.values()) + parts.fixed_s + parts.per_number_s * share)
    total, sent, hideable = 0.0, 0.0, {"forward": 0.0, "backward": 0.0}
    if processes > 1:
        # The loop's own small all-reduce, in which ranks agree on the loss.
        losses = Message("all_reduce", 4.0 * (1 + processes), 1)
        for message in [*messages(stage, parts, accumulation, network.grouped, gathered), losses]:
            seconds = ring_s(message, network, processes)
            total += seconds
            sent += HOPS[message.kind] * (processes - 1) / processes * SIZE * message.numbers
            if message.behind:
                hideable[message.behind] += seconds
    # Communication overlaps only with its own pass, and for no longer than the given share of it.
    hidden = sum(min(hideable[name], overlap * slowdown * passes[name]) for name in passes)
    return Prediction(processes, stage, micro, accumulation, compute, total, hidden, sent, alone)


def ring_s(message: Message, network: Network, processes: int) -> float:
    """Seconds of a message over a ring: at every hop the latency and the time of a P-th of its bytes."""
    link = network.link(message.kind, processes)
    hops = HOPS[message.kind] * (processes - 1)
    return hops * (message.times * link.latency_s + SIZE * message.numbers / processes / link.bytes_per_s)


# --- the request -----------------------------------------------------------------------------------------------------

GLOO_PROCESSES = 16
"""Maximum number of local processes for measurements of links."""


@dataclass(frozen=True)
class ScalingRequest:
    """What to predict, and what the user states about the machines."""

    processes: tuple[int, ...]
    stages: tuple[Sharding, ...] = STAGES
    hold: str = "process"
    per_node: int = 8
    gigabytes_per_s: tuple[float, float] = (150.0, 25.0)
    """GB/s of a process inside its node, and between nodes."""
    microseconds: tuple[float, float] = (5.0, 15.0)
    overlap: float = 0.0
    cores: int | None = None
    """Cores of a node, which its processes share. None: each process has its own device."""
    gloo: bool = False

    def check(self) -> None:
        """Raise `ConfigError` for an impossible value."""
        for flag, values in (("scale", self.processes), ("per-node", (self.per_node,)), ("cores", (self.cores or 1,))):
            if low := [value for value in values if value < 1]:
                raise ConfigError(f"--{flag}: {low[0]}; give 1 or more")
        if len(set(self.processes)) < len(self.processes):
            raise ConfigError(f"--scale: {' '.join(map(str, self.processes))}: a number is given twice; give each once")
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ConfigError(f"--zero: {unknown[0]}; legal: {', '.join(map(str, STAGES))}")
        for flag, pair, least in (("bandwidth", self.gigabytes_per_s, 1e-9), ("latency", self.microseconds, 0.0)):
            if low_value := [value for value in pair if not least <= value < float("inf")]:
                raise ConfigError(f"--{flag}: {low_value[0]:g}; give two numbers above 0: inside a node, between nodes")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"--overlap: {self.overlap:g}; give a share of the passes, from 0 to 1")
        if self.gloo and max(self.processes) > GLOO_PROCESSES:
            raise ConfigError(
                f"--gloo: measures at most {GLOO_PROCESSES} local processes (got {max(self.processes)}); "
                "for more, give --bandwidth and --latency"
            )

    @property
    def network(self) -> Network:
        """The network with the stated links."""
        inside, between = (Link(g * 1e9, us * 1e-6) for g, us in zip(self.gigabytes_per_s, self.microseconds))
        return Network(inside, between, self.per_node)
