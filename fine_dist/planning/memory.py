"""The memory of a training process, estimated from the architecture before anything starts.

It is the sum of weights, gradients, Adam's moments, the EMA, buffers, and the activations that the backward pass needs;
each is divided over processes where ZeRO shards it. On an accelerator three parts come on top: fragmentation of the
caching allocator, the buffers of NCCL, and the CUDA context.
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
"""Fragmentation of the caching allocator, as a share of what a step allocates and frees. Assumed, not measured: torch
rounds requests above 1 MiB up to 2 MiB, cuts smaller ones from blocks of 2 MiB, and does not return the holes."""
NCCL_CHANNELS, NCCL_CONNECTIONS = 16, 3
"""Channels of a communicator, and connections that a channel receives from: a ring's, and a tree's two. Assumed: NCCL
uses 2 to 32 channels, depending on the links between GPUs."""
NCCL_CONNECTION_BYTES = 2**22 + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16
"""Buffers of a connection, for the protocols Simple (4 MiB, NCCL_BUFFSIZE), LL128 (4.7 MiB) and LL (0.5 MiB): the
defaults in NCCL's src/init.cc."""
CONTEXT_BYTES = 2**29
"""Memory of the CUDA context: kernels' code and cuBLAS's workspace. Assumed: 0.3 to 0.6 GiB are usual."""


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
    """The frozen image encoder that REPA aligns with, if it runs at every step."""
    bf16_copies: float = 0.0
    """bf16 copies of the weights, kept by the engine or by autocast."""
    allocator_margin: float = 0.0
    """Fragmentation of the caching allocator (`ALLOCATOR_SHARE`)."""
    nccl: float = 0.0
    """Buffers of one communicator."""
    cuda_context: float = 0.0
    host: float = 0.0
    """The copy of the state from which a checkpoint is written, and offloaded state."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values()) - self.host

    @property
    def tensors(self) -> float:
        """Memory of tensors: what torch reports as allocated."""
        return self.total - self.allocator_margin - self.nccl - self.cuda_context

    @property
    def parts(self) -> str:
        """The total as text: tensors and, on an accelerator, the parts that come on top."""
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
    """Parameters that fsdp2 gathers together: those of each block, and those of the root.

    Args:
        num_blocks: Number of blocks.
        in_blocks: Number of parameters in all blocks.
        at_root: Number of parameters outside of them: embedders, the final layer, genes that blocks share.
        trained_blocks: Number of blocks with trained parameters.
        trained_root: Whether the root has trained parameters.
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
    """Bytes of fsdp2's buffers: the root's weights during the whole pass, those of a block and the next one, and the
    gradients of the root and a block before they are scattered."""
    size, block = (2 if engine.gather_dtype == "bf16" else 4), groups.in_blocks / max(1, groups.num_blocks)
    return size * (groups.at_root + 2 * block) + size * (groups.at_root + block)


