"""GELU by hand is torch's, in value and gradient, in one piece or in many."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fine_dist.model import gelu as room
from fine_dist.model.gelu import gelu


@pytest.fixture(params=["one piece, kept", "pieces, kept", "pieces, made again"])
def way(request, monkeypatch) -> str:
    if "pieces" in request.param:
        monkeypatch.setattr(room, "PIECE", 1000)
    if "again" in request.param:
        monkeypatch.setattr(room, "KEPT_UP_TO", 0)
    return request.param


def exact(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its gradient in fp64."""
    x = x.detach().double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    return y.detach(), torch.autograd.grad(y, x, g.double())[0]


def test_value_and_gradient_are_those_of_fp64(way, generator):
    x = torch.cat([torch.randn(8000, generator=generator) * 4, torch.tensor([0.0, -30.0, 30.0, -1e4, 1e4])])
    x, g = x.requires_grad_(), torch.randn(8005, generator=generator)
    y, g_x = exact(x, g)
    # fp32 rounds p = k (x + c x^3), up to 60 where s still differs from 0 and 1: 1e-7 of that, and the sigmoid's own
    torch.testing.assert_close(gelu(x).detach().double(), y, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(gelu(x), x, g)[0].double(), g_x, atol=1e-5, rtol=1e-5)


def test_in_bf16_it_rounds_no_more_than_torchs(way, generator):
    x = (torch.randn(64, 96, generator=generator) * 3).bfloat16().requires_grad_()
    g = torch.randn(64, 96, generator=generator).bfloat16()
    y, g_x = exact(x, g)
    ours, theirs = gelu(x), F.gelu(x, approximate="tanh")
    assert ours.dtype == torch.bfloat16
    of_ours, of_theirs = (torch.autograd.grad(z, x, g)[0] for z in (ours, theirs))
    for a, b, want in ((ours, theirs, y), (of_ours, of_theirs, g_x)):
        # a result's own rounding is all that is left, 2^-9 of it; a tenth for ties that fall the other way
        assert float((a.detach().double() - want).norm()) <= 1.1 * float((b.detach().double() - want).norm())


def test_tensors_that_do_not_lie_in_one_piece_are_taken_too(generator):
    x = torch.randn(6, 40, generator=generator).T.requires_grad_()
    g = torch.randn(6, 40, generator=generator).T
    y, g_x = exact(x, g)
    torch.testing.assert_close(gelu(x).detach().double(), y, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(torch.autograd.grad(gelu(x), x, g)[0].double(), g_x, atol=1e-5, rtol=1e-5)
    assert gelu(torch.empty(0, 4)).shape == (0, 4)
