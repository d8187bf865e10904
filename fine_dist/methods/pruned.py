"""Depth pruning: a target keeps whole layers of a trained model. The usual baseline for users who have weights.

`choose` selects N of the ancestor's L layers: the first ones, evenly spaced ones, the `best` by the loss of the
remaining model, or a `learned` choice as in TinyFusion (Fang et al., arXiv 2412.01199). Kept layers, the embedders and
the final layer are copied unchanged. Stage 3 trains the target afterwards, with or without distillation from the
ancestor (`--ancestor`, `--loss.output`).

`learned` trains the choice in stage 2. The ancestor's layers are divided into consecutive groups, and each group keeps
the same number of its layers, such as 2 of 4. A categorical distribution over the masks of a group is learned with a
straight-through Gumbel softmax, together with low-rank updates of all weights that simulate the training to come. At
the end every group keeps the layers of its most likely mask.

*Choices*, where the paper's summary does not say: low-rank updates are discarded at the end, so that a target starts
with the ancestor's own weights; the temperature of the softmax is fixed; `best` drops the layer whose removal increases
the loss least, one after another, unless there are few enough sets of layers to try them all.

A target deeper than its ancestor repeats layers, the nearest in relative depth. A layer that is repeated k times takes
1/k of its step each time, so that the repeats together move the tokens as far as the one layer did.

Shapes: L the ancestor's layers, N the target's, G groups of M layers that keep n each, K = C(M, n) masks, r rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent, Traits, needed
from fine_dist.methods.settings import PrunedConfig
from fine_dist.methods.shared import expanded
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.depth import RESIDUAL, nearest_layers, segment_share
from fine_dist.model.dit import Condition, Dense, DiT
from fine_dist.model.roles import Role, train_only

MAX_SETS = 100
"""Number of sets of layers up to which `best` tries all sets; for more it drops one layer after another."""
MOST_MASKS = 1000
"""Maximum number of masks of a group in a learned choice."""


class Pruned(Method[PrunedConfig]):
    """Some layers of a trained model, copied unchanged."""

    Config: ClassVar[type[MethodConfig]] = PrunedConfig
    label: ClassVar[str] = "depth pruning"
    paper: ClassVar[str] = "depth pruning; learned choice: TinyFusion, arXiv 2412.01199"
    summary: ClassVar[str] = "some layers of a trained model, copied"
    tables_of: ClassVar[str] = "probability that a layer is kept"

    @property
    def traits(self) -> Traits:
        samples = self.config.samples if self.config.choose == "best" and self.config.layers is None else 0
        return Traits(parents=("model",), varies=frozenset({"depth"}), samples=samples)

    def variants(self) -> dict[str, tuple[str, ...]]:
        return {"choose": ("first", "even", "best", "learned")}

    def check(self, parent: Artifact | None, target: Arch) -> None:
        super().check(parent, target)
        if parent is None:
            return
        source, layers = parent.arch.num_layers, self.config.layers
        if layers is not None and (len(layers) != target.num_layers or max(layers) >= source):
            raise ArtifactError(
                f"method.layers: {list(layers)} are {len(layers)} layers up to {max(layers)}; a target of "
                f"{target.num_layers} layers from {parent.folder} needs {target.num_layers} layers of 0 to {source - 1}"
            )
        if self._learns(source, target.num_layers):
            group_sizes(source, target.num_layers, self.config.groups)

    def smallest(self, target: Arch) -> Arch:
        return target  # a learned choice needs a depth that its groups divide

    def _learns(self, source: int, num_layers: int) -> bool:
        return self.config.choose == "learned" and self.config.layers is None and num_layers < source

    def descend(self, parent: Parent | None, target: Arch, generator: torch.Generator) -> Descent:
        source = needed(parent)
        depth = source.arch.num_layers
        if self._learns(depth, target.num_layers):
            settings = self.config.groups, self.config.rank, self.config.temperature
            choice = LayerChoice(target, depth, *settings, generator)
            choice.load_state_dict({**choice.state_dict(), **source.module.state_dict()})
            return Descent(train_only(choice, "scaler"), "some")
        layers = self.config.layers or self.chosen(source, target.num_layers)
        model = DiT(target)
        model.load_state_dict(kept_layers(source.module, list(layers), depth))
        return Descent(model)

    def chosen(self, parent: Parent, num_layers: int) -> list[int]:
        """The ancestor's layers that a target of `num_layers` takes, in order; repeated if the target is deeper."""
        depth, choose = parent.arch.num_layers, self.config.choose
        if num_layers >= depth or choose == "even":
            return [int(layer) for layer in nearest_layers(depth, num_layers)]
        if choose == "first":
            return list(range(num_layers))
        if parent.samples is None:
            raise ArtifactError(
                "method.choose best measures the loss on samples of the data, and no data is given; set data.shards, "
                "or choose first or even"
            )
        return best_layers(parent.module, HeldOutLoss(*parent.samples, DiffusionConfig()), num_layers)

    def before_step(self, model: nn.Module) -> Callable[[int, torch.Generator], None] | None:
        return model.draw if isinstance(model, LayerChoice) else None

    def module(self, arch: Arch, tensors: dict[str, Tensor]) -> nn.Module:
        if "logits.table" not in tensors:
            return DiT(arch)
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        rank = tensors["blocks.0.qkv.down"].shape[0]
        return LayerChoice(arch, depth, self.config.groups, rank, self.config.temperature)

    def merge(self, model: nn.Module) -> dict[str, Tensor]:
        if not isinstance(model, LayerChoice):
            return super().merge(model)
        return kept_layers(model, model.kept(), len(model.blocks))

    def tables(self, model: nn.Module) -> dict[str, Tensor]:
        return {"layers": model.probabilities()[:, None]} if isinstance(model, LayerChoice) else {}


