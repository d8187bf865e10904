"""FRONT: resampling by low frequencies, against scipy's transform and what must stay."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.fft
import torch

from fine_dist.methods.front import cosines, resize
from tests.conftest import inputs, tiny_arch
from tests.methods.making import method_of, model_parent


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return model_parent(tmp_path_factory.mktemp("parent") / "model")


def made(parent, keep: float = 1.0, **fields):
    return method_of("front", keep=keep).descend(parent, tiny_arch(**fields), torch.Generator().manual_seed(0)).model


@pytest.mark.parametrize("size", [5, 8, 13])
def test_resampling_is_scipys_transform_cut_or_padded(size, generator):
    x = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    spectrum = scipy.fft.dct(x.numpy(), norm="ortho")
    wanted = np.zeros((3, size))
    wanted[:, : min(8, size)] = spectrum[:, :size]
    expected = scipy.fft.idct(wanted, norm="ortho") * np.sqrt(size / 8)
    np.testing.assert_allclose(resize(x, 1, 1, size, 1.0).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(cosines(8) @ cosines(8).T, np.eye(8), atol=1e-12)


def test_a_constant_axis_stays_constant_and_groups_do_not_mix():
    x = torch.tensor([[1.0] * 4 + [2.0] * 4 + [3.0] * 4])
    out = resize(x, 1, 3, 6, 0.25)
    torch.testing.assert_close(out, torch.tensor([[1.0] * 6 + [2.0] * 6 + [3.0] * 6]))


def test_with_all_frequencies_a_target_of_the_same_shape_is_a_copy(parent):
    model, batch = made(parent), inputs(parent.arch)
    torch.testing.assert_close(model(*batch), parent.module(*batch), atol=1e-5, rtol=1e-5)


def test_fewer_frequencies_are_fewer_numbers(parent):
    """Half of the frequencies along depth, rows and columns leave an eighth of the numbers of the stack."""
    model = made(parent, keep=0.5)
    stack = torch.stack([block.get_submodule("in").weight.detach().double() for block in model.blocks])
    spectrum = stack.numpy()
    for axis in range(3):
        spectrum = scipy.fft.dct(spectrum, axis=axis, norm="ortho")
    l, m, n = spectrum.shape
    inside = np.linalg.norm(spectrum[: l // 2, : m // 2, : n // 2])
    assert inside == pytest.approx(np.linalg.norm(spectrum), rel=1e-9)


def test_a_wider_target_keeps_the_variance_of_sums(parent):
    model = made(parent, hidden_size=64, num_heads=4, num_layers=3)
    wide, narrow = model.blocks[0].get_submodule("in").weight, parent.module.blocks[0].get_submodule("in").weight
    assert float(wide.detach().norm(dim=1).mean()) == pytest.approx(float(narrow.detach().norm(dim=1).mean()), rel=0.25)
    assert model(*inputs(model.arch)).isfinite().all()


@pytest.mark.parametrize("num_layers", [2, 4, 7])
def test_weights_that_vary_as_one_cosine_over_depth_do_so_at_any_depth(parent, num_layers, generator):
    """A known answer of the whole method: W(l) = A + cos(pi (l + 1/2) / L) B, with L the depth of either model."""
    source = copy.deepcopy(parent)
    mean = {name: torch.randn(p.shape, generator=generator) for name, p in source.module.blocks[0].named_parameters()}
    swing = {name: torch.randn(p.shape, generator=generator) for name, p in source.module.blocks[0].named_parameters()}

    def wanted(name: str, layer: int, depth: int) -> torch.Tensor:
        return mean[name] + math.cos(math.pi * (layer + 0.5) / depth) * swing[name]

    with torch.no_grad():
        for layer, block in enumerate(source.module.blocks):
            for name, parameter in block.named_parameters():
                parameter.copy_(wanted(name, layer, len(source.module.blocks)))
    model = made(source, num_layers=num_layers)
    for layer, block in enumerate(model.blocks):
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(parameter.detach(), wanted(name, layer, num_layers), atol=1e-5, rtol=1e-5)


def test_q_k_and_v_are_resampled_by_themselves(parent):
    """Constant rows stay what they are at twice the width; inputs are divided for the variance of their sum."""
    source = copy.deepcopy(parent)
    with torch.no_grad():
        for block in source.module.blocks:
            qkv = block.get_submodule("qkv").weight
            qkv.copy_(torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(32)[:, None].expand_as(qkv))
    model = made(source, hidden_size=64, num_heads=8)
    expected = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(64)[:, None].expand(-1, 64) / 2**0.5
    torch.testing.assert_close(model.blocks[0].get_submodule("qkv").weight.detach(), expected)
