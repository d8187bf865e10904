"""Every registered method over tiny targets: one contract, whatever its rule."""

from __future__ import annotations

import copy

import pytest
import torch

from fine_dist.errors import ArtifactError, ConfigError
from fine_dist.methods import METHODS, build, check, from_manifest, parent_of
from fine_dist.methods.fine import Fine, FineConfig
from fine_dist.model.artifact import load_artifact, save_artifact
from fine_dist.model.depth import INITIALS, relative_depth
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from fine_dist.model.zoo import MATRICES
from tests.conftest import inputs, lively, tiny_arch

DEPTHS = (1, 2, 4, 6)


@pytest.fixture(scope="module")
def learngene(tmp_path_factory):
    model = lively(FactoredDiT(tiny_arch(), 24), std=0.15)
    folder = tmp_path_factory.mktemp("artifacts") / "learngene"
    method = FineConfig(rank=24).model_dump()
    save_artifact(folder, kind="learngene", method=method, arch=model.arch, tensors=model.state_dict())
    return load_artifact(folder)


def descend(name, learngene, depth, seed=0):
    method = build(METHODS[name].Config(name=name))
    parent = parent_of(learngene) if "learngene" in method.traits.parents else None
    check(method, learngene if parent else None, tiny_arch(num_layers=depth))
    return method, method.descend(parent, tiny_arch(num_layers=depth), torch.Generator().manual_seed(seed)).model


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", METHODS)
def test_a_target_of_any_depth_is_finite_and_the_same_for_the_same_seed(name, depth, learngene):
    _, one = descend(name, learngene, depth)
    _, two = descend(name, learngene, depth)
    a = tiny_arch(num_layers=depth)
    assert one.arch == a and len(one.blocks) == depth
    out = one(*inputs(a))
    assert out.shape == (3, 1, 8, 8) and out.isfinite().all()
    for (key, left), right in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(left, right), key


@pytest.mark.parametrize("name", METHODS)
def test_merging_gives_an_ordinary_model_with_the_same_outputs(name, learngene):
    method, model = descend(name, learngene, 3)
    dense = DiT(model.arch)
    dense.load_state_dict(method.merge(model))  # strict: names and shapes are those of a dense DiT
    batch = inputs(model.arch)
    torch.testing.assert_close(dense(*batch), model(*batch), atol=1e-5, rtol=1e-5)
    again = method.merge(model)
    assert all(torch.equal(tensor, again[key]) for key, tensor in method.merge(model).items())


@pytest.mark.parametrize("name", METHODS)
def test_one_step_moves_only_what_may_move(name, learngene):
    _, model = descend(name, learngene, 2)
    with torch.no_grad():
        model.final.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())
    may = {n for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    (model(*inputs(model.arch)) - 1).square().mean().backward()
    optimiser.step()
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved and moved <= may
    if isinstance(model, FactoredDiT):
        assert {n.rsplit(".", 1)[1] for n in may} == {"sigma"}


@pytest.mark.parametrize("name", METHODS)
def test_a_target_loads_into_its_methods_module_and_costs_what_is_in_it(name, learngene):
    method, model = descend(name, learngene, 3)
    state = model.state_dict()
    empty = method.module(model.arch, state)
    empty.load_state_dict(state)
    batch = inputs(model.arch)
    torch.testing.assert_close(empty(*batch), model(*batch), atol=1e-5, rtol=1e-5)  # by another compute path, maybe
    cost = method.cost(model, 2)
    assert cost.stored == sum(p.numel() for p in model.parameters())
    assert cost.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < cost.forward < cost.training
    assert all(table.shape[0] == 3 for table in method.tables(model).values())


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_the_manifest(name):
    config = METHODS[name].Config(name=name)
    assert from_manifest(config.model_dump()).config == config
    assert METHODS[name].summary and METHODS[name].paper and METHODS[name].label


def test_settings_of_an_earlier_version_are_read_under_todays_names():
    assert from_manifest({"name": "fine", "start": "decompose"}).config.initial == "decompose"


def test_a_fine_target_keeps_the_genes_and_interpolates_the_rest(learngene, generator):
    model = build(FineConfig(sigma="linear")).descend(parent_of(learngene), tiny_arch(num_layers=7), generator).model
    for matrix in MATRICES:
        assert torch.equal(model.factor(matrix).U, learngene.tensors[f"genes.{matrix}.U"])
        table = torch.stack([learngene.tensors[f"blocks.{i}.{matrix}.sigma"] for i in range(4)])
        got = model.sigma_table(matrix)
        torch.testing.assert_close(got[0::2], table)  # 7 layers over 4: every other one lies on a source layer
        torch.testing.assert_close(got[1::2], (table[1:] + table[:-1]) / 2)


def test_relative_depth_joins_ends_to_ends_and_takes_the_middle_for_one_layer():
    table = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    assert relative_depth(table, 2).flatten().tolist() == [0, 3]
    assert relative_depth(table, 4).flatten().tolist() == [0, 1, 2, 3]
    assert relative_depth(table, 1).flatten().tolist() == [1.5]


@pytest.mark.parametrize("initial", INITIALS)
def test_every_beginning_has_the_targets_shape_and_its_meaning(initial, generator):
    table = torch.randn(8, 500, generator=generator) * 2 + 1
    got = INITIALS[initial](table, 5, generator)
    assert got.shape == (5, 500) and got.isfinite().all()
    if initial == "identical":
        torch.testing.assert_close(got, table.mean(0).expand(5, 500))
    if initial == "random":
        assert float(got.mean()) == pytest.approx(float(table.mean()), abs=0.2)
        assert float(got.std()) == pytest.approx(float(table.std()), rel=0.1)


def test_decomposing_an_ancestor_of_the_form_recovers_it(generator):
    method = Fine(FineConfig(rank=12, sweeps=400, initial="decompose"))
    source = lively(FactoredDiT(tiny_arch(num_layers=6), 12))
    ancestor = DiT(source.arch)
    ancestor.load_state_dict(source.merge())
    condensed = method.condense(source.arch, ancestor, generator)
    errors = condensed.report["decomposition_error"]
    assert set(errors) == set(MATRICES) and all(len(e) == 6 for e in errors.values())
    assert max(max(e) for e in errors.values()) < 0.02
    batch = inputs(source.arch)
    expected = ancestor(*batch)
    assert float(((condensed.module(*batch) - expected).norm() / expected.norm()).detach()) < 0.05
    assert any("qkv" in line for line in condensed.lines)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 in the parent, 64 in the target"),
        ({"num_classes": 12}, "num_classes is 10 in the parent, 12"),
        ({"in_channels": 4}, "in_channels"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(fields, words, learngene):
    with pytest.raises(ArtifactError, match=words):
        check(build(FineConfig()), learngene, tiny_arch(**fields))


def test_a_missing_or_wrong_parent_or_method_is_said_with_the_methods_that_could(learngene):
    with pytest.raises(ArtifactError, match=r"starts from a learngene.*methods that could: he"):
        check(build(FineConfig()), None, tiny_arch())
    with pytest.raises(ArtifactError, match="is a learngene, and method he takes: none; methods that could: fine"):
        check(build(METHODS["he"].Config(name="he")), learngene, tiny_arch())
    with pytest.raises(ArtifactError, match="did you mean 'fine'"):
        from_manifest({"name": "fin"})
    with pytest.raises(ConfigError, match="rank"):
        from_manifest({"name": "fine", "rank": 0})
    with pytest.raises(ConfigError, match="he has no stage 1"):
        build(METHODS["he"].Config(name="he")).condense(tiny_arch(), None, torch.Generator())