def kept_layers(source: nn.Module, layers: list[int], depth: int) -> dict[str, Tensor]:
    """The state dict of a dense DiT of some layers of the source.

    Args:
        source: A DiT of `depth` layers.
        layers: Layers of the source, in the target's order; they repeat if the target is deeper.
        depth: Layers of the source.
    """
    blocks: Any = source.blocks
    share = segment_share(depth, len(layers)) if len(layers) > depth else torch.ones(len(layers))

    def matrix_of(matrix: str, layer: int) -> tuple[Tensor, Tensor]:
        module = blocks[layers[layer]].get_submodule(matrix)
        scale = share[layer].to(module.weight) if matrix in RESIDUAL else 1
        return module.weight * scale, module.bias * scale

    return expanded(source, len(layers), matrix_of)


def best_layers(model: nn.Module, loss: HeldOutLoss, num_layers: int) -> list[int]:
    """The layers whose model has the lowest loss: among all sets, or among those reached by dropping one by one."""
    dit: Any = model
    blocks = list(dit.blocks)

    def loss_of(layers: tuple[int, ...]) -> float:
        # Blocks are removed and put back instead of copied: a hundred candidates of a large model would not fit.
        dit.blocks = nn.ModuleList(blocks[layer] for layer in layers)
        try:
            return loss(model)["held_out_loss"]
        finally:
            dit.blocks = nn.ModuleList(blocks)

    best = tuple(range(len(blocks)))
    if math.comb(len(blocks), num_layers) <= MAX_SETS:
        losses = {layers: loss_of(layers) for layers in itertools.combinations(best, num_layers)}
        best = min(losses, key=losses.__getitem__)
        return list(best)
    while len(best) > num_layers:
        losses = {rest: loss_of(rest) for rest in (tuple(x for x in best if x != drop) for drop in best)}
        best = min(losses, key=losses.__getitem__)
    return list(best)


# --- the learned choice ----------------------------------------------------------------------------------------------


