"""The diffusion transformer (DiT, Peebles and Xie, arXiv 2212.09748), written from the paper.

Shapes: B batch, C latent channels, H, W latent height and width, p patch side, T tokens = H/p W/p, D width, A heads.
A block's five matrices are reached by name (`arch.MATRICES`); a factory makes them, so that the dense model and every
factored one share all of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fine_dist.model.arch import MATRICES, TIME_FREQUENCIES, Arch, Sides, both, check_size
from fine_dist.model.layers import attention, gated_add, modulate
from fine_dist.model.roles import Role

LinearFactory = Callable[[str, int], nn.Module]
"""(matrix, layer) -> a `Matrix`, the module that multiplies by this matrix and adds its bias."""


@dataclass(frozen=True)
class Condition:
    """The condition of a block: `c` [B, D], the sum of time and label embedding after the SiLU with which every adaLN
    starts; `y` int64 [B], the labels."""

    c: Tensor
    y: Tensor


@dataclass(frozen=True)
class ModelOutput:
    """A model's output [B, C or 2C, H, H], and features [B, T, D] by name for losses that use them."""

    out: Tensor
    features: dict[str, Tensor]


class Dense(nn.Linear):
    """An ordinary dense matrix of a block: `(x [..., n], condition) -> [..., m]`, the signature of every matrix."""

    roles: ClassVar[dict[str, Role]] = {"weight": "weight", "bias": "bias"}
    multiplied: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of a product of `rows` rows; with `backward` those of the backward pass are added."""
        dense = rows * self.out_features * self.in_features
        return dense * (1 + backward + (backward and self.weight.requires_grad))

    def saves_input(self, rows: int) -> bool:
        """Whether the backward pass needs the input: only the weight's gradient uses it."""
        return self.weight.requires_grad

    def dense(self) -> tuple[Tensor, Tensor]:
        """Weight [m, n] and bias [m]. Other kinds of matrices have this method if they have a dense form."""
        return self.weight, self.bias


