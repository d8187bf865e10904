"""Every registered method over tiny targets: one contract, whatever its rule."""

from __future__ import annotations

import copy

import pytest
import torch

from fine_dist.artifacts.targets import descend as make_target
from fine_dist.artifacts.targets import load_target, merged, own_tensors, save_target
from fine_dist.core.errors import ArtifactError, ConfigError
from fine_dist.diffusion.objective import DiffusionLoss, FeatureDistillation, Objective, OutputDistillation, Teacher
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.samplers import sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.methods import METHODS, build, check, from_manifest, parent_of
from fine_dist.methods.fine.config import FineConfig
from fine_dist.model.dit import FinalLayer
from tests.conftest import inputs, lively, tiny_arch
from tests.methods.making import artifact_for, condensed, moved, parent_for, save, targets_of, tiny, trained

TARGETS = [pytest.param(name, kind, id=f"{name}-{kind}") for name in METHODS for kind in targets_of(name)]
ONE_EACH = [pytest.param(name, list(targets_of(name))[-1], id=name) for name in METHODS]
PROCESSES = (DiffusionConfig(), DiffusionConfig(process="flow", time="logit_normal", time_shift=2.0))
CONDENSING = [name for name in METHODS if tiny(name).traits.condenses]


def descend(name, kind, seed=0):
    """(method, descent) of one target, by the way that every stage takes."""
    method = tiny(name)
    return method, make_target(method, parent_for(name), targets_of(name)[kind], seed)


@pytest.mark.parametrize(("name", "kind"), TARGETS)
def test_a_target_has_the_shape_asked_for_and_is_the_same_for_the_same_seed(name, kind):
    one, two = (descend(name, kind)[1].model for _ in range(2))
    a = targets_of(name)[kind]
    assert one.arch == a
    if tiny(name).traits.dense:
        assert len(one.blocks) == a.num_layers
    out = one(*inputs(a))
    assert out.shape == (3, 1, 8, 8) and out.isfinite().all()
    for (key, left), right in zip(one.state_dict().items(), two.state_dict().values()):
        assert torch.equal(left, right), key


@pytest.mark.parametrize(("name", "kind"), TARGETS)
def test_merging_gives_an_ordinary_model_with_the_same_outputs(name, kind):
    method, descent = descend(name, kind)
    model = moved(descent)
    if not method.traits.dense:
        assert merged(method, model) is model  # its product is itself
        return
    dense = merged(method, model)  # strict: names and shapes are those of a dense DiT
    batch = inputs(model.arch)
    # 1e-5 of outputs near 1: two orders of summation in fp32
    torch.testing.assert_close(dense(*batch), model(*batch), atol=1e-5, rtol=1e-5)
    again = method.merge(model)
    assert all(torch.equal(tensor, again[key]) for key, tensor in method.merge(model).items())


@pytest.mark.parametrize(("name", "kind"), ONE_EACH)
def test_one_step_moves_only_what_may_move(name, kind):
    _, descent = descend(name, kind)
    model = descent.model
    if descent.trains == "all":
        model.requires_grad_(True)
    with torch.no_grad():
        for inner in model.modules():
            if isinstance(inner, FinalLayer) and isinstance(inner.linear, torch.nn.Linear):
                inner.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    before = copy.deepcopy(model.state_dict())
    may = {n for n, p in model.named_parameters() if p.requires_grad}
    assert descent.trains != "some" or 0 < len(may) < len(list(model.parameters()))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    (model(*inputs(model.arch)) - 1).square().mean().backward()
    optimiser.step()
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved and moved <= may


@pytest.mark.parametrize("process", PROCESSES, ids=lambda config: config.process)
@pytest.mark.parametrize(("name", "kind"), ONE_EACH)
def test_a_target_has_a_finite_loss_and_a_gradient_and_can_be_sampled_under_every_process(name, kind, process):
    _, descent = descend(name, kind)
    model = lively(descent.model)
    if descent.trains in ("all", "nothing"):
        model.requires_grad_(True)
    objective = Objective(process, model.arch, seed=0)
    losses = objective(model, Digits(0, model.arch))
    losses.mean().backward()
    assert losses.isfinite().all() and any(p.grad is not None and p.grad.any() for p in model.parameters())
    images = sample(
        model, labels=torch.tensor([1]), arch=model.arch, config=SamplerConfig(steps=2), diffusion=process, seed=0
    )
    assert images.isfinite().all()


@pytest.mark.parametrize(("name", "kind"), ONE_EACH)
def test_a_target_loads_into_its_methods_module_and_costs_what_is_in_it(name, kind):
    method, descent = descend(name, kind)
    model = descent.model
    state = model.state_dict()
    empty = method.module(model.arch, state)
    empty.load_state_dict(state)
    batch = inputs(model.arch)
    torch.testing.assert_close(empty(*batch), model(*batch), atol=1e-5, rtol=1e-5)  # by another compute path, maybe
    cost = method.cost(model, 2)
    assert cost.stored == sum(p.numel() for p in model.parameters())
    assert cost.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < cost.forward < cost.training
    tables = method.tables(model)
    assert all(table.shape[0] == model.arch.num_layers and table.dim() == 2 for table in tables.values())
    assert bool(tables) <= bool(method.tables_of)


