"""The memory of a training process, estimated from the architecture before anything starts.

Counted: weights, gradients, Adam's moments, the EMA, buffers, and the activations the backward pass keeps; each divided
over processes where ZeRO shards it. On an accelerator three parts are added that are no tensors of ours: what the
caching allocator holds and cannot use, the buffers of NCCL, and the CUDA context.
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

ALLOCATOR_SHARE = 0.1
"""Share of what a step allocates and frees that the allocator holds beside it. A choice, not a measurement: torch
rounds requests of more than 1 MiB up to 2 MiB, cuts smaller ones from blocks of 2 MiB, and keeps the holes."""
NCCL_CHANNELS, NCCL_CONNECTIONS = 16, 3
"""Channels of a communicator, and connections that a channel receives from: a ring's, and a tree's two. A choice: NCCL
takes 2 to 32 channels, by what links the GPUs."""
NCCL_CONNECTION_BYTES = 2**22 + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16
"""Buffers of a connection, for the protocols Simple (4 MiB, NCCL_BUFFSIZE), LL128 (4.7 MiB) and LL (0.5 MiB): the
defaults in NCCL's src/init.cc."""
CONTEXT_BYTES = 2**29
"""What the driver holds for a process: code of kernels, cuBLAS's workspace. A choice: 0.3 to 0.6 GiB are usual."""


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
    bf16_copies: float = 0.0
    """Copies of the weights that bf16 products read, kept by the engine or by autocast."""
    allocator_margin: float = 0.0
    """What the caching allocator holds and cannot use."""
    nccl: float = 0.0
    """Buffers of one communicator."""
    cuda_context: float = 0.0
    host: float = 0.0
    """The copy of the state that a checkpoint is written from, and offloaded state."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values()) - self.host

    @property
    def tensors(self) -> float:
        """The part that is tensors: what torch calls allocated memory."""
        return self.total - self.allocator_margin - self.nccl - self.cuda_context

    @property
    def parts(self) -> str:
        """The total in words: tensors, and on an accelerator what comes on top."""
        rows = {"tensors": self.tensors, "allocator": self.allocator_margin, "NCCL": self.nccl,
                "CUDA": self.cuda_context}  # fmt: skip
        return ", ".join(f"{name} {value / GIB:.1f}" for name, value in rows.items() if value)

    def lines(self) -> list[str]:
        """Lines of a table in GiB."""
        rows = [(key.replace("_", " "), value) for key, value in asdict(self).items() if key != "host"]
        rows += [("total", self.total), ("host memory", self.host)]
        return [f"  {name:16} {value / GIB:9.3f} GiB" for name, value in rows if value or name == "total"]


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
    accelerator: bool = False,
) -> Memory:
    """The memory of one process; of rank 0, which needs most.

    num_params, num_trained: numbers in the model, and those of them that train.

    Args:
        kept: Numbers that a sample's backward pass keeps beyond those of a dense model's
            (`model.flops.ModelCost.saved_for_backward`).
        teacher: Numbers in a frozen model that is asked at every step, held in the compute precision.
        projector: REPA's, with the image encoder before it; None without REPA.
        groups: How fsdp2 groups the parameters; None: all of them lie in the blocks.
        shows: Whether held-out losses or pictures are made, which takes a second model.
        accelerator: Whether it runs on a GPU, where the allocator, NCCL and the driver hold memory too.
    """
    sharded = engine.backend != "plain"
    stage = {"plain": 0, "deepspeed": engine.deepspeed.stage, "fsdp2": 3}[engine.backend]
    beside = projector.numbers(arch) if projector else 0
    params, trained = 4.0 * (num_params + beside), 4.0 * (num_trained + beside)
    # Optimizer states exist for what trains alone, however large the frozen rest is.
    share = trained / world_size if stage >= 1 else trained
    owned = trained / world_size if stage >= 1 or engine.backend == "plain" else trained
    bf16 = engine.precision == "bf16"
    kept_on_host = engine.backend == "deepspeed" and engine.deepspeed.offload_optimizer
    weights_on_host = engine.backend == "deepspeed" and engine.deepspeed.offload_params
    state = {"masters": share * (stage in (1, 2)), "optimizer": 2 * share, "ema": owned}
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
    activations = float(activation_bytes(arch, engine, micro_batch, kept))
    activations += projector.activation_bytes(arch, engine, micro_batch) if projector else 0
    gradients = 0.0 if kept_on_host and stage >= 2 else (share if stage >= 2 else trained)
    return Memory(
        weights=0.0 if weights_on_host else weights,
        **({key: 0.0 for key in state} if kept_on_host else state),
        gradients=gradients,
        activations=activations,
        buffers=buffers,
        # A sharded run without pictures still needs it: the weights are gathered into it to be saved.
        second_model=params * (shows or sharded),
        teacher=teacher * (2.0 if bf16 else 4.0),
        encoder=float(projector.encoder_bytes) if projector else 0.0,
        bf16_copies=params / 2 / (1 if stage < 3 else arch.num_layers) if bf16 else 0.0,
        allocator_margin=ALLOCATOR_SHARE * (activations + gradients + buffers) if accelerator else 0.0,
        nccl=float(NCCL_CHANNELS * NCCL_CONNECTIONS * NCCL_CONNECTION_BYTES) * (accelerator and world_size > 1),
        cuda_context=CONTEXT_BYTES * accelerator,
        # Checkpoints are written by a thread from a copy, so that training goes on; the copy lives on the host.
        host=4 * owned + (sum(state.values()) + share * (stage >= 2)) * kept_on_host + weights * weights_on_host,
    )


def activation_bytes(arch: Arch, engine: EngineConfig, micro_batch: int, kept: float = 0.0) -> int:
    """Bytes that the backward pass of one micro-batch keeps.

    A block keeps, per token: its input, the normalized tokens and a branch's result, twice (6 D numbers, in the dtype
    of the residual stream); and in the compute precision two modulated copies, q, k, v, attention's result, and the
    MLP's hidden layer before and after its activation (14 D). Attention's scores are never stored. kept: what a sample
    keeps beyond that, all layers.
    """
    d, tokens, layers, size = arch.hidden_size, arch.num_tokens, arch.num_layers, 2 if engine.precision == "bf16" else 4
    stream = 2 if engine.residual_dtype == "bf16" else 4
    block = tokens * 6 * d * stream + tokens * 14 * d * size + 6 * d * (size + 4)
    block += round(kept / layers * size)
    # Where a block is recomputed, its input remains, and one such block at a time has its activations.
    whole = {"none": layers, "every_other": layers // 2 + 1, "blocks": 1}[engine.activation_checkpointing]
    inputs = {"none": 0, "every_other": layers - whole, "blocks": layers}[engine.activation_checkpointing]
    return micro_batch * (whole * block + inputs * tokens * d * stream)
