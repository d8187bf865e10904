"""SN-Net's stitches against numpy's least squares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fine_dist.methods import check, parent_of
from fine_dist.methods.stitching.pool import all_routes, least_squares, trace
from fine_dist.model.artifact import load_artifact, save_artifact
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import method_of, saved_and_read

ARCH = tiny_arch(num_layers=3)


@pytest.fixture(scope="module")
def learngene(tmp_path_factory):
    method = method_of("snnet")
    pool = lively(method.condense(ARCH, None, torch.Generator().manual_seed(0)).module)
    folder = tmp_path_factory.mktemp("snnet") / "learngene"
    settings = method.config.model_dump(mode="json")
    save_artifact(folder, kind="learngene", method=settings, arch=ARCH, tensors=pool.state_dict())
    return parent_of(load_artifact(folder))


def test_least_squares_are_numpys(generator):
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    weight, bias = least_squares(x, y)
    ones = np.concatenate([x.double().numpy(), np.ones((50, 1))], 1)
    expected, *_ = np.linalg.lstsq(ones, y.double().numpy(), rcond=None)
    np.testing.assert_allclose(weight.numpy(), expected[:-1].T, atol=1e-10)
    np.testing.assert_allclose(bias.numpy(), expected[-1], atol=1e-10)
    exact = x @ torch.arange(12.0).reshape(6, 2) + 3  # what is a linear map comes back
    weight, bias = least_squares(x, exact)
    torch.testing.assert_close(weight.float(), torch.arange(12.0).reshape(6, 2).T, atol=1e-4, rtol=1e-4)


def test_a_window_shares_the_mean_of_its_pairs_solutions(learngene):
    method = method_of("snnet", images=20)
    z, y = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(4)), torch.arange(20) % 10
    parent = dataclasses.replace(learngene, samples=(z, y))
    pool = method.descend(parent, ARCH, torch.Generator().manual_seed(7)).model
    assert sorted(pool.stitches) == ["0_0", "0_1", "1_0", "1_1"]  # two windows of three blocks, two neighbors
    question = method.questions(ARCH, parent, torch.Generator().manual_seed(7))
    assert torch.equal(question[2], y)
    small, large = (trace(learngene.module.anchors[i], *question) for i in (0, 1))
    solutions = []
    # window (1, 2), without the pair (1, 1) that window (0, 1) holds already
    for last, first in ((1, 2), (2, 1), (2, 2)):
        given = np.concatenate([small[last + 1].double().numpy(), np.ones((len(small[0]), 1))], 1)
        solutions.append(np.linalg.lstsq(given, large[first].double().numpy(), rcond=None)[0])
    mean = sum(solutions) / 3
    np.testing.assert_allclose(pool.stitches["0_1"].weight.detach().numpy(), mean[:-1].T, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(pool.stitches["0_1"].bias.detach().numpy(), mean[-1], atol=1e-4, rtol=1e-3)


def test_the_input_of_a_back_block_is_what_it_is_fitted_to(learngene):
    z, t, y = inputs(ARCH)
    anchor = learngene.module.anchors[1]
    traced = trace(anchor, z, t, y)
    x, condition = anchor.embed(z, t, y)
    torch.testing.assert_close(traced[0], x.flatten(0, 1))
    torch.testing.assert_close(traced[1], anchor.blocks[0](x, condition).flatten(0, 1))
    assert len(traced) == 4


def test_least_squares_begin_nearer_than_an_untrained_map(learngene):
    pool = method_of("snnet").descend(learngene, ARCH, torch.Generator().manual_seed(0)).model
    batch = inputs(ARCH, batch=32, seed=9)
    front, back = trace(pool.anchors[0], *batch), trace(pool.anchors[1], *batch)
    stitch = pool.stitches["0_1"]
    error = float((stitch(front[2]) - back[2]).square().mean().detach())
    with torch.no_grad():
        stitch.reset_parameters()
    assert error < 0.5 * float((stitch(front[2]) - back[2]).square().mean().detach())


def test_routes_are_shared_by_windows_and_a_target_comes_back_whole(learngene, tmp_path):
    method = method_of("snnet", images=4)
    check(method, learngene.artifact, ARCH)
    pool = method.descend(learngene, ARCH, torch.Generator().manual_seed(0)).model
    assert pool.routes == all_routes(3, 3) and len({pool.stitch_key(r) for r in pool.routes[3:]}) == 4
    back, inherited = saved_and_read(tmp_path / "t", method, pool, learngene)
    batch = inputs(ARCH)
    for route in pool.routes[::4]:
        pool.route = back.route = route
        assert torch.equal(back(*batch), pool(*batch))
    assert all(not name.startswith("stitches.") for name in inherited) and "anchors.0.patch.weight" in inherited