@pytest.mark.parametrize(("name", "kind"), ONE_EACH)
def test_a_target_comes_back_from_disk_with_the_same_outputs(name, kind, tmp_path):
    method, descent = descend(name, kind)
    model, parent = moved(descent), parent_for(name)
    if descent.trains == "nothing":
        back = parent_of(save(tmp_path / "model", "model", method, model)).module
    else:
        settings = method.config.model_dump(mode="json")
        own, names = own_tensors(model, parent), list(model.state_dict())
        facts = {"seed": 0}
        save_target(
            tmp_path / "target", method=settings, parent=parent, arch=model.arch, own=own, names=names, facts=facts
        )
        back, _ = load_target(tmp_path / "target")
    batch = inputs(model.arch)
    torch.testing.assert_close(back(*batch), model(*batch), atol=1e-5, rtol=1e-5)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDENSING)
def test_stage_1_begins_the_same_for_the_same_seed_and_as_its_blueprint_says(name):
    method = tiny(name)
    (_, one), (whole, two) = condensed(method), condensed(method)
    state = one.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in two.state_dict().items())
    with torch.device("meta"):
        plan = method.blueprint(method.auxiliary(tiny_arch()))
    shapes = {key: p.shape for key, p in whole.module.named_parameters()}
    assert {key: p.shape for key, p in plan.named_parameters()} == shapes
    assert method.cost(plan, 2).stored == sum(p.numel() for p in whole.module.parameters())


@pytest.mark.parametrize("process", PROCESSES, ids=lambda config: config.process)
@pytest.mark.parametrize("name", CONDENSING)
def test_every_number_of_stage_1_meets_its_loss(name, process):
    method = tiny(name)
    condensation, _ = condensed(method)
    module = lively(condensation.module)
    weights, a = method.traits.loss, tiny_arch()
    teacher = Teacher(trained(tiny_arch(num_layers=5)), [int(b.rpartition(".")[2]) for _, b in condensation.pairs])
    terms = [
        DiffusionLoss(make_process(process), weights.diffusion),
        OutputDistillation(teacher, weights.output),
        FeatureDistillation(teacher, condensation.pairs, weights.features),
    ]
    objective = Objective(process, a, seed=0, terms=terms)
    for step in range(4):  # a path that is drawn for a step leaves others alone
        if condensation.before_step:
            condensation.before_step(step, torch.Generator().manual_seed(step))
        objective(module, Digits(step, a)).mean().backward()
    silent = [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


class Digits:
    """A batch of noise with every label."""

    def __init__(self, step, a):
        generator = torch.Generator().manual_seed(step)
        self.step, self.labels = step, torch.arange(a.num_classes)
        self.latents = torch.randn(a.num_classes, *a.latent_shape, generator=generator)
        self.positions = torch.arange(a.num_classes)


@pytest.mark.parametrize("name", CONDENSING)
def test_a_learngene_comes_back_from_disk_and_is_a_model_itself(name):
    artifact, method = artifact_for(name), tiny(name)
    parent = parent_of(artifact)
    for key, tensor in parent.module.state_dict().items():
        assert torch.equal(tensor, artifact.tensors[key])
    model = merged(method, parent.module)
    batch = inputs(artifact.arch)
    torch.testing.assert_close(model(*batch), parent.module(*batch), atol=1e-5, rtol=1e-5)
    cost = method.cost(parent.module)
    assert cost.stored == sum(p.numel() for p in parent.module.parameters())
    assert all(table.shape[0] == artifact.arch.num_layers for table in method.tables(parent.module).values())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_the_manifest(name):
    config = METHODS[name].Config(name=name)
    assert from_manifest(config.model_dump(mode="json")).config == config
    assert METHODS[name].summary and METHODS[name].paper and METHODS[name].label


@pytest.mark.parametrize("name", [name for name in METHODS if tiny(name).traits.parents != ("none",)])
def test_a_target_that_a_method_does_not_claim_is_refused_with_the_reason(name):
    method, artifact = tiny(name), artifact_for(name)
    others = {
        "depth": {"num_layers": 9},
        "width": {"hidden_size": 48},
        "classes": {"num_classes": 12},
        None: {"in_channels": 4},
    }
    for freedom, fields in others.items():
        if freedom not in method.traits.varies:
            [field] = fields
            with pytest.raises(ArtifactError, match=rf"{field} is .* in the parent, {fields[field]} in the target"):
                check(method, artifact, tiny_arch(**{"num_layers": 4, **fields}))
    with pytest.raises(ArtifactError, match="starts from a "):
        check(method, None, tiny_arch())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, "hidden_size is 32 in the parent, 64 in the target"),
        ({"num_classes": 12}, "num_classes is 10 in the parent, 12"),
        ({"in_channels": 4}, "in_channels"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(fields, words):
    with pytest.raises(ArtifactError, match=words):
        check(build(FineConfig()), artifact_for("fine"), tiny_arch(**fields))


def test_a_missing_or_wrong_parent_or_method_is_said_with_the_methods_that_could():
    learngene = artifact_for("fine")
    with pytest.raises(ArtifactError, match=r"starts from a learngene.*methods that could: .*scratch"):
        check(build(FineConfig()), None, tiny_arch())
    with pytest.raises(
        ArtifactError, match=r"is a learngene, and method scratch takes: none; methods that could: .*fine"
    ):
        check(build(METHODS["scratch"].Config(name="scratch")), learngene, tiny_arch())
    with pytest.raises(ArtifactError, match="did you mean 'fine'"):
        from_manifest({"name": "fin"})
    with pytest.raises(ConfigError, match="rank"):
        from_manifest({"name": "fine", "rank": 0})
    with pytest.raises(ConfigError, match="scratch has no stage 1"):
        build(METHODS["scratch"].Config(name="scratch")).condense(tiny_arch(), None, torch.Generator())
