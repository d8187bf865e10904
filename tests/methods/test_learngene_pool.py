"""The pool: its anchors, its distillation, its routes, and what becomes of them on disk."""

from __future__ import annotations

import copy

import pytest
import torch

from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.diffusion.objective import FeatureDistillation, NoisedBatch, Teacher
from fine_dist.methods import METHODS, build, check, parent_of
from fine_dist.methods.stitching.learngene_pool import between, thirds
from fine_dist.methods.stitching.pool import Imitating, Pool, Route, all_routes, parse_route
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.dit import DiT
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import method_of, num_trained, saved_and_read

TEACHER = tiny_arch(num_layers=12, hidden_size=48)
ARCH = tiny_arch(num_layers=3)


@pytest.fixture(scope="module")
def condensation():
    method = method_of("learngene_pool")
    return method.condense(ARCH, lively(DiT(TEACHER)), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def learngene(condensation, tmp_path_factory):
    pool = lively(copy.deepcopy(condensation.module.pool))
    folder = tmp_path_factory.mktemp("pool") / "learngene"
    method = method_of("learngene_pool").config.model_dump(mode="json")
    save_artifact(folder, kind="learngene", method=method, arch=ARCH, tensors=pool.state_dict())
    return parent_of(load_artifact(folder))


@pytest.fixture(scope="module")
def stitched(learngene):
    method = method_of("learngene_pool")
    pool = method.descend(learngene, ARCH, torch.Generator().manual_seed(0)).model
    return method, lively(pool, seed=3)


@pytest.mark.parametrize(("blocks", "count"), [(6, 18), (9, 27)])
def test_two_anchors_of_six_blocks_have_18_routes_and_of_nine_27(blocks, count):
    routes = all_routes(2, blocks)
    assert len(routes) == len(set(routes)) == count
    assert all(abs(r.last - r.first) <= 1 for r in routes[2:])
    assert {(r.last + 1) + (blocks - r.first) for r in routes[2:]} == {blocks, blocks + 1, blocks + 2}
    assert all(parse_route(str(route)) == route for route in routes)
    assert parse_route("0.3-2.2") is None and parse_route("x") is None


def test_anchors_are_those_of_the_paper_for_dit_b():
    from fine_dist.model.arch import arch as named

    archs = method_of("learngene_pool").archs(named("DiT-B/2-L6"))
    assert [(a.hidden_size, a.num_heads, a.num_layers) for a in archs] == [(192, 3, 6), (384, 6, 6), (768, 12, 6)]
    with pytest.raises(ConfigError, match="ascending, the last one 1"):
        from fine_dist.methods import from_manifest

        from_manifest({"name": "learngene_pool", "widths": [0.5, 0.25]})
    with pytest.raises(ConfigError, match="no whole width"):
        method_of("learngene_pool", widths=(0.3, 1.0)).archs(ARCH)


def test_blocks_imitate_the_teachers_thirds(condensation):
    assert thirds(12) == [3, 7, 11] and thirds(6) == [1, 3, 5] and thirds(28) == [9, 18, 27]
    assert list(condensation.pairs) == [
        *((f"0_{kind}_{i}", f"{kind}.{at}") for i, at in enumerate((3, 7, 11)) for kind in ("block", "attention")),
        *((f"{anchor}_{kind}_2", f"{kind}.11") for anchor in (1, 2) for kind in ("block", "attention")),
    ]  # fmt: skip
    weights = method_of("learngene_pool").traits.loss
    assert (weights.diffusion, weights.output, weights.features) == (0.1, 0.9, 1.8)


def test_features_are_mapped_and_compared_with_the_teachers_of_the_anchor_that_is_trained(condensation):
    module: Imitating = copy.deepcopy(condensation.module)
    teacher_model = lively(DiT(TEACHER))
    term = FeatureDistillation(Teacher(teacher_model, (3, 7, 11)), condensation.pairs)
    z, t, y = inputs(ARCH)
    question = NoisedBatch(z, z, z, t, y)
    wanted = teacher_model.forward_with_features(z, t, y, (3, 7, 11)).features
    for anchor, blocks in ((0, (0, 1, 2)), (2, (2,))):
        module.pool.route = Route(anchor)
        answer = module(z, t, y)
        own = module.pool.anchor(anchor).forward_with_features(z, t, y, (0, 1, 2))
        torch.testing.assert_close(answer.out, own.out)
        errors = []
        for block in blocks:
            for kind in ("block", "attention"):
                linear = module.pool.maps[f"{anchor}_{kind}_{block}"]
                mapped = own.features[f"{kind}.{block}"] @ linear.weight.T + linear.bias
                errors.append((mapped - wanted[f"{kind}.{thirds(12)[block]}"]).square().mean((1, 2)))
        torch.testing.assert_close(term(question, answer), sum(errors) / len(errors))


def test_a_step_trains_one_anchor_and_the_generator_alone_decides_which(condensation):
    module = condensation.module
    chosen = []
    for step in range(30):
        condensation.before_step(step, torch.Generator().manual_seed(step))
        chosen.append(module.pool.route)
    again = []
    for step in range(30):
        condensation.before_step(step, torch.Generator().manual_seed(step))
        again.append(module.pool.route)
    assert chosen == again and set(chosen) == {Route(0), Route(1), Route(2)}
    module.zero_grad(set_to_none=True)
    module.pool.route = Route(1)
    module(*inputs(ARCH)).features["1_block_2"].square().mean().backward()
    assert all(
        n.startswith(("pool.anchors.1.", "pool.maps.1_")) for n, p in module.named_parameters() if p.grad is not None
    )


def test_a_stitch_begins_as_the_mean_of_the_narrow_anchors_block_maps(learngene):
    method = method_of("learngene_pool", widths=(0.5, 1.0))
    pool = method.blueprint(ARCH, ARCH).pool
    lively(pool)
    mean = sum(pool.maps[f"0_block_{third}"].weight for third in range(3)) / 3
    torch.testing.assert_close(between(pool, 0), mean)  # the teacher is as wide as the back anchor
    # narrower back anchor: into the teacher's space and back by least squares, so the map composes with the back's own
    wide = learngene.module
    back = wide.maps["1_block_2"].weight
    torch.testing.assert_close(
        back.T @ (back @ between(wide, 0)),
        back.T @ (sum(wide.maps[f"0_block_{third}"].weight for third in range(3)) / 3),
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    started = method_of("learngene_pool").descend(learngene, ARCH, torch.Generator()).model
    assert len(started.stitches) == 2 * 7 and not started.maps
    assert torch.equal(started.stitches["0_1_2"].weight, between(wide, 0)) and not started.stitches["0_1_2"].bias.any()


def test_a_stitched_route_is_the_front_the_map_and_the_back_with_its_own_conditioning(stitched):
    _, pool = stitched
    front, back = pool.anchors[0], pool.anchors[1]
    z, t, y = inputs(ARCH)
    pool.route = Route(0, 1, 2)
    x, c = front.embed(z, t, y)
    for layer in (0, 1):
        x = front.blocks[layer](x, c)
    x = x @ pool.stitches["0_1_2"].weight.T + pool.stitches["0_1_2"].bias
    own = back.condition(t, y)
    x = back.blocks[2](x, own)
    torch.testing.assert_close(pool(z, t, y), back.unpatchify(back.final(x, own.c)))
    pool.route = Route(2)
    torch.testing.assert_close(pool(z, t, y), pool.anchors[2](z, t, y))


def test_each_step_of_a_target_draws_a_route_that_the_seed_decides(stitched):
    method, pool = stitched
    hook = method.before_step(pool)
    seen = set()
    for step in range(200):
        hook(step, torch.Generator().manual_seed(step))
        seen.add(pool.route)
    assert seen == set(all_routes(3, 3)) and len(seen) == 17
    assert method_of("learngene_pool", route="2").before_step(pool) is None


@pytest.mark.parametrize("name", ["1", "0.2-1.1", "1.0-2.0"])
def test_any_route_deploys_alone_with_the_same_outputs_and_comes_back_from_disk(name, stitched, tmp_path):
    method, pool = stitched
    batch = inputs(ARCH)
    pool.route = parse_route(name)
    expected = pool(*batch)
    own, alone = method.deploy(pool, name)
    assert torch.equal(alone(*batch), expected)
    cost = own.cost(alone)
    assert cost.stored == sum(p.numel() for p in alone.parameters()) < method.cost(pool).stored
    back, _ = saved_and_read(tmp_path / "route", own, alone, None)
    assert torch.equal(back(*batch), expected) and back.route == pool.route
    alone(*batch).square().mean().backward()
    assert all(p.grad is not None for p in alone.parameters())  # nothing is kept that the route does not use


def test_a_whole_pool_comes_back_from_disk_and_a_trained_one_gives_its_routes(stitched, learngene, tmp_path):
    method, pool = stitched
    back, _ = saved_and_read(tmp_path / "t", method, pool, learngene)
    assert back.routes == pool.routes and all(
        torch.equal(a, b) for a, b in zip(back.state_dict().values(), pool.state_dict().values())
    )
    settings = method.config.model_dump(mode="json")
    save_artifact(tmp_path / "m", kind="model", method=settings, arch=ARCH, tensors=pool.state_dict())
    parent = parent_of(load_artifact(tmp_path / "m"))
    cut = method_of("learngene_pool", route="0.0-1.1")
    check(cut, parent.artifact, ARCH)
    descent = cut.descend(parent, ARCH, torch.Generator())
    pool.route = Route(0, 0, 1)
    assert descent.trains == "nothing" and torch.equal(descent.model(*inputs(ARCH)), pool(*inputs(ARCH)))
    with pytest.raises(ArtifactError, match="stitched already"):
        check(method, parent.artifact, ARCH)
    with pytest.raises(ArtifactError, match=r"'0.0-1.2' is no route through 3 anchors of 3 blocks; legal: 0, 1, 2"):
        check(method_of("learngene_pool", route="0.0-1.2"), parent.artifact, ARCH)
    with pytest.raises(ArtifactError, match="is a model of method learngene_pool and not an ordinary DiT"):
        check(method_of("difffit"), parent.artifact, ARCH)


def test_costs_are_those_of_anchors_and_of_what_is_stitched(stitched):
    method, pool = stitched
    dense = build(METHODS["scratch"].Config(name="scratch"))
    for anchor in range(3):
        own, alone = method.deploy(pool, str(anchor))
        want, got = dense.cost(alone.anchors[anchor], 2), own.cost(alone, 2)
        assert got.forward == pytest.approx(want.forward) and got.training == pytest.approx(want.training)
        assert (got.stored, got.trained) == (want.stored, num_trained(alone))
    own, alone = method.deploy(pool, "0.2-1.2")
    narrow, wide = (dense.cost(DiT(a), 2).forward for a in method.archs(ARCH)[:2])
    assert narrow < own.cost(alone, 2).forward < narrow + wide
    assert method.cost(pool).stored == sum(p.numel() for p in pool.parameters())


def test_a_pool_is_condensed_stitched_and_cut_by_the_commands_own_stages(digit_shards, tmp_path):
    from fine_dist.artifacts.load import load_model
    from fine_dist.data.settings import DataConfig
    from fine_dist.engine.settings import EngineConfig, LoopConfig
    from fine_dist.family.config import InitConfig
    from fine_dist.family.family_plan import Family
    from fine_dist.family.train_family import run_family
    from fine_dist.stages.condense import run as condense
    from fine_dist.stages.settings import CondenseConfig

    ancestor = lively(DiT(tiny_arch(num_layers=4, hidden_size=48)))
    save_artifact(
        tmp_path / "a", kind="model", method={"name": "scratch"}, arch=ancestor.arch, tensors=ancestor.state_dict()
    )
    arch = tiny_arch(num_layers=2)
    data = DataConfig(shards=str(digit_shards / "train"))
    method = METHODS["learngene_pool"].Config(name="learngene_pool", widths=(0.5, 1.0))
    loop = {"device": "cpu", "threads": 1}
    folder = condense(
        CondenseConfig(
            run_dir=str(tmp_path / "c"), arch=arch, method=method, ancestor=str(tmp_path / "a"), steps=3, batch=8,
            data=data, engine=EngineConfig(**loop, preview_every=10**9),
        )
    )  # fmt: skip
    names = load_artifact(folder).tensors
    assert any(name.startswith("maps.0_block_0.") for name in names) and any(n.startswith("anchors.1.") for n in names)
    config = InitConfig(
        run_dir=str(tmp_path / "i"), parent=str(folder), depths=(2,), steps=3, batch=8, data=data,
        engine=LoopConfig(**loop, checkpoint_every=100, log_every=1, eval_every=100),
    )  # fmt: skip
    run_family(Family(config), inside=False)
    model, about = load_model(tmp_path / "i" / "L2-s0-lr0.01")
    assert isinstance(model, Pool) and len(model.routes) == 2 + 4 and about["kind"] == "target"
    started = parent_of(load_artifact(folder)).module
    assert not torch.equal(model.anchors[1].final.linear.weight, started.anchors[1].final.linear.weight)
    assert isinstance(model(*inputs(arch)), torch.Tensor)
