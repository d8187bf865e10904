"""The DiT against the paper's numbers and a naive reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError
from fine_dist.model.arch import MATRICES, Arch, arch
from fine_dist.model.dit import DiT, position_table
from tests.conftest import inputs, lively, tiny_arch


@pytest.mark.parametrize(("name", "millions"), [("DiT-B/2", 130.3), ("DiT-L/2", 457.8), ("DiT-XL/2", 674.8)])
def test_the_named_sizes_have_the_papers_parameter_counts(name, millions):
    with torch.device("meta"):
        model = DiT(arch(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_a_block_has_18_d_squared_weights_and_15_d_biases():
    block = DiT(tiny_arch(num_layers=1)).blocks[0]
    sizes = {name: p.numel() for name, p in block.named_parameters()}
    assert sum(n for name, n in sizes.items() if name.endswith("weight")) == 18 * 32**2
    assert sum(n for name, n in sizes.items() if name.endswith("bias")) == 15 * 32


@pytest.mark.parametrize("size", [4, (4, 8), (6, 2)], ids=str)
def test_forward_equals_a_naive_transformer_written_with_loops(size, generator):
    a = tiny_arch(num_layers=2, in_channels=3, input_size=size, learn_sigma=True)
    model = lively(DiT(a))
    z, t, y = inputs(a, batch=2)
    # float32 sums in another order: 1e-4 is ten times the difference seen.
    torch.testing.assert_close(model(z, t, y), naive_forward(model, z, t, y), atol=1e-4, rtol=1e-4)


def naive_forward(model, z, t, y):
    """DiT image by image, token by token and head by head, from the paper's figure 3."""
    a, p = model.arch, model.arch.patch_size
    (_, height, width), d, heads = a.latent_shape, a.hidden_size, a.num_heads
    images = []
    for image, step, label in zip(z, t, y):
        tokens = [
            model.patch(image[:, r * p : r * p + p, c * p : c * p + p].reshape(-1)) + position(r, c, d)
            for r in range(height // p)
            for c in range(width // p)
        ]
        x = torch.stack(tokens)
        angles = [float(step) * 10000 ** (-i / 128) for i in range(128)]
        wave = torch.tensor([math.cos(v) for v in angles] + [math.sin(v) for v in angles])
        hidden = torch.nn.functional.silu(model.time.hidden(wave))
        c = torch.nn.functional.silu(model.time.out(hidden) + model.label.weight[label])
        for block in model.blocks:
            linear = {kind: block.get_submodule(kind) for kind in MATRICES}
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear["adaln"](c).split(d)
            h = normal(x) * (1 + scale_a) + shift_a
            q, k, v = linear["qkv"](h).split(d, dim=1)
            parts = []
            for head in range(heads):
                s = slice(head * d // heads, (head + 1) * d // heads)
                weights = torch.softmax(q[:, s] @ k[:, s].T / math.sqrt(d // heads), dim=1)
                parts.append(weights @ v[:, s])
            x = x + gate_a * linear["o"](torch.cat(parts, dim=1))
            h = normal(x) * (1 + scale_m) + shift_m
            h = linear["in"](h)
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + gate_m * linear["out"](h)
        shift, scale = model.final.adaln(c).split(d)
        patches = model.final.linear(normal(x) * (1 + scale) + shift)
        out = torch.zeros(a.out_channels, height, width)
        for index, patch in enumerate(patches):
            r, col = divmod(index, width // p)
            out[:, r * p : r * p + p, col * p : col * p + p] = patch.reshape(p, p, a.out_channels).permute(2, 0, 1)
        images.append(out)
    return torch.stack(images)


def normal(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def position(row, column, d):
    omega = 1 / 10000 ** (np.arange(d // 4) / (d // 4))
    parts = [np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)]
    return torch.tensor(np.concatenate(parts), dtype=torch.float32)


def test_every_position_has_its_own_row_of_the_table():
    table = position_table(64, 8)
    assert table.shape == (64, 64)
    assert len(torch.unique(table, dim=0)) == 64


def test_patches_go_back_where_they_came_from():
    a = tiny_arch(in_channels=3)
    model = DiT(a)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    patches = model.patchify(z).reshape(2, 16, 3, 2, 2).permute(0, 1, 3, 4, 2).reshape(2, 16, 12)
    torch.testing.assert_close(model.unpatchify(patches), z, atol=0, rtol=0)


def test_height_and_width_that_are_equal_are_one_number_in_every_file():
    """The form on disk, and with it the identity of a run, is that of a square."""
    square = tiny_arch(input_size=8)
    assert tiny_arch(input_size=[8, 8]) == square and square.model_dump()["input_size"] == 8
    oblong = tiny_arch(input_size=[8, 12], position_grid=[4, 4])
    assert (oblong.grid, oblong.num_tokens, oblong.latent_shape) == ((4, 6), 24, (1, 8, 12))
    assert oblong.position_grid == 4
    assert Arch.model_validate_json(oblong.model_dump_json()) == oblong


def test_positions_are_rescaled_along_each_side_by_its_own_factor():
    table = position_table(32, (4, 9), (2, 3)).view(4, 9, 32)
    own = position_table(32, (2, 3)).view(2, 3, 32)
    torch.testing.assert_close(table[::2, ::3], own)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ([8, 9], "patch_size 2 does not divide input_size (8, 9)"),
        (0, "one whole number from 1 to 65536 is needed, or two: height and width"),
        ([8, 8, 8], "height and width"),
        ("8x8", "height and width"),
        ([8, True], "height and width"),
    ],
    ids=str,
)
def test_impossible_sides_are_one_line(size, words):
    with pytest.raises(ConfigError) as error:
        validate(Arch, {"input_size": size}, "arch")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_fresh_model_predicts_zero_and_is_the_same_for_the_same_seed():
    a = tiny_arch()
    z, t, y = inputs(a)
    assert DiT(a)(z, t, y).abs().max() == 0  # adaLN-zero and a zero output layer
    one, two = (DiT(a, generator=torch.Generator().manual_seed(5)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_recomputing_activations_changes_no_gradient():
    a = tiny_arch()
    z, t, y = inputs(a)
    gradients = []
    for recompute in ("none", "blocks", "every_other"):
        model = lively(DiT(a))
        model.recompute = recompute
        model(z, t, y).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_a_name_may_carry_a_depth_and_fields_may_replace_what_it_says():
    a = arch("DiT-B/2-L6", num_classes=10)
    assert (a.num_layers, a.hidden_size, a.num_classes, a.name) == (6, 768, 10, "DiT-B/2-L6")
    assert Arch.model_validate("DiT-S/4").num_tokens == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "DiT-Q/2"}, "DiT-Q/2"),
        ({"name": "DiT-B/3"}, "patch_size 3 does not divide"),
        ({"name": "DiT-B/2", "num_heads": 7}, "num_heads 7 does not divide"),
        ({"name": "DiT-B/2", "num_layers": 0}, "num_layers"),
    ],
)
def test_an_impossible_size_is_refused_in_words(fields, words):
    with pytest.raises(ConfigError, match=words):
        arch(**fields)
