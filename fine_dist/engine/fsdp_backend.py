"""torch's FSDP2 (`fully_shard`): every parameter, gradient and optimizer state is sharded over all ranks.

Each block is a group of its own: its weights are gathered before its forward and backward pass and freed after, while
the next block's are on their way. What belongs to the model itself, such as genes that all blocks share, is one group
at the root, gathered once for the whole pass.

A parameter is sharded by rows, so what a rank holds is one flat range of it: a piece like every other backend's.
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

    The optimizer updates the local shards as ordinary tensors: torch's fused AdamW does not know sharded ones, and a
    sharded tensor's operators cost the host ten times an ordinary one's.

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
        # It warns of operators that change a block's output in place; no model here has one.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # One dimension: all ranks form one group of shards. Replicas
        # of groups (HSDP) would give a value several owners.
        mesh = init_device_mesh(world.device.type, (world.world_size,))
        # Autocast decides what products compute in. Gathered weights are fp32 as in the other backends, or are rounded
        # to bf16 before they travel, as autocast would round them behind. Gradients of bf16 weights would be summed in
        # bf16 unless a type is named. Inputs are left alone: a time of 0 to 1 has too few bits in bf16.
        reduced = torch.bfloat16 if engine.reduce_dtype == "bf16" else torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if engine.gather_dtype == "bf16" else None,
            reduce_dtype=reduced,
            cast_forward_inputs=False,
        )
        model.to(world.device)
        # Blocks first, then the root. A wrapped block is left out of its parent's
        # group, so that what remains for the root is the shared genes and the shell.
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        assert isinstance(model, FSDPModule)
        if hasattr(model, "forward_with_features"):
            # FSDP2 gathers the root's weights in hooks of `forward`;
            # another entry point would compute with sharded ones.
            register_fsdp_forward_method(model, "forward_with_features")
        self.model = model
        self.sharded: dict[str, DTensor] = {}
        self.shards: dict[str, nn.Parameter] = {}
        self._starts: dict[str, int] = {}
        for name, p in trainable(model).items():
            assert isinstance(p, DTensor)
            local = p.to_local().detach()
            self.sharded[name] = p
            if local.numel():  # a parameter of fewer rows than ranks leaves some ranks without any
                _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
                # Sharding is by rows, so a shard begins at (first row) x (values in a row) of the flattened parameter.
                self._starts[name] = offset[0] * (p.numel() // p.shape[0])
                self.shards[name] = nn.Parameter(local)  # shares its memory with what FSDP2 gathers from
        self.optimizer = adamw(list(self.shards.values()), optim) if self.shards else None
        self.share_layout()

    def backward(self, losses: Tensor, *, global_batch: int, last: bool) -> None:
        # FSDP2 averages over ranks; the sum over all samples is divided once, here.
        (losses.sum() * (self.world.world_size / global_batch)).backward()

    def step(self, lr: float, good: Tensor | None = None) -> Tensor:
        device = self.world.device
        for name, shard in self.shards.items():
            # The optimizer holds plain views of the local shards, so their gradients are attached
            # by hand, and missing ones are zeros: the moments decay in every backend alike.
            gradient = self.sharded[name].grad
            shard.grad = gradient.to_local() if isinstance(gradient, DTensor) else torch.zeros_like(shard)
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        local_norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=device)
        # Each value lies on exactly one rank, so squares add up to the global norm.
        norm = all_reduce_sum(local_norm.double().square(), self.world).sqrt()
        finite = norm.isfinite()
        if self.optimizer is not None:
            set_lr(self.optimizer, lr)
            # Even a rank without shards has taken part in the collective above; only the update is skipped for it.
            finite = finite if good is None else finite & good
            with update_only_if(self.optimizer, finite, clip_divisor(norm, self.clip_norm)):
                self.optimizer.step()
        for name, p in self.sharded.items():
            # Freed and not zeroed: the next reduced gradient then
            # becomes `grad` itself instead of being added to zeros.
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
