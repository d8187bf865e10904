"""Shared factors: two paths, one function; what trains; how many numbers are stored."""

from __future__ import annotations

import copy

import pytest
import torch

from fine_dist.model.arch import MATRICES, arch
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT, Genes, cheaper_path, multiply_adds, sigma_std
from fine_dist.model.roles import roles, train_only
from tests.conftest import inputs, lively, tiny_arch


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_both_paths_give_the_same_outputs_and_gradients(rank):
    a = tiny_arch()
    z, t, y = inputs(a)
    results = []
    for path in ("composed", "factored"):
        model = lively(FactoredDiT(a, rank, path=path))
        out = model(z, t, y)
        out.square().mean().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
    # The two paths multiply in another order: float32 rounding over 4 layers stays under 1e-4 of the largest entry.
    (out_a, grad_a), (out_b, grad_b) = results
    torch.testing.assert_close(out_a, out_b, atol=1e-4 * float(out_a.abs().max()), rtol=0)
    for name in grad_a:
        scale = float(grad_a[name].abs().max())
        torch.testing.assert_close(
            grad_a[name], grad_b[name], atol=2e-4 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_the_merged_dense_model_computes_the_same(rank):
    a = tiny_arch(learn_sigma=True)
    factored = lively(FactoredDiT(a, rank), std=0.1)
    dense = DiT(a)
    dense.load_state_dict(factored.merge())
    z, t, y = inputs(a)
    torch.testing.assert_close(dense(z, t, y), factored(z, t, y), atol=1e-5, rtol=1e-5)


def test_a_sigma_of_its_own_for_every_sample_equals_one_forward_a_sample(generator):
    genes = Genes(24, 16, 8, generator)
    x, sigma = torch.randn(3, 5, 16, generator=generator), torch.randn(3, 1, 8, generator=generator)
    together = genes(x, sigma)
    for b in range(3):
        alone = x[b] @ (genes.U * sigma[b, 0] @ genes.V.T).T
        torch.testing.assert_close(together[b], alone, atol=1e-5, rtol=1e-5)


def test_genes_are_stored_once_whatever_the_depth():
    a = tiny_arch(num_layers=4)
    d, r, shell = 32, 16, None
    for depth in (2, 4):
        model = FactoredDiT(a.with_depth(depth), r)
        numbers = {}
        for name, p in model.named_parameters():
            numbers[roles(model)[name]] = numbers.get(roles(model)[name], 0) + p.numel()
        assert numbers["gene"] == r * (4 + 2 + 5 + 5 + 7) * d
        assert numbers["scaler"] == depth * 5 * r
        assert numbers["bias"] == depth * 15 * d
        shell = shell or numbers["shell"]
        assert numbers["shell"] == shell
    assert len([k for k in model.state_dict() if k.startswith("genes.")]) == 10


def test_training_sigma_alone_moves_sigma_alone():
    a = tiny_arch()
    model = lively(FactoredDiT(a, 16))
    train_only(model, "scaler")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    z, t, y = inputs(a)
    model(z, t, y).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"blocks.{i}.{kind}.sigma" for i in range(4) for kind in MATRICES}


def test_a_fresh_learngene_has_xaviers_variance_and_closed_gates(generator):
    a = arch("DiT-S/2-L2")
    for rank in (96, 384, 768):
        model = FactoredDiT(a, rank, generator)
        for kind, weight in model.block_weights(1).items():
            m, n = a.matrix(kind)
            if kind == "adaln":
                assert weight.abs().max() == 0
            else:
                # sigma is 96 to 768 Gaussian draws, so its mean square has a relative spread of up to 15%.
                assert float(weight.detach().var()) == pytest.approx(2 / (m + n), rel=0.5)
    assert sigma_std(10, 10, 10) == pytest.approx(1.0)


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_factors_start_with_orthonormal_columns_or_orthogonal_rows(rank, generator):
    genes = Genes(32, 32, rank, generator)
    u = genes.U.detach()
    if rank <= 32:
        torch.testing.assert_close(u.T @ u, torch.eye(rank), atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(u @ u.T, torch.eye(32) * rank / 32, atol=1e-5, rtol=0)


def test_the_choice_by_count_is_the_one_the_arithmetic_gives():
    d, rows = 384, 16 * 256
    sigma_only = {"train_factors": False, "train_scalers": True}
    choice = {k: cheaper_path(rows, *arch("DiT-S/2").matrix(k), d, **sigma_only) for k in ("qkv", "o", "in", "out")}
    assert choice == {"qkv": "factored", "o": "composed", "in": "factored", "out": "factored"}
    assert cheaper_path(16, 6 * d, d, d, train_factors=True, train_scalers=True) == "factored"  # adaln: a row a sample
    assert cheaper_path(rows, 3 * d, d, d, train_factors=True, train_scalers=True) == "composed"
    # 2 r (m + n) against 3 m n multiply-adds a token
    assert multiply_adds("factored", 1, 3 * d, d, d, **sigma_only) == 2 * d * 4 * d
    assert multiply_adds("composed", 10**9, 3 * d, d, d, **sigma_only) / 10**9 == pytest.approx(9 * d * d, rel=1e-3)


def test_the_counted_choice_is_measured_by_torchs_own_flop_counter(generator):
    """The counts are those of the kernels that really run, up to the products no gradient needs."""
    from torch.utils.flop_counter import FlopCounterMode

    for train_factors in (False, True):
        for path in ("composed", "factored"):
            genes = Genes(96, 32, 24, generator, path=path).requires_grad_(train_factors)
            sigma = torch.randn(24, generator=generator).requires_grad_()
            x = torch.randn(64, 32, generator=generator).requires_grad_()
            with FlopCounterMode(display=False) as counter:
                genes(x, sigma).sum().backward()
            counted = 2 * multiply_adds(path, 64, 96, 32, 24, train_factors=train_factors, train_scalers=True)
            assert counter.get_total_flops() == counted, (path, train_factors)


def kept_bytes(model, batch) -> int:
    """Bytes that the backward pass keeps, each tensor once."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*batch).float().square().mean()
    out.backward()
    return sum(kept.values())


def test_in_bf16_factored_products_keep_and_give_bf16_and_sigmas_gradient_is_fp32():
    a = tiny_arch(num_layers=2, input_size=32, hidden_size=64)
    model = train_only(lively(FactoredDiT(a, 32, path="factored"), std=0.1), "scaler")
    batch = inputs(a, batch=16)
    seen = []
    handle = model.blocks[0].qkv.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    exact_bytes = kept_bytes(model, batch)
    exact = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half_bytes = kept_bytes(model, batch)
    handle.remove()
    assert seen == [torch.float32, torch.bfloat16]
    assert half_bytes < 0.75 * exact_bytes  # norms and residual branches stay in fp32
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            # bf16 has 8 bits; its errors average out over the rows of a sum that is made in fp32
            assert float((p.grad - exact[name]).norm() / exact[name].norm().clamp_min(1e-9)) < 0.05, name


def test_a_sigma_a_sample_computes_what_each_would_alone_in_bf16_too():
    genes = Genes(24, 16, 8, torch.Generator().manual_seed(0)).requires_grad_(False)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    sigma = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", torch.bfloat16):
        y = genes(x, sigma, bias)
    for row in range(3):
        wanted = ((x[row] @ genes.V) * sigma[row]) @ genes.U.T + bias
        torch.testing.assert_close(y[row].float(), wanted, atol=0.15, rtol=0.05)
    y.float().sum().backward()
    assert sigma.grad.shape == (3, 1, 8)
