"""What a training process needs in memory, estimated from the architecture before anything is started.

Counted: weights, gradients, Adam's moments, the EMA, and the activations the backward pass keeps; each divided over
processes where ZeRO shards it. Not counted: the allocator's slack, the CUDA context (about 0.5 GiB) and NCCL's buffers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from fine_dist.config import EngineConfig
from fine_dist.model.factors import cheaper_path
from fine_dist.model.zoo import KINDS, Arch

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes a process needs on its accelerator (on a CPU: in host memory)."""

    weights: float
    gradients: float
    optimiser: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def lines(self) -> list[str]:
        """A table to print, in GiB."""
        rows = [*asdict(self).items(), ("total", self.total)]
        return [f"  {name:12} {value / GIB:9.3f} GiB" for name, value in rows]


def estimate(
    arch: Arch,
    engine: EngineConfig,
    *,
    micro_batch: int,
    world_size: int,
    num_params: int,
    num_trained: int,
    rank: int | None,
) -> Memory:
    """The memory of one process.

    num_params, num_trained: numbers in the model, and those of them that train.
    rank: components of the factors when blocks are composed from them, else none.
    """
    stage = engine.deepspeed.stage if engine.backend == "deepspeed" else 0
    offload = engine.backend == "deepspeed" and engine.deepspeed.offload_optimizer
    params, trained = 4.0 * num_params, 4.0 * num_trained
    return Memory(
        weights=params / (world_size if stage >= 3 else 1),
        gradients=trained / (world_size if stage >= 2 else 1),
        optimiser=0.0 if offload else 2 * trained / (world_size if stage >= 1 else 1),
        ema=trained / (world_size if stage >= 3 else 1),
        activations=float(activation_bytes(arch, engine, micro_batch, rank)),
    )


def activation_bytes(arch: Arch, engine: EngineConfig, micro_batch: int, rank: int | None = None) -> int:
    """Bytes that the backward pass of one micro-batch keeps.

    A block keeps, per token: its input, two normalised and two modulated copies, q, k, v and attention's result, both
    branches' results, and the MLP's hidden layer before and after its activation: 4 D of norms' work in fp32, the rest
    in the compute precision. Attention's scores are never stored. A factored product adds its R numbers a row, twice.
    """
    d, tokens, size = arch.hidden_size, arch.num_tokens, 2 if engine.precision == "bf16" else 4
    norms, products = 6 * d, (3 + 1 + 1 + 4 + 4 + 1) * d
    block = tokens * (norms * 4 + products * size) + 6 * d * (size + 4)
    if rank is not None:
        for kind in KINDS:
            rows = arch.rows(kind, micro_batch)
            path = cheaper_path(rows, *arch.matrix(kind), rank, train_factors=True, train_scalers=True)
            block += 2 * rank * size * arch.rows(kind, 1) * (path == "factored")
    # Autocast keeps a bf16 copy of every weight it multiplies by.
    casts = 2 * 18 * d * d * arch.num_layers if engine.precision == "bf16" else 0
    kept = arch.num_layers
    if engine.activation_checkpointing == "blocks":
        return casts // arch.num_layers + micro_batch * (block + arch.num_layers * tokens * d * 4)
    if engine.activation_checkpointing == "every_other":
        kept = arch.num_layers // 2 + 1
        return casts + micro_batch * (kept * block + (arch.num_layers - kept) * tokens * d * 4)
    return casts + micro_batch * kept * block
