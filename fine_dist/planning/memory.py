"""The memory of a training process, estimated from the architecture before anything starts.

Counted: weights, gradients, Adam's moments, the EMA, buffers, and the activations the backward pass keeps; each divided
over processes where ZeRO shards it. Not counted: the allocator's slack, the CUDA context (about 0.5 GiB), NCCL's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fine_dist.core.limits import GIB
from fine_dist.engine.deepspeed_json import BUCKET, LIVE
from fine_dist.engine.settings import EngineConfig
from fine_dist.model.arch import Arch

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Memory:
    """Memory of one process in bytes, on its accelerator; `host` is host memory (on a CPU the two are the same)."""

    weights: float
    masters: float
    """ZeRO-1 and 2: a second copy of the process's share of the weights, which its optimizer updates."""
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buffers: float
    """Buffers of reductions and gathers."""
    second_model: float
    """Rank 0's copy of the model with the EMA's weights, for held-out losses and previews."""
    teacher: float = 0.0
    """The frozen model that distillation imitates."""
    encoder: float = 0.0
    """The frozen image encoder that REPA aligns with, where it runs at every step."""
    host: float = 0.0
    """The copy of the state that a checkpoint is written from, and offloaded state."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values()) - self.host

    def lines(self) -> list[str]:
        """Lines of a table in GiB."""
        rows = [(key.replace("_", " "), value) for key, value in asdict(self).items() if key != "host"]
        rows += [("total", self.total), ("host memory", self.host)]
        return [f"  {name:12} {value / GIB:9.3f} GiB" for name, value in rows if value or name == "total"]


@dataclass(frozen=True)
class Groups:
    """What fsdp2 gathers together: the parameters of each block, and those of the root.

    Args:
        num_blocks: Number of blocks.
        in_blocks: Numbers in all blocks.
        at_root: Numbers outside them: embedders, the final layer, genes that blocks share.
        trained_blocks: Number of blocks in which something trains.
        trained_root: Whether something trains at the root.
    """

    num_blocks: int
    in_blocks: int
    at_root: int = 0
    trained_blocks: int = 0
    trained_root: bool = True


def groups_of(model: nn.Module) -> Groups:
    """The groups of a model, on any device."""
    blocks = list(getattr(model, "blocks", ()))
    inside = {p for block in blocks for p in block.parameters()}
    outside = [p for p in model.parameters() if p not in inside]
    return Groups(
        len(blocks),
        sum(p.numel() for p in inside),
        sum(p.numel() for p in outside),
        sum(any(p.requires_grad for p in block.parameters()) for block in blocks),
        any(p.requires_grad for p in outside),
    )


def gathered_bytes(groups: Groups, engine: EngineConfig) -> float:
    """Bytes of fsdp2's buffers: the root's weights for the whole pass, a block's and the next one's, and the gradients
    of the root and a block before they are divided."""
    size, block = (2 if engine.gather_dtype == "bf16" else 4), groups.in_blocks / max(1, groups.num_blocks)
    return size * (groups.at_root + 2 * block) + size * (groups.at_root + block)


@dataclass(frozen=True)
class Projector:
    """What REPA adds to a model: an MLP of three layers from the model's width to the image encoder's, and the encoder.

    Args:
        hidden: Width of its two hidden layers.
        width: Width E of the encoder's tokens.
        encoder_bytes: The encoder's weights; 0 where the shards hold its tokens.
    """

    hidden: int
    width: int
    encoder_bytes: int = 0

    def numbers(self, arch: Arch) -> int:
        """Its parameters, all of which train."""
        d, h, e = arch.hidden_size, self.hidden, self.width
        return d * h + h + h * h + h + h * e + e

    def activation_bytes(self, arch: Arch, engine: EngineConfig, micro_batch: int) -> int:
        """Bytes that its backward pass keeps: inputs of the layers and of the activations, and its output in fp32, with
        the tokens that it is compared with."""
        size = 2 if engine.precision == "bf16" else 4
        per_token = (arch.hidden_size + 4 * self.hidden + self.width) * size + 2 * 4 * self.width
        return micro_batch * arch.num_tokens * per_token


def estimate(
    arch: Arch,
    engine: EngineConfig,
    *,
    micro_batch: int,
    world_size: int,
    num_params: int,
    num_trained: int,
    kept: float = 0.0,
    teacher: int = 0,
    projector: Projector | None = None,
    groups: Groups | None = None,
    shows: bool = True,
) -> Memory:
    """The memory of one process; of rank 0, which needs most.

    num_params, num_trained: numbers in the model, and those of them that train.

    Args:
        kept: Numbers that a sample's backward pass keeps beyond those of a dense model's
            (`model.flops.ModelCost.kept`).
        teacher: Numbers in a frozen model that is asked at every step, held in the compute precision.
        projector: REPA's, with the image encoder before it; None without REPA.
        groups: How fsdp2 groups the parameters; None: all of them lie in the blocks.
        shows: Whether held-out losses or pictures are made, which takes a second model.
    """
    sharded = engine.backend != "plain"
    stage = {"plain": 0, "deepspeed": engine.deepspeed.stage, "fsdp2": 3}[engine.backend]
    beside = projector.numbers(arch) if projector else 0
    params, trained = 4.0 * (num_params + beside), 4.0 * (num_trained + beside)
    # Optimizer states exist for what trains alone, however large the frozen rest is.
    share = trained / world_size if stage >= 1 else trained
    kept_on_host = engine.backend == "deepspeed" and engine.deepspeed.offload_optimizer
    weights_on_host = engine.backend == "deepspeed" and engine.deepspeed.offload_params
    state = {"masters": share * (stage in (1, 2)), "optimizer": 2 * share, "ema": share}
    weights = params / (world_size if stage == 3 else 1)
    if engine.backend == "fsdp2":
        buffers = gathered_bytes(groups or Groups(arch.num_layers, num_params), engine)
    elif stage == 3:
        # ZeRO-3 frees gathered weights only beyond LIVE numbers, so
        # a smaller model is held whole for the length of a step.
        buffers = min(params, 4.0 * LIVE) + 2 * 4.0 * BUCKET  # gathered weights; gradients in, and their sums out
    elif sharded:
        buffers = 2 * min(trained, 4.0 * BUCKET)
    else:
        buffers = 0.0  # gradients lie in the buckets that are sent
    return Memory(
        weights=0.0 if weights_on_host else weights,
        **({key: 0.0 for key in state} if kept_on_host else state),
        gradients=0.0 if kept_on_host and stage >= 2 else (share if stage >= 2 else trained),
        activations=float(activation_bytes(arch, engine, micro_batch, kept))
        + (projector.activation_bytes(arch, engine, micro_batch) if projector else 0),
        buffers=buffers,
        # A sharded run without pictures still needs it: the weights are gathered into it to be saved.
        second_model=params * (shows or sharded),
        teacher=teacher * (2.0 if engine.precision == "bf16" else 4.0),
        encoder=float(projector.encoder_bytes) if projector else 0.0,
        # Checkpoints are written by a thread from a copy, so that training goes on; the copy lives on the host.
        host=4 * share + (sum(state.values()) + share * (stage >= 2)) * kept_on_host + weights * weights_on_host,
    )


def activation_bytes(arch: Arch, engine: EngineConfig, micro_batch: int, kept: float = 0.0) -> int:
    """Bytes that the backward pass of one micro-batch keeps.

    A block keeps, per token: its input, two normalized and two modulated copies, q, k, v and attention's result, both
    branches' results, and the MLP's hidden layer before and after its activation: 4 D of norms' work in fp32, the rest
    in the compute precision. Attention's scores are never stored. kept: what a sample keeps beyond that, all layers.
    """
    d, tokens, size = arch.hidden_size, arch.num_tokens, 2 if engine.precision == "bf16" else 4
    norms, products = 6 * d, (3 + 1 + 1 + 4 + 4 + 1) * d
    block = tokens * (norms * 4 + products * size) + 6 * d * (size + 4)
    block += round(kept / arch.num_layers * size)
    # Autocast keeps a bf16 copy of every weight it multiplies by.
    casts = 2 * 18 * d * d * arch.num_layers if engine.precision == "bf16" else 0
    layers = arch.num_layers
    if engine.activation_checkpointing == "blocks":
        # Only one block's activations live at a time; of the others
        # the fp32 input remains, from which they are recomputed.
        return casts // arch.num_layers + micro_batch * (block + arch.num_layers * tokens * d * 4)
    if engine.activation_checkpointing == "every_other":
        # Half of the blocks keep their activations, and one of the others has them while it is recomputed.
        layers = arch.num_layers // 2 + 1
        return casts + micro_batch * (layers * block + (arch.num_layers - layers) * tokens * d * 4)
    return casts + micro_batch * layers * block
