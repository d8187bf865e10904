"""The time of a step on P processes, predicted from its parts on one: the model behind `fine-dist plan --scale`.

P processes, k micro-batches of b samples a process and step, n numbers that train; what travels is fp32, 4 bytes each.

    compute   s (k (forward(b) + backward(b)) + fixed + n-work)      n-work (AdamW, EMA): whole, or 1/P under ZeRO
    ring      all-reduce      2 (P - 1) (a + m / (P B))              m bytes, a seconds a hop, B bytes/s a process
              all-gather        (P - 1) (a + m / (P B))              reduce-scatter is the same
    step      compute + communication - what is hidden behind the passes

(ring: Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.) A ring over
several nodes crosses the slowest link at every hop, so that link's a and B count. s >= 1 is how much slower a process
computes while all of a node do, such as four on two cores.

What is sent is what the engine sends, counted in `tests/planning/test_scale.py`:

    ZeRO-0 (plain)  all-reduces of n in buckets, while the backward pass runs
    ZeRO-1          all-reduces of n in buckets, once a step; an all-gather of the n updated weights
    ZeRO-2          the same, but gradients are summed for every micro-batch
    ZeRO-3          an all-gather of n for every micro-batch, again in the backward pass of what was not kept (more than
                    `LIVE` numbers are not), and a reduce-scatter of n; tensors of at most `PERSISTENT` numbers are
                    gathered once instead, after the update
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
"""Bytes of each number sent: gradients and weights are fp32 in every precision."""


PERSISTENT = 100_000
"""Maximum size of a tensor that ZeRO-3 does not partition: DeepSpeed's default."""


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
    """Number of their tensors; ZeRO-3 gathers each by itself where messages are not grouped."""
    small: int = 0
    """Numbers of them in tensors of at most `PERSISTENT`."""
    small_tensors: int = 0
    groups: Groups | None = None
    """What fsdp2 gathers together; None (a file of an earlier version): all that trains, in one group."""


