"""The contract of methods: tests of everything that stages, packs, exports and studies assume about a method.

The author of a method subclasses `MethodContract` in a test file, and pytest runs its tests on a tiny model:

    from fine_dist.testing import MethodContract

    class TestMyMethod(MethodContract):
        name = "my_method"
        settings = {"rank": 8}

Without pytest, `TestMyMethod.check()` runs them all. Failures are `AssertionError`. This project's own methods are
tested by the same class.
"""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fine_dist.artifacts.targets import changed_tensors, load_target, merged, save_target
from fine_dist.artifacts.targets import descend as make_target
from fine_dist.core.config import validate
from fine_dist.core.errors import ArtifactError
from fine_dist.diffusion.objective import (
    DiffusionLoss,
    FeatureDistillation,
    LossTerm,
    Objective,
    OutputDistillation,
    Teacher,
)
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.samplers import sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.methods import CONDENSES, METHODS, SCRATCH, build, check, from_manifest, parent_of
from fine_dist.methods.base import Descent, Method, MethodConfig, Parent
from fine_dist.model.arch import Arch
from fine_dist.model.artifact import Artifact
from fine_dist.model.dit import FinalLayer
from fine_dist.testing.tiny_models import NoiseBatch, condensed, inputs, lively, moved, saved, tiny_arch, trained

PROCESSES = (DiffusionConfig(), DiffusionConfig(process="flow", time="logit_normal", time_shift=2.0))
"""Diffusion processes under which a target must train and be sampled."""
TOLERANCE = 1e-5
"""Tolerance of outputs of order 1 that are summed in another order in float32."""