class DiT(nn.Module):
    """`(z [B, C, H, W], t [B] int64, y [B] int64) -> [B, C or 2C, H, W]`.

    The label `arch.num_classes` is the null label of classifier-free guidance. With `arch.learn_sigma` the second half
    of the channels is the variance's interpolation (Improved DDPM, arXiv 2102.09672, eq. 15).

    Args:
        arch: Shape of the model.
        linear: Makes the blocks' matrices. Default: `Dense`.
        generator: Random numbers of the initialization. Default: torch's global generator.

    Attributes:
        recompute: Blocks whose activations are computed again in the backward pass: `none`, `blocks` or `every_other`.
        residual_dtype: Dtype of the residual stream. None: that of the patch embedder, fp32 also under autocast.
        active: Blocks that run during training. None: all.
    """

    def __init__(self, arch: Arch, linear: LinearFactory | None = None, generator: torch.Generator | None = None):
        super().__init__()
        if torch.get_default_device().type == "cpu":  # on the meta device nothing is allocated
            check_size(0 if linear else arch.count(), arch.name)
        self.arch = arch
        d, p = arch.hidden_size, arch.patch_size

        def dense(matrix: str, layer: int) -> nn.Module:
            out_features, in_features = arch.matrix(matrix)
            return Dense(in_features, out_features)

        self.patch = nn.Linear(arch.in_channels * p * p, d)
        self.time = TimeEmbedder(d, arch.frequency_shift)
        self.label = nn.Embedding(arch.num_classes + 1, d)
        self.blocks = nn.ModuleList([Block(arch, layer, linear or dense) for layer in range(arch.num_layers)])
        self.final = FinalLayer(d, p * p * arch.out_channels)
        # Not saved: the table is a function of the architecture, and a model for another grid has another table.
        self.register_buffer("pos", positions_of(arch), persistent=False)
        self.recompute = "none"
        self.residual_dtype: torch.dtype | None = None
        self.active: Sequence[int] | None = None
        self.initialise(generator)

    def initialise(self, generator: torch.Generator | None) -> None:
        """Initialize as the paper does: Xavier, then embedders with std 0.02, modulation and output layer with
        zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for weight in (self.label.weight, self.time.hidden.weight, self.time.out.weight):
            nn.init.normal_(weight, std=0.02, generator=generator)
        for block in self.blocks:
            # Zero modulation makes every block the identity at the start (adaLN-zero).
            # Factored blocks have no such weight; their sigma starts at zero instead.
            adaln = block.get_submodule("adaln")
            if isinstance(adaln, nn.Linear):
                nn.init.zeros_(adaln.weight)
        for linear in (self.final.adaln, self.final.linear):
            nn.init.zeros_(linear.weight)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, condition = self.embed(z, t, y)
        for layer, block in self.running():
            x = self.run(layer, block, x, condition)  #                                                    [B, T, D]
        return self.unpatchify(self.final(x, condition.c))

    def running(self) -> list[tuple[int, nn.Module]]:
        """(number, block) of the blocks of this pass: all, or during training those in `active` if a method set it."""
        # Only in training: evaluation and sampling always run the complete model.
        layers: Sequence[int] = range(len(self.blocks)) if self.active is None or not self.training else self.active
        return [(layer, self.blocks[layer]) for layer in layers]

    def run(self, layer: int, block: nn.Module, *inputs: Any) -> Any:
        """Run a block; where `recompute` says so, its activations are computed again in the backward pass."""
        if is_recomputed(self.recompute, layer) and torch.is_grad_enabled():
            # The reentrant form needs an input that requires a gradient,
            # which the first block of a model with a frozen embedder lacks.
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward_with_features(self, z: Tensor, t: Tensor, y: Tensor, blocks: Sequence[int]) -> ModelOutput:
        """The output, with the results of some blocks and of their attention, `block.I` and `attention.I` [B, T, D]."""
        x, condition = self.embed(z, t, y)
        features: dict[str, Tensor] = {}
        for layer, block in self.running():
            # Every block returns its attention, used or not, so that a compiler makes one graph for all blocks.
            x, attended = self.run(layer, block, x, condition, True)
            if layer in blocks:
                # Features leave a block as results and not through hooks: a
                # recomputed or compiled block would call a hook twice or never.
                features |= {f"attention.{layer}": attended, f"block.{layer}": x}
        return ModelOutput(self.unpatchify(self.final(x, condition.c)), features)

    def embed(self, z: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Condition]:
        """Tokens [B, T, D] of latents z, and the condition of the blocks."""
        x = self.patch(self.patchify(z)) + self.pos  #                                                     [B, T, D]
        x = x if self.residual_dtype is None else x.to(self.residual_dtype)
        return x, self.condition(t, y)

    def condition(self, t: Tensor, y: Tensor) -> Condition:
        """The condition of all blocks and the final layer, from times t [B] and labels y [B]."""
        return Condition(F.silu(self.time(t) + self.label(y)), y)

    def patchify(self, z: Tensor) -> Tensor:
        b, c, h, w = z.shape
        p = self.arch.patch_size
        # Within a patch the order is (C, p, p), that of DiT's convolution, so that its weights can be loaded.
        z = z.reshape(b, c, h // p, p, w // p, p)  #                                               [B, C, h, p, w, p]
        return z.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // p), c * p * p)  #                  [B, T, Cpp]

    def unpatchify(self, x: Tensor) -> Tensor:
        p, (rows, columns), c = self.arch.patch_size, self.arch.grid, self.arch.out_channels
        # The final layer's order is (p, p, C): channels last, again as in DiT's weights.
        x = x.reshape(-1, rows, columns, p, p, c)  #                                               [B, h, w, p, p, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, rows * p, columns * p)  #                    [B, C, H, W]


def is_recomputed(recompute: str, layer: int) -> bool:
    """Whether the activations of a layer are computed again in the backward pass, by `DiT.recompute`."""
    return recompute == "blocks" or (recompute == "every_other" and layer % 2 == 0)


class Block(nn.Module):
    """One adaLN-zero block (section 3.2). Its children are the five matrices, by name."""

    def __init__(self, arch: Arch, layer: int, linear: LinearFactory):
        super().__init__()
        self.num_heads = arch.num_heads
        for matrix in MATRICES:
            self.add_module(matrix, linear(matrix, layer))

    def forward(self, x: Tensor, condition: Condition, tap: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        # By key: `in` is no legal attribute in the guards that torch.compile writes.
        def linear(matrix: str, h: Tensor) -> Tensor:
            y: Tensor = self._modules[matrix](h, condition)  # type: ignore[misc]
            return y

        x, attended = block_forward(x, condition.c, linear, self.num_heads)
        return (x, attended) if tap else x


def block_forward(
    x: Tensor, c: Tensor, linear: Callable[[str, Tensor], Tensor], num_heads: int
) -> tuple[Tensor, Tensor]:
    """A block's forward pass with given products: `x [B, T, D], c [B, D] -> [B, T, D]`.

    Args:
        x: Tokens.
        c: Condition, after its SiLU (`Condition.c`).
        linear: `(matrix, h) -> product`, which multiplies by one of the block's matrices.
        num_heads: Attention heads.

    Returns:
        The block's output, and the attention's result before its gate, both [B, T, D].
    """
    # One matrix gives all six vectors: one product, and one entry of the genes. They are cast to the residual stream's
    # dtype together; casting each would launch twelve kernels, counting the backward pass.
    modulation = linear("adaln", c).to(x.dtype).unsqueeze(1)  #                                           [B, 1, 6 D]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=2)  #                 6 x [B, 1, D]
    h = modulate(x, shift_a, scale_a)  #                                                                   [B, T, D]
    attended = linear("o", attention(linear("qkv", h), num_heads))  #                                      [B, T, D]
    x = gated_add(x, gate_a, attended)  #                                                                  [B, T, D]
    h = linear("in", modulate(x, shift_m, scale_m))  #                                                   [B, T, 4 D]
    return gated_add(x, gate_m, linear("out", F.gelu(h, approximate="tanh"))), attended  #                 [B, T, D]


class TimeEmbedder(nn.Module):
    """`t [B] -> [B, D]`: sinusoids of 256 frequencies, then an MLP."""

    def __init__(self, d: int, frequency_shift: int = 0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.hidden = nn.Linear(TIME_FREQUENCIES, d)
        self.out = nn.Linear(d, d)

    def forward(self, t: Tensor) -> Tensor:
        half = TIME_FREQUENCIES // 2
        index = torch.arange(half, device=t.device, dtype=torch.float32)
        # In fp32 also under autocast: in bf16 neighboring timesteps would have the same angle.
        frequency = torch.exp(-math.log(10000) / (half - self.frequency_shift) * index)
        angle = t.float()[:, None] * frequency  #                                                          [B, 128]
        wave = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.hidden.weight.dtype)  #                [B, 256]
        embedded: Tensor = self.out(F.silu(self.hidden(wave)))
        return embedded


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the projection to patches."""

    def __init__(self, d: int, out_features: int):
        super().__init__()
        self.adaln = nn.Linear(d, 2 * d)
        self.linear = nn.Linear(d, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(c).unsqueeze(1).chunk(2, dim=2)  #                           2 x [B, 1, D]
        patches: Tensor = self.linear(modulate(x, shift, scale))  #                                     [B, T, ppC]
        return patches


def labels_from_null(null: Tensor, num_classes: int, generator: torch.Generator | None = None) -> nn.Embedding:
    """A label embedder [C + 1, D] for other classes.

    Every class starts from the null label of a trained model, plus noise (std 0.02) that distinguishes the classes.

    Args:
        null: Embedding of the null label, [D].
        num_classes: C.
        generator: Random numbers of the noise. Default: torch's global generator.
    """
    label = nn.Embedding(num_classes + 1, len(null))
    with torch.no_grad():
        label.weight.normal_(std=0.02, generator=generator).add_(null)
        label.weight[-1] = null
    return label


def positions_of(arch: Arch) -> Tensor:
    """The position table of a model of this shape, [T, D] float32."""
    return position_table(arch.hidden_size, arch.grid, arch.position_grid)


def position_table(d: int, grid: Sides, trained_grid: Sides | None = None) -> Tensor:
    """Fixed 2-d sin-cos table [T, D], float32: the first half of D encodes the column, the second the row.

    Args:
        d: Width D.
        grid: Rows and columns of patches, or the side of a square grid.
        trained_grid: The grid that the weights were trained for, if another: positions are rescaled to its range, so
            that the model sees positions it was trained on (DiffFit, arXiv 2304.06648: half the index for twice the
            side).
    """
    # In fp64, then rounded once: the table has the same bits on every platform.
    frequency = 1.0 / 10000 ** (torch.arange(d // 4, dtype=torch.float64) / (d // 4))
    axes = []
    for side, trained in zip(both(grid), both(trained_grid or grid)):
        index = torch.arange(side, dtype=torch.float64) * (trained / side)
        angle = index[:, None] * frequency  #                                                          [side, D/4]
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=1))  #                                   [side, D/2]
    rows, columns = both(grid)
    column = axes[1][None, :, :].expand(rows, columns, -1)
    row = axes[0][:, None, :].expand(rows, columns, -1)
    return torch.cat([column, row], dim=2).reshape(rows * columns, d).float()
