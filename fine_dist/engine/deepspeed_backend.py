"""DeepSpeed's ZeRO behind the loop's interface: stages 0 to 3, offload, fp32 master weights, our own checkpoints.

DeepSpeed is told what our config says (`deepspeed_json`) and given our AdamW. What each rank keeps is shown to EMA and
checkpoints as pieces: under stages 1 and 2 the ranges of the flat fp32 partition, under stage 3 the rank's share of
each parameter, under stage 0 (nothing sharded) everything on rank 0. No file of DeepSpeed's is written or read.
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
    """A ZeRO engine. `ConfigError` when DeepSpeed is missing or an extra JSON contradicts the config."""

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
        # A plain list, so one group: pieces are located by one flat
        # buffer a group below, and every parameter has one rate anyway.
        self.optimizer: Any = adamw(
            list(self.named.values()), optim, kind=torch.optim.AdamW if self.stage else _ClippingAdamW
        )
        if isinstance(self.optimizer, _ClippingAdamW):
            self.optimizer.clip_norm = optim.clip_norm
        engine_, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=settings)
        self.engine: Any = engine_
        self.zero: Any = engine_.optimizer
        self.model = engine_
        self._held = self._find_pieces()
        # Stage 0 holds everything on every rank; rank 0 owns it.
        self._pieces = self._held if self.stage or world.is_main else []
        self.share_layout()

    # --- a step -----------------------------------------------------------------------------------------------------

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        # DeepSpeed averages over ranks; the sum over all samples is divided once, here.
        loss = losses.sum() * (self.world.world_size / global_batch)
        # A loss that is infinite has its gradients made NaN as well, on every rank: DeepSpeed discards a step in all
        # stages when the norm of its gradients is not finite.
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
        # The division by accumulation steps is in `global_batch` already.
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # not at the boundary yet: it counts the micro-batch

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        # Bad losses have made the gradients NaN: see `backward`. DeepSpeed asks the device about that by itself, in
        # every step of stages 1 to 3: the one wait of a step that is not ours to leave out.
        set_lr(self.optimizer, lr)
        self.engine.step()
        if self.stage == 3:
            self._forget_gradients()
        if self.stage == 0:
            norm_of_gradients: Tensor = self.optimizer.norm
            return norm_of_gradients
        # A step that DeepSpeed discards leaves the norm of an earlier one behind.
        norm = math.inf if self.zero.overflow else float(self.engine.get_global_grad_norm())
        return torch.full((), norm, dtype=torch.float64, device=self.world.device)

    def _forget_gradients(self) -> None:
        """Zero the buffers of stage 3's gradients. Its update reads all of them, and a step writes only those of the
        parameters that it uses; the others would be updated with an older step's gradients."""
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
        """(start, live fp32 values) of what this rank updates of a parameter."""
        if self.stage == 0:
            return 0, p.data.view(-1)
        if self.stage == 3:
            group, offset, size = self.zero.grad_position[self.zero.get_param_id(p)]
            start = size * self.world.rank
            # Stage 3 cuts a parameter into equal shares of ceil(numel / W) values.
            num_values = max(0, min(size, p.ds_numel - start))  # the last ranks' shares are padded
            return start, self.zero.fp32_partitioned_groups_flat[group].narrow(0, offset, num_values)
        mapping = p._hp_mapping
        if mapping is None:
            return 0, None
        # `lp` is the weight that the model computes with, `hp` its fp32 master.
        # None means that this rank's partition holds no value of the parameter.
        return mapping.lp_fragment_address.start, mapping.hp_fragment

    def _flat_of(self, p: Any) -> tuple[Tensor, int]:
        """The tensor that the optimizer holds this rank's share of `p` in, and where in it."""
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
            # Several parameters share one flat state under ZeRO. Where none has had an update there is nothing to set.
            if not steps and not self.optimizer.state.get(flat):
                continue
            state = self.optimizer.state[flat]
            if not state:
                state.update({key: torch.zeros_like(flat) for key in MOMENTS})
            fused = bool(self.optimizer.defaults.get("fused"))
            # A fused AdamW keeps its counter on the device, an unfused one on the host.
            state["step"] = torch.tensor(float(steps), device=flat.device if fused else "cpu")
            for key, values in checkpoint.moments(piece.name, piece.start, piece.stop).items():
                state[key].view(-1).narrow(0, offset, piece.stop - piece.start).copy_(values)

    def _load_model_copy(self, p: Any, checkpoint: CheckpointReader, name: str) -> None:
        """The weights that the forward pass reads, which ZeRO keeps beside the fp32 ones it updates."""
        if self.stage == 3:
            start = p.ds_tensor.numel() * self.world.rank
            stop = min(start + p.ds_tensor.numel(), p.ds_numel)
            if start < stop:
                p.ds_tensor.data[: stop - start].copy_(checkpoint.read("weight", name, start, stop))
            # The parameter is not gathered now, as is usual; small ones
            # stay gathered on every rank and need their copy as well.
            if p.data.numel() != p.ds_numel:
                return
        p.data.copy_(checkpoint.read_full("weight", name).view(self.shapes[name]))


class _ClippingAdamW(torch.optim.AdamW):
    """For stage 0, where DeepSpeed calls the client's optimizer as it is: AdamW that clips by global norm, and leaves
    weights and moments alone when the norm is not finite, as ZeRO's optimizers do."""

    clip_norm: float | None = None
    norm: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        for p in parameters:
            # A parameter that no sample used still has its moments
            # decayed, as ZeRO does it: otherwise stages would differ.
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.norm = norm
        with update_only_if(self, norm.isfinite(), clip_divisor(norm, self.clip_norm)):
            super().step(closure)


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, told which device it runs on, quiet, and not compiling what is not used."""
    assert world.device is not None
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    # DeepSpeed's CPU accelerator reads LOCAL_SIZE, which torchrun does not set.
    os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(f"engine.backend: deepspeed cannot be imported ({error}); legal here: plain") from None
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # DeepSpeed's own calls of collectives that torch has renamed: nothing a user of ours can do about.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # gloo does this work; the shared-memory reductions would be compiled first, for half a minute, on every machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.world_size == 1:
        init_single_process_group(world.device)
    return deepspeed
