"""Reference models for the speed of our step: a DiT in plain torch modules, as its paper describes it (Peebles and Xie,
arXiv 2212.09748), and diffusers' `DiTTransformer2DModel`.

Both are trained as in common training scripts: `torch.optim.AdamW` with its defaults, an EMA that is a copy of the
model and is updated parameter by parameter, and the mean squared error of the batch. Our step additionally clips
gradients and seeds random numbers by position (`benchmarks.steps`).

Shapes: B batch, C latent channels, H latent side, p patch side, T tokens, D width, A heads.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.steps import Step, made_up_batch, ranged
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.engine.compiling import compile_or_fall_back
from fine_dist.model.arch import Arch
from fine_dist.model.dit import position_table

EMA_DECAY = 0.9999
LABEL_DROP = 0.1
"""Probability that a label is replaced by that of no class."""

# --- the step -------------------------------------------------------------------------------------------------------


def reference_step(
    model: nn.Module,
    answer: Callable[[Tensor, Tensor, Tensor], Tensor],
    arch: Arch,
    batch: int,
    precision: str,
    device: torch.device,
) -> Step:
    """A training step that predicts noise, with the same loss as ours.

    Args:
        model: The model.
        answer: Calls it: `(z_t [B, C, H, H], t [B], y [B]) -> [B, C, H, H]`.
        arch: Its architecture.
        batch: Samples in a step (B).
        precision: `fp32`, or `bf16` by autocast.
        device: The device.
    """
    model = model.to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    process = make_process(DiffusionConfig()).to(device)
    state: dict[str, Any] = {"batch": made_up_batch(arch, batch, device)}

    def forward() -> None:
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
            data = state["batch"]
            t = torch.randint(0, 1000, data.labels.shape, device=device)
            noise = torch.randn_like(data.latents)
            z_t = process.add_noise(data.latents, t, noise)
            out = ranged("model", lambda: answer(z_t, t, data.labels))
            state["loss"] = (out.float() - noise).square().flatten(1).mean(1).mean()

    def backward() -> None:
        optimizer.zero_grad()
        state.pop("loss").backward()

    parts = {
        "forward": forward,
        "backward": backward,
        "optimiser": optimizer.step,
        "EMA": lambda: follow(average, model),
    }
    return Step(device, parts, arch.hidden_size, taken=state, ready=made_up_batch(arch, 1, device))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module) -> None:
    """Update the EMA, one parameter at a time."""
    for mean, p in zip(average.parameters(), model.parameters()):
        mean.mul_(EMA_DECAY).add_(p, alpha=1 - EMA_DECAY)


def original_step(arch: Arch, batch: int, precision: str, device: torch.device, compiled: bool = False) -> Step:
    """A step of `PlainDiT`; with `compiled`, each block is compiled, as in our model."""
    torch.manual_seed(0)
    model = PlainDiT(arch)
    if compiled:
        compile_or_fall_back(list(model.blocks))
    return reference_step(model, model, arch, batch, precision, device)


def diffusers_step(arch: Arch, batch: int, precision: str, device: torch.device) -> Step:
    """A step of diffusers' model of the same size, with random weights."""
    torch.manual_seed(0)
    model = diffusers_dit(arch)
    return reference_step(
        model, lambda z, t, y: model(z, timestep=t, class_labels=y).sample, arch, batch, precision, device
    )


def diffusers_dit(arch: Arch) -> Any:
    """A `DiTTransformer2DModel` of this architecture. In training mode it drops labels itself."""
    from diffusers import DiTTransformer2DModel

    from fine_dist.artifacts.diffusers_export import transformer_config

    return DiTTransformer2DModel.from_config(transformer_config(arch))


# --- the model ------------------------------------------------------------------------------------------------------


class PlainDiT(nn.Module):
    """DiT with a module for each part in the paper: `z [B, C, H, H], t [B] int64, y [B] int64 -> [B, C or 2C, H, H]`.

    Parameters have the names of `fine_dist.model.dit.DiT`, except that a block's `in` is called `up` here. The patch
    embedding is a convolution. With equal weights, both models compute the same. Labels are dropped in training.
    """

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        d, p = arch.hidden_size, arch.patch_size
        self.patch = nn.Conv2d(arch.in_channels, d, kernel_size=p, stride=p)
        self.time = PlainTime(d, arch.frequency_shift)
        self.label = nn.Embedding(arch.num_classes + 1, d)
        self.register_buffer("pos", position_table(d, arch.input_size // p), persistent=False)
        self.blocks = nn.ModuleList([PlainBlock(d, arch.num_heads) for _ in range(arch.num_layers)])
        self.final = PlainFinal(d, p * p * arch.out_channels)

    def forward(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = torch.where(torch.rand(len(y), device=y.device) < LABEL_DROP, self.arch.num_classes, y)
        x = self.patch(z).flatten(2).transpose(1, 2) + self.pos  #                                         [B, T, D]
        c = self.time(t) + self.label(y)  #                                                                [B, D]
        for block in self.blocks:
            x = block(x, c)  #                                                                             [B, T, D]
        x = self.final(x, c)  #                                                                            [B, T, ppC]
        p, side = self.arch.patch_size, self.arch.input_size // self.arch.patch_size
        x = x.reshape(-1, side, side, p, p, self.arch.out_channels)
        return torch.einsum("bhwpqc->bchpwq", x).reshape(len(x), -1, side * p, side * p)  #                [B, C, H, H]


def shift_and_scale(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainBlock(nn.Module):
    """A block with adaLN-Zero (DiT, section 3.2)."""

    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_a = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.norm_m = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.silu, self.gelu = nn.SiLU(), nn.GELU(approximate="tanh")
        self.adaln = nn.Linear(d, 6 * d)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaln(self.silu(c)).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attend(shift_and_scale(self.norm_a(x), shift_a, scale_a))
        h = self.up(shift_and_scale(self.norm_m(x), shift_m, scale_m))
        return x + gate_m.unsqueeze(1) * self.out(self.gelu(h))

    def attend(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class PlainTime(nn.Module):
    """The timestep embedding: sines and cosines of 128 frequencies, then an MLP."""

    def __init__(self, d: int, frequency_shift: int) -> None:
        super().__init__()
        self.shift = frequency_shift
        self.hidden, self.silu, self.out = nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d)

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(128, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(k * (-math.log(10000) / (128 - self.shift)))
        return self.out(self.silu(self.hidden(torch.cat([angle.cos(), angle.sin()], dim=-1))))


class PlainFinal(nn.Module):
    """The final layer: a modulated norm and the projection to patches."""

    def __init__(self, d: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.silu, self.adaln, self.linear = nn.SiLU(), nn.Linear(d, 2 * d), nn.Linear(d, out_features)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaln(self.silu(c)).chunk(2, dim=1)
        return self.linear(shift_and_scale(self.norm(x), shift, scale))
