"""FINE's own: what a target keeps, how it interpolates, and the decomposition of an ancestor."""

from __future__ import annotations

import pytest
import torch

from fine_dist.artifacts.load import load_model
from fine_dist.artifacts.targets import descend as make_target
from fine_dist.artifacts.targets import load_target_module
from fine_dist.core.errors import ArtifactError
from fine_dist.data.settings import DataConfig
from fine_dist.engine.settings import LoopConfig
from fine_dist.family.config import DomainConfig, InitConfig
from fine_dist.family.family_plan import Family
from fine_dist.family.train_family import run_family
from fine_dist.methods import build
from fine_dist.methods.fine.config import FineConfig
from fine_dist.methods.fine.method import Fine
from fine_dist.model.arch import MATRICES
from fine_dist.model.depth import INITIALS, relative_depth
from fine_dist.model.dit import DiT
from fine_dist.model.factors import FactoredDiT
from fine_dist.model.roles import of_role
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import artifact_for, parent_for


def test_a_fine_target_keeps_the_genes_and_interpolates_the_rest(generator):
    learngene = artifact_for("fine")
    model = build(FineConfig(sigma="linear")).descend(parent_for("fine"), tiny_arch(num_layers=7), generator).model
    for matrix in MATRICES:
        assert torch.equal(model.factor(matrix).U, learngene.tensors[f"genes.{matrix}.U"])
        table = torch.stack([learngene.tensors[f"blocks.{i}.{matrix}.sigma"] for i in range(4)])
        got = model.sigma_table(matrix)
        torch.testing.assert_close(got[0::2], table)  # 7 layers over 4: every other one lies on a source layer
        torch.testing.assert_close(got[1::2], (table[1:] + table[:-1]) / 2)


def test_a_learngene_is_inherited_at_its_own_rank_and_another_one_is_refused(generator):
    learngene = artifact_for("fine")
    written = learngene.tensors["genes.qkv.U"].shape[1]
    assert written != learngene.arch.hidden_size  # which is the default
    target = tiny_arch(num_layers=2)
    for rank in (None, written):
        method = build(FineConfig(rank=rank))
        method.check(learngene, target)
        made = method.descend(parent_for("fine"), target, generator).model
        assert made.rank == written and torch.equal(made.factor("qkv").U, learngene.tensors["genes.qkv.U"])
    with pytest.raises(ArtifactError, match=f"method.rank 3: .* has rank {written}"):
        build(FineConfig(rank=3)).check(learngene, target)


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
    for own, theirs in zip(of_role(condensed.module, "shell").values(), of_role(ancestor, "shell").values()):
        own.copy_(theirs)
    report = method.carry_over(condensed.module, ancestor, generator, torch.device("cpu"))
    errors = report["decomposition_error"]
    assert set(errors) == set(MATRICES) and all(len(e) == 6 for e in errors.values())
    assert max(max(e) for e in errors.values()) < 0.02
    batch = inputs(source.arch)
    expected = ancestor(*batch)
    assert float(((condensed.module(*batch) - expected).norm() / expected.norm()).detach()) < 0.05
    assert "block weights decomposed (mean relative error: qkv 0.0" in report["carried_over"]


def test_condensing_at_several_depths_trains_the_models_that_targets_start_from(generator):
    """On odd steps the learngene is, output for output, the untrained target of one of the depths."""
    method = Fine(FineConfig(rank=12, depths=(2, 3)))
    arch = tiny_arch(num_layers=5)
    condensed = method.condense(arch, None, generator)
    module = lively(condensed.module).train()
    z, t, y = inputs(arch)
    whole = module.eval()(z, t, y)
    seen = set()
    for step in range(12):
        condensed.before_step(step, torch.Generator().manual_seed(step))
        output = module.train()(z, t, y)
        if step % 2 == 0:
            torch.testing.assert_close(output, whole)
            continue
        taken = tuple(module.active)
        seen.add(taken)
        target = FactoredDiT(tiny_arch(num_layers=len(taken)), 12)
        state = of_role(module, "gene", "shell")
        for matrix in MATRICES:
            sigma = torch.stack([module.sigma(matrix, layer) for layer in range(5)])
            biases = torch.stack([module.bias(matrix, layer) for layer in range(5)])
            made = INITIALS["nearest"].layers(matrix, sigma, biases, len(taken), generator)
            for layer, (s, b) in enumerate(zip(*made)):
                state[f"blocks.{layer}.{matrix}.sigma"], state[f"blocks.{layer}.{matrix}.bias"] = s, b
        target.load_state_dict(state)
        torch.testing.assert_close(output, target(z, t, y))  # the same products in the same order
        torch.testing.assert_close(module.eval()(z, t, y), whole)  # measuring is always of the whole learngene
    assert seen == {(0, 4), (0, 2, 4)}
    assert method.sigma_initial({"initial": "decompose", "depths": [2, 3]}) == "nearest"


@pytest.mark.parametrize("trains", ["sigma", "sigma_and_biases"])
def test_stage_2_trains_sigma_alone_or_the_biases_of_layers_too_which_no_pack_takes(trains, digit_shards, tmp_path):
    learngene, arch = artifact_for("fine"), tiny_arch(num_layers=2)
    method = Fine(FineConfig(trains=trains))
    data = DataConfig(shards=str(digit_shards / "train"))
    engine = LoopConfig(device="cpu", threads=1, checkpoint_every=100)
    config = InitConfig(run_dir=str(tmp_path), parent=str(learngene.folder), method=method.config, steps=3, batch=16,
                        domains={"digits": DomainConfig(data=data)}, depths=(2,), engine=engine)  # fmt: skip
    family = Family(config)
    [member] = family.members
    begun = make_target(method, family.parent, arch, member.seed).model
    assert (method.pack(begun) is None) == (trains == "sigma_and_biases")
    run_family(family, inside=False)
    _, module, artifact = load_target_module(member.folder)
    moved = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, begun.state_dict()[name])}
    assert {name.rpartition(".")[2] for name in moved} == ({"sigma"} if trains == "sigma" else {"sigma", "bias"})
    assert all(name.startswith("blocks.") for name in moved)  # no bias of the embedders or the final layer
    assert not any(name.startswith("genes.") for name in artifact.tensors)  # U and V stay with the learngene
    dense, _ = load_model(member.folder)
    torch.testing.assert_close(dense(*inputs(arch)), module(*inputs(arch)), atol=1e-5, rtol=1e-5)
