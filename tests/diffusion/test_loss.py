"""The diffusion loss against naive formulas, and its randomness against its promise."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fine_dist.core.seeds import mix
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.objective import (
    DiffusionLoss,
    FeatureDistillation,
    NoisedBatch,
    Objective,
    OutputDistillation,
    Teacher,
)
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.random_draws import PrefetchedDraws, draw
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.dit import DiT, ModelOutput
from tests.conftest import inputs, lively, tiny_arch

CONFIG = DiffusionConfig()
TIMES = make_process(CONFIG).times


def test_the_schedule_is_the_linear_one_of_a_thousand_steps():
    process = make_process(CONFIG)
    alpha_bar, products = 1.0, []
    for i in range(1000):
        alpha_bar *= 1 - (1e-4 + (2e-2 - 1e-4) * i / 999)
        products.append(alpha_bar)
    expected = torch.tensor(products, dtype=torch.float64)
    torch.testing.assert_close(process.signal.double() ** 2, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(process.sigma.double() ** 2, 1 - expected, atol=1e-6, rtol=1e-4)


def test_a_draw_depends_on_seed_step_and_position_alone():
    shape = (1, 4, 4)
    whole = draw(3, 7, torch.arange(8), shape, times=TIMES, label_drop=0.5)
    part = draw(3, 7, torch.tensor([5, 2]), shape, times=TIMES, label_drop=0.5)
    assert torch.equal(part.noise, whole.noise[[5, 2]])
    assert torch.equal(part.t, whole.t[[5, 2]]) and torch.equal(part.drop, whole.drop[[5, 2]])
    for seed, step in ((4, 7), (3, 8)):
        other = draw(seed, step, torch.arange(8), shape, times=TIMES, label_drop=0.5)
        assert not (other.noise == whole.noise).any()


def test_draws_ahead_are_the_draws_wherever_a_run_goes_on_and_whichever_positions_are_asked_for():
    plain = partial(draw, 3, shape=(1, 4, 4), times=TIMES, label_drop=0.5)
    ahead = PrefetchedDraws(plain)
    first, second = torch.arange(4), torch.arange(4, 8)
    asked = [(0, first), (0, second), (1, first), (1, second), (2, first), (2, first), (2, second)]
    asked += [(9, first), (10, first), (5, second), (6, second), (7, torch.tensor([6, 1]))]  # resumed, and cut anew
    for step, positions in asked:
        got, expected = ahead(step, positions), plain(step, positions)
        assert torch.equal(got.noise, expected.noise)
        assert torch.equal(got.t, expected.t) and torch.equal(got.drop, expected.drop)
    assert len(ahead._ready) <= 3  # what no one will ask for is dropped, but for steps that are still to come


def test_a_draws_numbers_are_those_of_every_earlier_version():
    """Seeds of finished runs mean something as long as these stand."""
    draws = draw(7, 11, torch.tensor([0, 5]), (1, 2, 2), times=TIMES, label_drop=0.5)
    generator = torch.Generator()
    for row, position in enumerate((0, 5)):
        generator.manual_seed(mix(7, 11, position))
        u = torch.rand(2, generator=generator, dtype=torch.float64)
        assert int(draws.t[row]) == int(u[0] * 1000) and bool(draws.drop[row]) == bool(u[1] < 0.5)
        assert torch.equal(draws.noise[row], torch.randn(1, 2, 2, generator=generator))


def test_draws_are_uniform_in_time_gaussian_in_noise_and_drop_at_their_rate():
    n = 4000
    draws = draw(0, 0, torch.arange(n), (1, 4, 4), times=TIMES, label_drop=0.1)
    assert draws.t.min() >= 0 and draws.t.max() <= 999
    # Five standard errors: sqrt(1/12/n) of the range, 1/sqrt(16 n) of the noise, sqrt(.09/n) of the rate.
    assert abs(draws.t.double().mean() - 499.5) < 5 * 1000 / math.sqrt(12 * n)
    assert abs(float(draws.noise.mean())) < 5 / math.sqrt(16 * n)
    assert abs(float(draws.noise.var()) - 1) < 5 * math.sqrt(2 / (16 * n))
    assert abs(float(draws.drop.double().mean()) - 0.1) < 5 * math.sqrt(0.09 / n)


def test_neighbouring_seeds_do_not_collide():
    assert len({mix(s, t, p) for s in range(20) for t in range(20) for p in range(20)}) == 8000


def test_the_noise_loss_is_the_mean_square_over_each_sample(generator):
    process = make_process(CONFIG)
    z, eps, out = (torch.randn(3, 1, 4, 4, generator=generator) for _ in range(3))
    t = torch.tensor([0, 10, 999])
    got = DiffusionLoss(process)(NoisedBatch(z, process.add_noise(z, t, eps), eps, t, t), ModelOutput(out, {}))
    for b in range(3):
        assert float(got[b]) == pytest.approx(float(((out[b] - eps[b]) ** 2).mean()), rel=1e-5)


def test_the_variance_bound_is_the_kl_divergence_of_two_gaussians_in_bits(generator):
    process = make_process(CONFIG)
    z, eps = (torch.randn(4, 2, 4, 4, generator=generator).double() for _ in range(2))
    t = torch.tensor([1, 30, 500, 999])
    beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    z_t = bar[t].sqrt()[:, None, None, None] * z + (1 - bar[t]).sqrt()[:, None, None, None] * eps
    out = torch.randn(4, 4, 4, 4, generator=generator).double()
    got = process.variance_bound(out.float(), z.float(), z_t.float(), t)
    for b, step in enumerate(t.tolist()):
        previous = bar[step - 1]
        posterior = beta[step] * (1 - previous) / (1 - bar[step])
        start = (z_t[b] - (1 - bar[step]).sqrt() * out[b, :2]) / bar[step].sqrt()

        def mean_of(start, step=step, previous=previous, b=b):
            return (previous.sqrt() * beta[step] * start + (1 - beta[step]).sqrt() * (1 - previous) * z_t[b]) / (
                1 - bar[step]
            )

        f = (out[b, 2:] + 1) / 2
        predicted = torch.exp(f * beta[step].log() + (1 - f) * posterior.log())
        q = torch.distributions.Normal(mean_of(z[b]), posterior.sqrt())
        p = torch.distributions.Normal(mean_of(start), predicted.sqrt())
        expected = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
        # float32 tables: differences of logarithms near t = 1 lose up to 1e-3 relative.
        assert float(got[b]) == pytest.approx(float(expected), rel=5e-3)


def test_the_bound_trains_the_variance_and_never_the_noise(generator):
    process = make_process(CONFIG)
    z, eps = torch.randn(2, 1, 4, 4, generator=generator), torch.randn(2, 1, 4, 4, generator=generator)
    t = torch.tensor([0, 400])
    out = torch.randn(2, 2, 4, 4, generator=generator).requires_grad_()
    process.variance_bound(out, z, process.add_noise(z, t, eps), t).sum().backward()
    assert out.grad[:, 0].abs().max() == 0 and (out.grad[:, 1].abs() > 0).any()


def test_the_objective_sees_null_labels_at_the_drop_rate_and_splits_over_ranks():
    arch = tiny_arch()
    seen = []

    def model(z, t, y):
        seen.append(y)
        return torch.zeros_like(z)

    n = 2000
    batch = SimpleNamespace(
        step=3,
        latents=torch.zeros(n, 1, 8, 8),
        labels=torch.arange(n) % 10,
        positions=torch.arange(n),
    )
    objective = Objective(CONFIG, arch, seed=1)
    whole = objective(model, batch)
    assert abs(float((seen[0] == 10).double().mean()) - 0.1) < 0.035  # five standard errors
    half = SimpleNamespace(
        step=3, latents=batch.latents[1::2], labels=batch.labels[1::2], positions=batch.positions[1::2]
    )
    assert torch.equal(objective(model, half), whole[1::2])


class Twos(DiT):
    """An ancestor that says 2 to everything."""

    def forward(self, z, t, y):
        return torch.full_like(z, 2.0)


def test_distilling_adds_the_distance_to_the_ancestors_output():
    arch = tiny_arch()
    batch = SimpleNamespace(
        step=0, latents=torch.zeros(4, 1, 8, 8), labels=torch.zeros(4, dtype=torch.int64), positions=torch.arange(4)
    )
    plain = Objective(CONFIG, arch, 0)(lambda z, t, y: torch.zeros_like(z), batch)
    teacher = Twos(arch)
    terms = [DiffusionLoss(make_process(CONFIG)), OutputDistillation(Teacher(teacher), 0.5)]
    taught = Objective(CONFIG, arch, 0, terms)
    torch.testing.assert_close(taught(lambda z, t, y: torch.zeros_like(z), batch), plain + 0.5 * 4.0)
    alone = Objective(
        CONFIG, arch, 0, [DiffusionLoss(make_process(CONFIG), 0.0), OutputDistillation(Teacher(teacher), 2.0)]
    )
    torch.testing.assert_close(alone(lambda z, t, y: torch.zeros_like(z), batch), torch.full((4,), 8.0))


def test_features_are_compared_pair_by_pair_through_maps_that_train():
    student, teacher = (
        lively(DiT(tiny_arch(num_layers=2))),
        lively(DiT(tiny_arch(hidden_size=64, num_layers=6)), seed=1),
    )
    maps = [torch.nn.Linear(student.arch.hidden_size, 64) for _ in range(2)]
    term = FeatureDistillation(Teacher(teacher, [5, 2]), [("block.1", "block.5"), ("attention.0", "attention.2")])
    z, t, y = inputs(student.arch)
    question = NoisedBatch(z, z, torch.zeros_like(z), t, y)
    ours, theirs = student.forward_with_features(z, t, y, [0, 1]), teacher.forward_with_features(z, t, y, [2, 5])
    mapped = [linear(ours.features[name]) for linear, name in zip(maps, ("block.1", "attention.0"))]
    answer = ModelOutput(ours.out, dict(zip(("block.1", "attention.0"), mapped)))
    first = (mapped[0] - theirs.features["block.5"]).square().flatten(1).mean(1)
    second = (mapped[1] - theirs.features["attention.2"]).square().flatten(1).mean(1)
    torch.testing.assert_close(term(question, answer), (first + second) / 2)
    term(question, answer).sum().backward()
    assert all(p.grad is not None for linear in maps for p in linear.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_held_out_loss_asks_every_model_the_same_questions():
    z = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 10
    one, two = (HeldOutLoss(z, y, CONFIG) for _ in range(2))
    assert torch.equal(one.eps, two.eps) and torch.equal(one.t, two.t)
    assert len(one.t) == 80 and one.t.min() < 20 and one.t.max() > 980
    zero = one(lambda z, t, y: torch.zeros_like(z))["held_out_loss"]
    assert zero == pytest.approx(float(one.eps.square().mean()), rel=1e-6)
    assert one(lambda z, t, y: torch.zeros_like(z), batch=7)["held_out_loss"] == pytest.approx(zero, rel=1e-6)