class MethodContract:
    """Tests that every method must pass. Subclass it and set `name`; the defaults suit most methods."""

    name: ClassVar[str]
    """The method's name, as in `method.name`."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings that suit a model of width 32 with 4 layers."""
    depths: ClassVar[Sequence[int]] = (1, 2, 4, 6)
    """Depths of targets, for a method whose targets may differ in depth from the parent's 4 layers."""
    width: ClassVar[int] = 64
    """Width of another target, for a method whose targets may differ in width from the parent's 32."""
    wide_depth: ClassVar[int] = 3
    """Depth of that target, where the depth may differ as well."""
    learngene: ClassVar[MethodConfig] = CONDENSES
    """Method that condenses the parent's learngene, for a method that takes learngenes and has no stage 1."""

    @classmethod
    def check(cls) -> None:
        """Run all tests; the first failure raises `AssertionError`."""
        for attribute in dir(cls):
            if attribute.startswith("test_"):
                getattr(cls(), attribute)()

    # --- the case: a method with its parent and its targets ---------------------------------------------------------

    @classmethod
    def method(cls) -> Method[Any]:
        """The method with the case's settings."""
        return build(validate(METHODS[cls.name].Config, {"name": cls.name, **cls.settings}))

    @classmethod
    def artifact(cls) -> Artifact | None:
        """The parent of targets: a learngene, an ordinary model, or None."""
        return _artifact_of(cls)  # type: ignore[arg-type]  # classes are hashable, which mypy does not accept

    @classmethod
    def parent(cls) -> Parent | None:
        """The parent with its module."""
        artifact = cls.artifact()
        return parent_of(artifact) if artifact else None

    @classmethod
    def targets(cls) -> dict[str, Arch]:
        """Architectures of targets that the method's traits allow, by what differs from the parent."""
        traits = cls.method().traits
        targets = {f"L{d}": tiny_arch(num_layers=d) for d in cls.depths if "depth" in traits.varies or d == 4}
        if "width" in traits.varies:
            depth = cls.wide_depth if "depth" in traits.varies else 4
            targets["wider"] = tiny_arch(num_layers=depth, hidden_size=cls.width)
        if "classes" in traits.varies and traits.parents != ("none",):
            targets["classes"] = tiny_arch(num_classes=7)
        return targets

    @classmethod
    def descent(cls, kind: str, seed: int = 0) -> Descent:
        """One initialized target, built as the stages build it."""
        return make_target(cls.method(), cls.parent(), cls.targets()[kind], seed)

    @classmethod
    def last(cls) -> str:
        """The last of `targets`, which differs most from its parent."""
        return list(cls.targets())[-1]

    # --- targets ----------------------------------------------------------------------------------------------------

    def test_a_target_has_the_shape_asked_for_and_is_the_same_for_the_same_seed(self) -> None:
        """A target has the requested architecture and finite outputs, and is a function of the seed."""
        for kind, arch in self.targets().items():
            one, two = (self.descent(kind).model for _ in range(2))
            assert one.arch == arch, kind
            if self.method().traits.dense:
                blocks: Any = one.blocks
                assert len(blocks) == arch.num_layers, kind
            out = one(*inputs(arch))
            assert out.shape == (3, *arch.latent_shape) and out.isfinite().all(), kind
            for (key, left), right in zip(one.state_dict().items(), two.state_dict().values()):
                assert torch.equal(left, right), f"{kind}: {key} differs between two targets of one seed"

    def test_merging_gives_an_ordinary_model_with_the_same_outputs(self) -> None:
        """`merge` gives the names, shapes and outputs of a dense DiT, and the same bits every time."""
        method = self.method()
        for kind in self.targets():
            model = moved(self.descent(kind))
            if not method.traits.dense:
                assert merged(method, model) is model, "a model that is not a dense DiT is returned unchanged"
                continue
            same_outputs(merged(method, model), model, kind)  # loading is strict
            second = method.merge(model)
            assert all(torch.equal(tensor, second[key]) for key, tensor in method.merge(model).items()), kind

    def test_one_step_moves_only_what_may_move(self) -> None:
        """Frozen parameters keep their bits, and some parameters train."""
        descent = self.descent(self.last())
        model: Any = descent.model
        if descent.trains == "all":
            model.requires_grad_(True)
        with torch.no_grad():
            for inner in model.modules():
                if isinstance(inner, FinalLayer) and isinstance(inner.linear, nn.Linear):
                    inner.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
        before = copy.deepcopy(model.state_dict())
        trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
        assert descent.trains != "some" or 0 < len(trained_names) < len(list(model.parameters()))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        (model(*inputs(model.arch)) - 1).square().mean().backward()
        optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and changed <= trained_names, f"frozen parameters changed: {sorted(changed - trained_names)[:5]}"

    def test_a_target_has_a_finite_loss_and_a_gradient_and_can_be_sampled_under_every_process(self) -> None:
        """DDPM and flow matching."""
        for process in PROCESSES:
            descent = self.descent(self.last())
            model: Any = lively(descent.model)
            if descent.trains in ("all", "nothing"):
                model.requires_grad_(True)
            losses = Objective(process, model.arch, seed=0)(model, NoiseBatch(0, model.arch))
            losses.mean().backward()
            assert losses.isfinite().all(), process.process
            assert any(p.grad is not None and p.grad.any() for p in model.parameters()), process.process
            steps = SamplerConfig(steps=2)
            labels = torch.tensor([1])
            images = sample(model, labels=labels, arch=model.arch, config=steps, diffusion=process, seed=0)
            assert images.isfinite().all(), process.process

    def test_a_target_loads_into_its_methods_module_and_costs_what_is_in_it(self) -> None:
        """`module` takes the target's tensors; `cost` counts its numbers; `tables` have a row for each layer."""
        method, model = self.method(), self.descent(self.last()).model
        arch: Any = model.arch
        state = model.state_dict()
        empty = method.module(arch, state)
        empty.load_state_dict(state)
        same_outputs(empty, model, "module")  # possibly by another compute path
        cost = method.cost(model, 2)
        assert cost.stored == sum(p.numel() for p in model.parameters())
        assert cost.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert 0 < cost.forward < cost.training
        tables = method.tables(model)
        assert all(table.shape[0] == arch.num_layers and table.dim() == 2 for table in tables.values())
        assert bool(tables) <= bool(method.tables_of), "tables need a title: tables_of"

    def test_a_target_comes_back_from_disk_with_the_same_outputs(self) -> None:
        """A target is written without its parent's tensors, and read again with them."""
        method, descent, parent = self.method(), self.descent(self.last()), self.parent()
        model: Any = moved(descent)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "target"
            if descent.trains == "nothing":
                back = parent_of(saved(folder, "model", method, model)).module
            else:
                settings = method.config.model_dump(mode="json")
                own, names = changed_tensors(model, parent), list(model.state_dict())
                facts = {"seed": 0}
                save_target(
                    folder, method=settings, parent=parent, arch=model.arch, tensors=own, names=names, facts=facts
                )
                back, _ = load_target(folder)
            same_outputs(back, model, "read again")

    # --- stage 1 ----------------------------------------------------------------------------------------------------

    def test_stage_1_begins_the_same_for_the_same_seed_and_as_its_blueprint_says(self) -> None:
        """Stage 1 is a function of the seed; `blueprint` has the parameters of the trained module."""
        method = self.method()
        if not method.traits.condenses:
            return
        (_, one), (condensation, two) = condensed(method), condensed(method)
        state = one.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in two.state_dict().items())
        with torch.device("meta"):
            plan = method.blueprint(method.auxiliary(tiny_arch()))
        shapes = {key: p.shape for key, p in condensation.module.named_parameters()}
        assert {key: p.shape for key, p in plan.named_parameters()} == shapes
        assert method.cost(plan, 2).stored == sum(p.numel() for p in condensation.module.parameters())

    def test_latents_need_not_be_square(self) -> None:
        """A learngene, or a target without a parent, takes latents whose width and height differ."""
        method, arch = self.method(), tiny_arch(input_size=(4, 8))
        models = []
        if method.traits.condenses:
            models.append(lively(condensed(method, arch)[0].module))
        if "none" in method.traits.parents:
            models.append(lively(make_target(method, None, arch, 0).model))
        for model in models:
            out = model(*inputs(arch))
            out = getattr(out, "out", out)
            assert out.shape == (3, 1, 4, 8) and out.isfinite().all()

    def test_every_number_of_stage_1_meets_its_loss(self) -> None:
        """Every parameter of stage 1 gets a gradient within a few steps, under every process."""
        method = self.method()
        if not method.traits.condenses:
            return
        for process in PROCESSES:
            condensation, _ = condensed(method)
            module = lively(condensation.module)
            weights, arch = method.traits.loss, tiny_arch()
            blocks = [int(theirs.rpartition(".")[2]) for _, theirs in condensation.pairs]
            teacher = Teacher(trained(tiny_arch(num_layers=5)), blocks)
            terms: list[LossTerm] = [
                DiffusionLoss(make_process(process), weights.diffusion),
                OutputDistillation(teacher, weights.output),
                FeatureDistillation(teacher, condensation.pairs, weights.features),
            ]
            objective = Objective(process, arch, seed=0, terms=terms)
            for step in range(4):  # a random route of one step may not reach all parameters
                if condensation.before_step:
                    condensation.before_step(step, torch.Generator().manual_seed(step))
                objective(module, NoiseBatch(step, arch)).mean().backward()
            without = [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any()]
            assert not without, f"parameters without a gradient: {without[:5]}"

    def test_a_learngene_comes_back_from_disk_and_is_a_model_itself(self) -> None:
        """A learngene reads back bit by bit, and merges into a model of its own depth."""
        method = self.method()
        if not method.traits.condenses:
            return
        with tempfile.TemporaryDirectory() as name:
            artifact = saved(Path(name) / "learngene", "learngene", method, lively(condensed(method)[1], std=0.15))
            module = parent_of(artifact).module
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, artifact.tensors[key]), key
        same_outputs(merged(method, module), module, "learngene")
        assert method.cost(module).stored == sum(p.numel() for p in module.parameters())
        assert all(table.shape[0] == artifact.arch.num_layers for table in method.tables(module).values())

    # --- settings and errors ----------------------------------------------------------------------------------------

    def test_settings_survive_the_manifest(self) -> None:
        """An artifact's manifest holds the settings; lists and reports have a label, a line and a source."""
        config = self.method().config
        assert from_manifest(config.model_dump(mode="json")).config == config
        method = METHODS[self.name]
        assert method.summary and method.paper and method.label

    def test_a_target_that_a_method_does_not_claim_is_refused_with_the_reason(self) -> None:
        """A target that differs in a property outside `traits.varies`, or a missing parent, is a named error."""
        method, artifact = self.method(), self.artifact()
        if artifact is None:
            return
        others = {
            "depth": {"num_layers": 9},
            "width": {"hidden_size": 48},
            "classes": {"num_classes": 12},
            None: {"in_channels": 4},
        }
        for freedom, fields in others.items():
            if freedom not in method.traits.varies:
                target = tiny_arch(**{"num_layers": 4, **fields})
                [(field, value)] = fields.items()
                pattern = rf"{field} is .* in the parent, {value} in the target"
                refused(functools.partial(check, method, artifact, target), pattern)
        if "none" not in method.traits.parents:
            refused(lambda: check(method, None, tiny_arch()), "starts from a ")


def same_outputs(one: nn.Module, other: nn.Module, what: str) -> None:
    """Assert that two models give the same outputs for the same inputs, up to rounding."""
    arch: Any = other.arch
    batch = inputs(arch)
    torch.testing.assert_close(one(*batch), other(*batch), atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m: f"{what}: {m}")


def refused(call: Callable[[], object], pattern: str) -> None:
    """Assert that the call raises an `ArtifactError` whose message matches the pattern."""
    try:
        call()
    except ArtifactError as error:
        assert re.search(pattern, str(error)), f"{pattern!r} is not in: {error}"
    else:
        raise AssertionError(f"no error was raised; expected an ArtifactError with {pattern!r}")


@functools.cache
def _artifact_of(case: type[MethodContract]) -> Artifact | None:
    method, folder = case.method(), Path(_folder().name) / f"{case.name}-{id(case)}"
    kinds = method.traits.parents
    if "learngene" in kinds:
        condenses = method.traits.condenses and case.name in method.from_methods
        maker = method if condenses else build(case.learngene)
        return saved(folder, "learngene", maker, lively(condensed(maker)[1], std=0.15))
    return saved(folder, "model", build(SCRATCH), trained(tiny_arch())) if "model" in kinds else None


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="methods-")