def group_sizes(source: int, num_layers: int, groups: int | None) -> tuple[int, int, int]:
    """(groups G, layers of a group M, layers that a group keeps n). By default groups have four layers or more.

    Raises:
        ArtifactError: The depths cannot be divided into so many groups, or a group would have too many masks.
    """
    legal = [g for g in range(1, num_layers + 1) if source % g == 0 and num_layers % g == 0]
    fitting = [g for g in legal if source // g >= 4] or [1]
    count = groups or fitting[-1]
    if count not in legal or math.comb(source // count, num_layers // count) > MOST_MASKS:
        legal = [g for g in legal if math.comb(source // g, num_layers // g) <= MOST_MASKS]
        raise ArtifactError(
            f"method.groups: {num_layers} of {source} layers cannot be learned in {count} groups; legal: "
            f"{legal or 'none, because a group would have too many masks; choose another depth'}"
        )
    return count, source // count, num_layers // count


class LowRankDense(Dense):
    """`x (W + B A)^T + b`: frozen W [m, n] and b [m], trained A [r, n] (random) and B [m, r] (zero)."""

    roles: ClassVar[dict[str, Role]] = {**Dense.roles, "down": "scaler", "up": "scaler"}
    multiplied: ClassVar[tuple[str, ...]] = (*Dense.multiplied, "down", "up")

    def __init__(self, m: int, n: int, rank: int, generator: torch.Generator | None = None):
        super().__init__(n, m)
        self.down = nn.Parameter(torch.randn(rank, n, generator=generator) / n**0.5)
        self.up = nn.Parameter(torch.zeros(m, rank))

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return super().forward(x) + (x @ self.down.T) @ self.up.T

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of a product of `rows` rows; `backward` adds those of the backward pass."""
        thin = rows * self.down.shape[0] * (self.out_features + self.in_features)
        return super().multiply_adds(rows, backward=backward) + thin * (3 if backward else 1)


class LayerChoice(DiT):
    """All layers of an ancestor, each of which takes its step or is skipped, as the masks of the groups decide.

    logits: [G, K], logits of each group's masks.  masks: [K, M], 1 where a layer is kept.
    """

    masks: Tensor
    noise: Tensor

    def __init__(
        self,
        target: Arch,
        depth: int,
        groups: int | None,
        rank: int,
        temperature: float,
        generator: torch.Generator | None = None,
    ):
        arch = target.with_depth(depth)
        super().__init__(arch, lambda matrix, layer: LowRankDense(*arch.matrix(matrix), rank, generator), generator)
        self.arch, self.temperature = target, temperature
        count, size, num_kept = group_sizes(depth, target.num_layers, groups)
        masks = torch.zeros(math.comb(size, num_kept), size)
        for row, chosen in zip(masks, itertools.combinations(range(size), num_kept)):
            row[list(chosen)] = 1
        self.register_buffer("masks", masks, persistent=False)
        self.register_buffer("noise", torch.zeros(count, len(masks)), persistent=False)
        self.logits = LogitTable(count, len(masks))

    def draw(self, step: int, generator: torch.Generator) -> None:
        """Draw the Gumbel noise of this step, the same on every rank."""
        # Away from 0 and 1, where the double logarithm is infinite.
        uniform = torch.rand(self.noise.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        self.noise.copy_(-(-uniform.log()).log())

    def gates(self) -> Tensor:
        """Gates of the layers, [L] ones and zeros, with the gradient of the softmax in training."""
        logits = self.logits()
        if not torch.is_grad_enabled():
            return self.masks[logits.argmax(1)].flatten()
        soft = F.softmax((logits + self.noise) / self.temperature, 1)
        hard = F.one_hot(soft.argmax(1), len(self.masks)).to(soft)
        # The value is the hard choice, the gradient that of the softmax (straight-through estimator).
        return ((hard + (soft - soft.detach())) @ self.masks).flatten()

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, condition = self.embed(z, t, y)
        for layer, (block, gate) in enumerate(zip(self.blocks, self.gates())):
            # A block's step is its output minus its input, so a gate of 0 skips the block exactly. The block is still
            # computed, for the gradient of the gate.
            x = x + gate * (self.run(layer, block, x, condition) - x)  #                                   [B, T, D]
        return self.unpatchify(self.final(x, condition.c))

    def kept(self) -> list[int]:
        """The layers of every group's most likely mask, ascending."""
        with torch.no_grad():
            return [layer for layer, gate in enumerate(self.gates().tolist()) if gate > 0.5]

    def probabilities(self) -> Tensor:
        """Probability that each layer is kept, [L], detached, on the CPU."""
        return (F.softmax(self.logits().detach(), 1) @ self.masks).flatten().float().cpu()


class LogitTable(nn.Module):
    """The logits of every group's masks [G, K]; a separate module, because ZeRO-3 gathers modules when they run."""

    roles: ClassVar[dict[str, Role]] = {"table": "scaler"}

    def __init__(self, groups: int, masks: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(groups, masks))

    def forward(self) -> Tensor:
        return self.table