def counts(trained: Sequence[Any]) -> tuple[int, int, int, int]:
    """Of parameters that train: numbers, tensors, and both of those of at most `PERSISTENT` numbers."""
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

    inside, between: of a process inside its node, and of a node to the next (the ring leaves each node once).
    measured:        a link for each collective, in place of both; for the number of processes it was measured at.
    grouped:         whether the messages of one bucket share their latency (NCCL's groups) or follow each other (gloo).
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
        # All hops of a ring go in step, so each lasts as long as
        # its slowest, even where one hop in eight leaves the node.
        bandwidth = min(self.inside.bytes_per_s, self.between.bytes_per_s)
        return Link(bandwidth, max(self.inside.latency_s, self.between.latency_s))


class Message(NamedTuple):
    """`times` collectives that move `numbers` between them, in one step."""

    kind: Collective
    numbers: float
    times: int
    behind: Literal["forward", "backward"] | None = None
    """The pass that it can overlap with, where the backend does that."""


@dataclass(frozen=True)
class Prediction:
    """One step of P processes; a step's batch is P * micro * accumulation."""

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
    """Memory of a process; 0 where it was not asked for."""

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
    """The messages of the engine in a step (see the head of this file), without those of a few bytes.

    Args:
        grouped: Whether messages of one bucket share their latency.
        gathered: Bytes of a gathered number, over `SIZE`: 0.5 where fsdp2 gathers bf16.
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
        # ZeRO-2 keeps only its share of the gradients between micro-batches, so it must reduce each one's at once.
        times = accumulation if stage == 2 else 1
        return [Message("all_reduce", n * times, buckets * times, "backward"), Message("all_gather", n, 1)]
    found = [Message("reduce_scatter", n * accumulation, buckets * accumulation, "backward")]
    if parts.small:
        found.append(Message("all_gather", parts.small, 1 if grouped else parts.small_tensors))
    if large := n - parts.small:
        gathers = max(1, math.ceil(large / BUCKET)) if grouped else parts.tensors - parts.small_tensors
        found.append(Message("all_gather", large * accumulation, gathers * accumulation, "forward"))
        # What stays within LIVE is still gathered from the forward pass and needs no second gathering.
        if again := max(0, large - LIVE):
            share = max(1, round(gathers * again / large))
            found.append(Message("all_gather", again * accumulation, share * accumulation, "backward"))
    return found


def predict(
    parts: Parts, stage: Sharding, network: Network, processes: int, micro: int, accumulation: int = 1, *,
    overlap: float = 0.0, slowdown: float = 1.0, gathered: float = 1.0,
) -> Prediction:  # fmt: skip
    """One step of `processes`, of which each takes `accumulation` micro-batches of `micro` samples.

    Args:
        overlap: Share (0 to 1) of a pass's seconds that communication may run beside.
        slowdown: How much slower a process computes while the others of its node do.
        gathered: As of `messages`.
    """
    if stage not in STAGES:
        raise ConfigError(f"ZeRO stage {stage}: legal: {', '.join(map(str, STAGES))}")
    passes = {"forward": accumulation * parts.forward.at(micro), "backward": accumulation * parts.backward.at(micro)}
    share = 1 / processes if stage else 1.0
    alone = sum(passes.values()) + parts.fixed_s + parts.per_number_s
    compute = slowdown * (sum(passes.values()) + parts.fixed_s + parts.per_number_s * share)
    total, sent, hideable = 0.0, 0.0, {"forward": 0.0, "backward": 0.0}
    if processes > 1:
        # and the loop's own few words, in which ranks agree on the loss
        words = Message("all_reduce", 4.0 * (1 + processes), 1)
        for message in [*messages(stage, parts, accumulation, network.grouped, gathered), words]:
            seconds = ring_s(message, network, processes)
            total += seconds
            sent += HOPS[message.kind] * (processes - 1) / processes * SIZE * message.numbers
            if message.behind:
                hideable[message.behind] += seconds
    # Communication hides only behind its own pass, and never behind more of it than there is.
    hidden = sum(min(hideable[name], overlap * slowdown * passes[name]) for name in passes)
    return Prediction(processes, stage, micro, accumulation, compute, total, hidden, sent, alone)


def ring_s(message: Message, network: Network, processes: int) -> float:
    """Seconds of a message over a ring: hops of latency, and a P-th of its bytes at every hop."""
    link = network.link(message.kind, processes)
    hops = HOPS[message.kind] * (processes - 1)
    return hops * (message.times * link.latency_s + SIZE * message.numbers / processes / link.bytes_per_s)


# --- what is asked for -----------------------------------------------------------------------------------------------

GLOO_PROCESSES = 16
"""Local processes that links are measured between, at most."""


@dataclass(frozen=True)
class ScalingRequest:
    """What is predicted, and what is stated of the machines."""

    processes: tuple[int, ...]
    stages: tuple[Sharding, ...] = STAGES
    hold: str = "process"
    per_node: int = 8
    gigabytes_per_s: tuple[float, float] = (150.0, 25.0)
    """Of a process inside its node, and between nodes."""
    microseconds: tuple[float, float] = (5.0, 15.0)
    overlap: float = 0.0
    cores: int | None = None
    """Cores of a node, which its processes share; none: each has its own device."""
    gloo: bool = False

    def check(self) -> None:
        """`ConfigError` for what no machine has."""
        for flag, values in (("scale", self.processes), ("per-node", (self.per_node,)), ("cores", (self.cores or 1,))):
            if low := [value for value in values if value < 1]:
                raise ConfigError(f"--{flag}: {low[0]}; give 1 or more")
        if len(set(self.processes)) < len(self.processes):
            raise ConfigError(f"--scale: {' '.join(map(str, self.processes))}: a number of processes is given twice")
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ConfigError(f"--zero: {unknown[0]}; legal: {', '.join(map(str, STAGES))}")
        for flag, pair, least in (("bandwidth", self.gigabytes_per_s, 1e-9), ("latency", self.microseconds, 0.0)):
            if low_value := [value for value in pair if not least <= value < float("inf")]:
                raise ConfigError(f"--{flag}: {low_value[0]:g}; give two numbers above 0: inside a node, between nodes")
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"--overlap: {self.overlap:g}; give a share of the passes, from 0 to 1")
        if self.gloo and max(self.processes) > GLOO_PROCESSES:
            raise ConfigError(
                f"--gloo: measures between local processes, {GLOO_PROCESSES} at most (got {max(self.processes)}); "
                "for more, state --bandwidth and --latency"
            )

    @property
    def network(self) -> Network:
        """The links as stated."""
        inside, between = (Link(g * 1e9, us * 1e-6) for g, us in zip(self.gigabytes_per_s, self.microseconds))
        return Network(inside, between, self.per_node)
