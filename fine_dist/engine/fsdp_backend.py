"""The FSDP2 backend (torch's `fully_shard`): shards parameters, gradients and optimizer states over all ranks.

The parameters of each block form a group, which is gathered before the block's forward and backward pass and freed
afterwards; the next group is gathered meanwhile. All other parameters, such as genes that the blocks share, form the
root's group, which is gathered once per pass.

A parameter is sharded by rows, so a rank's shard is one flat range of it: a piece.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fine_dist.core.errors import ConfigError
from fine_dist.engine.backend import Piece, ShardedBackend
from fine_dist.engine.checkpoint_files import CheckpointReader
from fine_dist.engine.dist import all_reduce_sum, init_single_process_group
from fine_dist.engine.optimizer import MOMENTS, adamw, clip_divisor, set_lr, trainable, update_only_if, updates_of
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.engine.world import World


class FsdpBackend(ShardedBackend):
    """Shards a model's blocks and its root over all ranks.

    The optimizer updates the local shards as ordinary tensors, because operators on DTensors take ten times as long on
    the host.

    Raises:
        ConfigError: The model has a parameter without dimensions, which FSDP2 cannot shard.
    """

    def __init__(self, model: nn.Module, optim: OptimConfig, engine: EngineConfig, world: World) -> None:
        assert world.device is not None
        self.world = world
        self.clip_norm = optim.clip_norm
        if world.world_size == 1:
            init_single_process_group(world.device)
        self.shapes = {name: tuple(p.shape) for name, p in trainable(model).items()}
        # FSDP2 shards along dimension 0, which such a parameter does not have.
        scalars = [name for name, p in model.named_parameters() if p.dim() == 0]
        if scalars:
            raise ConfigError(
                f"engine.backend: fsdp2 cannot shard parameters without dimensions ({', '.join(scalars[:3])}); legal "
                "here: plain, deepspeed"
            )
        # The warning is about operators that change a block's output in place, which no model here has.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # One dimension, so that each value has one owner. With HSDP, which replicates shards, it would have several.
        mesh = init_device_mesh(world.device.type, (world.world_size,))
        # Weights are gathered as fp32, or as bf16, to which autocast would round them afterwards. The dtype of the
        # reduction is explicit, because gradients of bf16 weights would be summed in bf16. Inputs are not cast, because
        # bf16 has too few bits for a time in [0, 1].
        reduced = torch.bfloat16 if engine.reduce_dtype == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if engine.gather_dtype == "bf16" else None,
            reduce_dtype=reduced,
            cast_forward_inputs=False,
        )
        model.to(world.device)
        # Blocks first: the root's group then consists of the remaining parameters, the shell and shared genes.
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        assert isinstance(model, FSDPModule)
        if hasattr(model, "forward_with_features"):
            # FSDP2 gathers weights in hooks of `forward`. Other methods of the model must be registered.
            register_fsdp_forward_method(model, "forward_with_features")
        self.model = model
        self.sharded: dict[str, DTensor] = {}
        self.shards: dict[str, nn.Parameter] = {}
        self._starts: dict[str, int] = {}
        for name, p in trainable(model).items():
            assert isinstance(p, DTensor)
            local = p.to_local().detach()
            self.sharded[name] = p
            if local.numel():  # some ranks have none, if there are fewer rows than ranks
                _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
                # Start in the flattened parameter: (first row) x (number of values in a row).
                self._starts[name] = offset[0] * (p.numel() // p.shape[0])
                self.shards[name] = nn.Parameter(local)  # shares memory with the DTensor that FSDP2 gathers
        self.optimizer = adamw(list(self.shards.values()), optim) if self.shards else None
        self.share_layout()

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        # FSDP2 averages gradients over ranks, hence the factor `world_size`.
        (losses.sum() * (self.world.world_size / global_batch)).backward()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        device = self.world.device
        for name, shard in self.shards.items():
            # The optimizer's parameters are views of the local shards, so gradients are assigned here. Missing ones are
            # zeros, so that moments decay as in the other backends.
            gradient = self.sharded[name].grad
            shard.grad = gradient.to_local() if isinstance(gradient, DTensor) else torch.zeros_like(shard)
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        local_norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        # Each value is on exactly one rank, so the global norm is the root of the sum of squares.
        norm = all_reduce_sum(local_norm.double().square(), self.world).sqrt()
        finite = norm.isfinite()
        if self.optimizer is not None:
            set_lr(self.optimizer, lr)
            finite = finite if good is None else finite & good
            with update_only_if(self.optimizer, finite, clip_divisor(norm, self.clip_norm)):
                self.optimizer.step()
        for name, p in self.sharded.items():
            # Freed instead of zeroed: the next gradient then becomes `grad` without an addition.
            p.grad = None
            if name in self.shards:
                self.shards[name].grad = None
        return norm

    def pieces(self) -> list[Piece]:
        return [
            Piece(name, self.shapes[name], self._starts[name], shard.data.view(-1))
            for name, shard in self.shards.items()
        ]

    def _state(self, name: str) -> dict[str, Any]:
        """Return the optimizer's state of an owned shard; empty before its first update."""
        return self.optimizer.state.get(self.shards[name], {}) if self.optimizer is not None else {}

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        state = self._state(piece.name)
        return {key: state[key].view(-1) for key in MOMENTS if key in state}

    def optimizer_steps(self) -> dict[str, int]:
        return updates_of({name: self._state(name) for name in self.shards})

    @torch.no_grad()
    def load(self, checkpoint: CheckpointReader) -> None:
        for piece in self.pieces():
            name, shard = piece.name, self.shards[piece.name]
            piece.weight.copy_(checkpoint.read("weight", name, piece.start, piece.stop))
            steps = checkpoint.optimizer_steps.get(name, 0)
            assert self.optimizer is not None
            if not steps:
                self.optimizer.state.pop(shard, None)
                continue
            moments = checkpoint.moments(name, piece.start, piece.stop)
            state: dict[str, Any] = {key: value.view_as(shard).to(shard.device) for key, value in moments.items()}
            state["step"] = torch.tensor(float(steps), device=shard.device)
            self.optimizer.state[shard] = state