@dataclass(frozen=True)
class Projector:
    """Sizes of what REPA adds to a model: a three-layer MLP from the model's width to the encoder's, and the encoder.

    Args:
        hidden: Width of its two hidden layers.
        width: Width E of the encoder's tokens.
        encoder_bytes: Bytes of the encoder's weights; 0 if the shards have its tokens.
    """

    hidden: int
    width: int
    encoder_bytes: int = 0

    def numbers(self, arch: Arch) -> int:
        """Number of the projector's parameters, all of which train."""
        d, h, e = arch.hidden_size, self.hidden, self.width
        return d * h + h + h * h + h + h * e + e

    def activation_bytes(self, arch: Arch, engine: EngineConfig, micro_batch: int) -> int:
        """Bytes that the backward pass needs: inputs of the layers and of the activations, and in fp32 the output and
        the encoder's tokens that it is compared with."""
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
    evaluates: bool = True,
    accelerator: bool = False,
) -> Memory:
    """The memory of rank 0, which needs the most of all processes.

    Args:
        arch: Shape of the model.
        engine: Settings of the engine.
        micro_batch: Samples that a process computes at once.
        world_size: Number of processes.
        num_params: Number of parameters.
        num_trained: Number of trained parameters.
        kept: Values that the backward pass of a sample needs beyond those of a dense model
            (`model.flops.ModelCost.saved_for_backward`).
        teacher: Number of parameters of a frozen model that runs at every step, in the compute precision.
        projector: REPA's projector and image encoder. None: the loss has no such term.
        groups: How fsdp2 groups the parameters. None: all are in the blocks.
        evaluates: Whether held-out losses or previews are computed, which takes a second model.
        accelerator: Whether it runs on a GPU, where the allocator, NCCL and the driver take memory too.
    """
    sharded = engine.backend != "plain"
    stage = {"plain": 0, "deepspeed": engine.deepspeed.stage, "fsdp2": 3}[engine.backend]
    extra = projector.numbers(arch) if projector else 0
    params, trained = 4.0 * (num_params + extra), 4.0 * (num_trained + extra)  # bytes in fp32
    # Only trained parameters have optimizer states.
    share = trained / world_size if stage >= 1 else trained
    local = trained / world_size if stage >= 1 or engine.backend == "plain" else trained
    bf16 = engine.precision == "bf16"
    optimizer_on_host = engine.backend == "deepspeed" and engine.deepspeed.offload_optimizer
    weights_on_host = engine.backend == "deepspeed" and engine.deepspeed.offload_params
    state = {"masters": share * (stage in (1, 2)), "optimizer": 2 * share, "ema": local}
    weights = params / (world_size if stage == 3 else 1)
    if engine.backend == "fsdp2":
        buffers = gathered_bytes(groups or Groups(arch.num_layers, num_params), engine)
    elif stage == 3:
        # ZeRO-3 frees gathered weights only beyond LIVE parameters, so a
        # smaller model is in memory completely during the step.
        buffers = min(params, 4.0 * LIVE) + 2 * 4.0 * BUCKET  # gathered weights; gradients and their sums
    elif sharded:
        buffers = 2 * min(trained, 4.0 * BUCKET)
    else:
        buffers = 0.0  # the gradients are views into the buckets that are sent
    activations = float(activation_bytes(arch, engine, micro_batch, kept))
    activations += projector.activation_bytes(arch, engine, micro_batch) if projector else 0
    gradients = 0.0 if optimizer_on_host and stage >= 2 else (share if stage >= 2 else trained)
    return Memory(
        weights=0.0 if weights_on_host else weights,
        **({key: 0.0 for key in state} if optimizer_on_host else state),
        gradients=gradients,
        activations=activations,
        buffers=buffers,
        # A sharded run without previews needs it too, because weights are gathered into it to be saved.
        second_model=params * (evaluates or sharded),
        teacher=teacher * (2.0 if bf16 else 4.0),
        encoder=float(projector.encoder_bytes) if projector else 0.0,
        bf16_copies=params / 2 / (1 if stage < 3 else arch.num_layers) if bf16 else 0.0,
        allocator_margin=ALLOCATOR_SHARE * (activations + gradients + buffers) if accelerator else 0.0,
        nccl=float(NCCL_CHANNELS * NCCL_CONNECTIONS * NCCL_CONNECTION_BYTES) * (accelerator and world_size > 1),
        cuda_context=CONTEXT_BYTES * accelerator,
        # A thread writes checkpoints from a copy in host memory while training continues.
        host=4 * local + (sum(state.values()) + share * (stage >= 2)) * optimizer_on_host + weights * weights_on_host,
    )


def activation_bytes(arch: Arch, engine: EngineConfig, micro_batch: int, kept: float = 0.0) -> int:
    """Bytes that the forward pass of one micro-batch stores for the backward pass.

    A block stores, per token: its input, the normalized tokens and a branch's result, twice (6 D values in the dtype of
    the residual stream); and in the compute precision two modulated copies, q, k, v, attention's result, and the MLP's
    hidden layer before and after its activation (14 D). Attention scores are not stored. `kept` is the number of values
    beyond these of one sample, over all layers.
    """
    d, tokens, layers, size = arch.hidden_size, arch.num_tokens, arch.num_layers, 2 if engine.precision == "bf16" else 4
    stream = 2 if engine.residual_dtype == "bf16" else 4
    block = tokens * 6 * d * stream + tokens * 14 * d * size + 6 * d * (size + 4)
    block += round(kept / layers * size)
    # A recomputed block stores its input alone; only one recomputed block at a time has its activations.
    full = {"none": layers, "every_other": layers // 2 + 1, "blocks": 1}[engine.activation_checkpointing]
    inputs = {"none": 0, "every_other": layers - full, "blocks": layers}[engine.activation_checkpointing]
    return micro_batch * (full * block + inputs * tokens * d * stream)
