"""The DeepSpeed backend: ZeRO stages 0 to 3 with offload, fp32 master weights, and this project's checkpoints.

DeepSpeed gets its settings from our config (`deepspeed_json`), and torch's AdamW as the optimizer. The pieces that a
rank owns are ranges of the flat fp32 partition in stages 1 and 2, the rank's share of each parameter in stage 3, and
all parameters on rank 0 in stage 0, which shards nothing. DeepSpeed's own checkpoints are neither written nor read.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fine_dist.core.errors import ConfigError
from fine_dist.engine.backend import Piece, ShardedBackend
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.deepspeed_json import deepspeed_json
from fine_dist.engine.dist import init_single_process_group
from fine_dist.engine.optimizer import MOMENTS, adamw, clip_divisor, set_lr, trainable, update_only_if, updates_of
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.world import World


class DeepSpeedBackend(ShardedBackend):
    """Trains a model with a DeepSpeed engine.

    Args:
        micro: Number of samples in a rank's micro-batch.
        accumulation: Number of micro-batches per step.

    Raises:
        ConfigError: DeepSpeed cannot be imported, or the JSON file of `engine.deepspeed.extra` contradicts the config.
    """

    def __init__(
        self, model: nn.Module, optim: OptimConfig, engine: EngineConfig, world: World, micro: int, accumulation: int
    ) -> None:
        assert world.device is not None
        self.world = world
        self.stage = engine.deepspeed.stage
        settings = deepspeed_json(optim, engine, world.world_size, micro, accumulation)
        deepspeed = import_deepspeed(world)
        self.named = trainable(model)
        self.shapes = {name: tuple(p.shape) for name, p in self.named.items()}
        for p in model.parameters():
            # ZeRO flattens parameters into one buffer and maps each to a range of it, which assumes row-major memory.
            p.data = p.data.contiguous()
        # One parameter group: ZeRO flattens each group into a buffer, and `_flat_of` expects a single one.
        self.optimizer: Any = adamw(
            list(self.named.values()), optim, kind=torch.optim.AdamW if self.stage else _ClippingAdamW
        )
        if isinstance(self.optimizer, _ClippingAdamW):
            self.optimizer.clip_norm = optim.clip_norm
        self.engine: Any = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)[0]
        self.zero: Any = self.engine.optimizer
        self.model = self.engine
        self._held = self._find_pieces()
        # In stage 0 every rank holds and updates all weights, but a value must have one owner: rank 0.
        self._pieces = self._held if self.stage or world.is_main else []
        self.share_layout()

    # --- a step -----------------------------------------------------------------------------------------------------

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        # DeepSpeed averages gradients over ranks, hence the factor `world_size`.
        loss = losses.sum() * (self.world.world_size / global_batch)
        # An infinite loss can have finite gradients. They are made NaN, because in all stages a step is skipped
        # on every rank if the norm of the gradients is not finite.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        # The division by accumulation steps is in `global_batch` already.
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # only counts the micro-batch; the update is at the last one

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        # `good` is not needed: bad losses have made the gradients NaN (`backward`). In stages 1 to 3 DeepSpeed checks
        # the gradients on the host, so the step waits for the device.
        set_lr(self.optimizer, lr)
        self.engine.step()
        if self.stage == 3:
            self._forget_gradients()
        if self.stage == 0:
            total_norm: Tensor = self.optimizer.norm
            return total_norm
        # After a skipped step DeepSpeed still returns the norm of an earlier one.
        norm = math.inf if self.zero.overflow else float(self.engine.get_global_grad_norm())
        return torch.full((), norm, dtype=torch.float64, device=self.world.device)

    def _forget_gradients(self) -> None:
        """Zero stage 3's gradient buffers. An update reads all of them, but a step writes only those of the parameters
        that it uses; the others would be updated with gradients of an earlier step."""
        for buffer in self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
            buffer.zero_()

    # --- pieces -----------------------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        return self._pieces

    def _find_pieces(self) -> list[Piece]:
        pieces = []
        for name, p in self.named.items():
            start, weight = self._range_of(p)
            if weight is not None and weight.numel():
                pieces.append(Piece(name, self.shapes[name], start, weight))
        return pieces

    def _range_of(self, p: Any) -> tuple[int, Tensor | None]:
        """Return the range of a parameter that this rank updates: its start, and its fp32 values (None: no range)."""
        if self.stage == 0:
            return 0, p.data.view(-1)
        if self.stage == 3:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(p)]
            # Each rank has `size` = ceil(numel / world_size) values; the shares of the last ranks are padded.
            start = size * self.world.rank
            num_values = max(0, min(size, p.ds_numel - start))
            return start, self.zero.fp32_partitioned_groups_flat[group].narrow(0, offset, num_values)
        mapping = p._hp_mapping
        if mapping is None:  # this rank's partition has no value of the parameter
            return 0, None
        # `lp` is the weight that the model computes with, `hp` its fp32 master.
        return mapping.lp_fragment_address.start, mapping.hp_fragment

    def _flat_of(self, p: Any) -> tuple[Tensor, int]:
        """Return the optimizer's tensor that contains this rank's share of `p`, and the offset in it."""
        if self.stage == 0:
            return p, 0
        if self.stage == 3:
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(p)]
            return self.zero.fp32_partitioned_groups_flat[group], offset
        return self.zero.single_partition_of_fp32_groups[0], p._hp_mapping.hp_fragment_address.start

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        flat, offset = self._flat_of(self.named[piece.name])
        state = self.optimizer.state.get(flat, {})
        size = piece.stop - piece.start
        return {key: state[key].view(-1).narrow(0, offset, size) for key in MOMENTS if key in state}

    def optimizer_steps(self) -> dict[str, int]:
        flat = {piece.name: self._flat_of(self.named[piece.name])[0] for piece in self._pieces}
        return updates_of({name: self.optimizer.state.get(tensor, {}) for name, tensor in flat.items()})

    @torch.no_grad()
    def load(self, checkpoint: CheckpointReader) -> None:
        for name, p in self.named.items():
            self._load_model_copy(p, checkpoint, name)
        for piece in self._held:
            piece.weight.copy_(checkpoint.read("weight", piece.name, piece.start, piece.stop))
            flat, offset = self._flat_of(self.named[piece.name])
            steps = checkpoint.optimizer_steps.get(piece.name, 0)
            # Under ZeRO parameters share the state of a flat tensor; without updates there is no state to set.
            if not steps and not self.optimizer.state.get(flat):
                continue
            state = self.optimizer.state[flat]
            if not state:
                state.update({key: torch.zeros_like(flat) for key in MOMENTS})
            # A fused AdamW keeps its number of updates on the device, others on the host.
            fused = bool(self.optimizer.defaults.get("fused"))
            state["step"] = torch.tensor(float(steps), device=flat.device if fused else "cpu")
            for key, values in checkpoint.moments(piece.name, piece.start, piece.stop).items():
                state[key].view(-1).narrow(0, offset, piece.stop - piece.start).copy_(values)

    def _load_model_copy(self, p: Any, checkpoint: CheckpointReader, name: str) -> None:
        """Load the weights that the forward pass reads, which ZeRO stores in addition to the fp32 masters."""
        if self.stage == 3:
            start = p.ds_tensor.numel() * self.world.rank
            stop = min(start + p.ds_tensor.numel(), p.ds_numel)
            if start < stop:
                p.ds_tensor.data[: stop - start].copy_(checkpoint.read("weight", name, start, stop))
            # Small parameters stay gathered on every rank (persistence threshold), so the full tensor is loaded, too.
            if p.data.numel() != p.ds_numel:
                return
        p.data.copy_(checkpoint.read_full("weight", name).view(self.shapes[name]))


class _ClippingAdamW(torch.optim.AdamW):
    """AdamW for stage 0, where DeepSpeed calls the optimizer directly. Like ZeRO's optimizers it clips by global norm,
    and changes neither weights nor moments if the norm is not finite."""

    clip_norm: float | None = None
    norm: Tensor
    """Global norm of the last step's gradients before clipping, []."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        for p in parameters:
            # As in the other stages, the moments of a parameter that no sample used decay.
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        with update_only_if(self, self.norm.isfinite(), clip_divisor(self.norm, self.clip_norm)):
            super().step(closure)


def import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for the device of this process, without its log messages and unused compiled operators.

    In a world of one process it also creates the process group that DeepSpeed needs.

    Raises:
        ConfigError: DeepSpeed cannot be imported.
    """
    assert world.device is not None
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    # DeepSpeed's CPU accelerator reads LOCAL_SIZE, which torchrun does not set.
    os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(f"engine.backend: deepspeed cannot be imported ({error}); legal here: plain, fsdp2") from None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives under names that torch has deprecated; users cannot change that.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # gloo is used instead of DeepSpeed's shared-memory collectives, whose compilation takes half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.world_size == 1:
        init_single_process_group(world.device)
    return deepspeed
