"""Every process against its equations written naively: times, targets, weights, conversions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fine_dist.core.config import validate
from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.held_out import HeldOutLoss
from fine_dist.diffusion.objective import DiffusionLoss, NoisedBatch, Objective, OutputDistillation, Teacher
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.dit import DiT, ModelOutput
from tests.conftest import lively, tiny_arch

DDPM = DiffusionConfig()
V = DiffusionConfig(prediction="v")
ZERO = DiffusionConfig(prediction="v", zero_terminal_snr=True)
FLOW = DiffusionConfig(process="flow")
REPA = DiffusionConfig(process="flow", direction="data_to_noise")
DIFFUSERS = DiffusionConfig(process="flow", direction="data_to_noise", time_scale=1000.0)
ALL = (DDPM, V, ZERO, FLOW, REPA, DIFFUSERS)
NAMES = ("ddpm", "v", "zero_snr", "sit", "repa", "diffusers")


def tensors(*shape, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def naive_bar(config):
    """alpha_bar by its definition, double."""
    bars, product = [], 1.0
    for i in range(config.num_timesteps):
        product *= 1 - (config.beta_start + (config.beta_end - config.beta_start) * i / (config.num_timesteps - 1))
        bars.append(product)
    if config.zero_terminal_snr:
        roots = [math.sqrt(b) for b in bars]
        bars = [((r - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for r in roots]
    return bars


@pytest.mark.parametrize("config", [V, ZERO], ids=["v", "zero_snr"])
def test_v_prediction_is_signal_times_noise_less_sigma_times_latent(config):
    process, bars = make_process(config), naive_bar(config)
    z, eps, out = tensors(3, 1, 4, 4)
    t = torch.tensor([0, 300, 999])
    z_t = process.add_noise(z, t, eps)
    for b, step in enumerate(t.tolist()):
        a, s = math.sqrt(bars[step]), math.sqrt(1 - bars[step])
        torch.testing.assert_close(z_t[b], a * z[b] + s * eps[b], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(process.target(z, t, eps)[b], a * eps[b] - s * z[b], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(process.clean(z_t, t, out)[b], a * z_t[b] - s * out[b], atol=1e-5, rtol=1e-5)


def test_the_last_step_of_a_zero_terminal_schedule_is_pure_noise_and_the_first_is_unchanged():
    zero, plain = make_process(ZERO), make_process(V)
    z, eps, _ = tensors(1, 1, 4, 4)
    assert torch.equal(zero.add_noise(z, torch.tensor([999]), eps), eps)
    torch.testing.assert_close(zero.signal[0], plain.signal[0])
    assert all(torch.isfinite(table).all() for name, table in zero.named_buffers() if name != "loss_weight")


@pytest.mark.parametrize(("config", "sign", "time"), [(FLOW, -1, 1 - 0.3), (REPA, 1, 0.3), (DIFFUSERS, 1, 300.0)])
def test_a_flow_is_the_linear_interpolant_and_its_velocity(config, sign, time):
    process = make_process(config)
    z, eps, _ = tensors(2, 1, 4, 4)
    t = torch.tensor([time, time])
    torch.testing.assert_close(process.add_noise(z, t, eps), 0.7 * z + 0.3 * eps)
    torch.testing.assert_close(process.target(z, t, eps), sign * (eps - z))
    # the derivative of the noised latent by the model's own time, by a finite difference
    h = 1e-3 * config.time_scale
    slope = (process.add_noise(z, t + h, eps) - process.add_noise(z, t - h, eps)) / (2 * h) * config.time_scale
    torch.testing.assert_close(slope, process.target(z, t, eps), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_the_target_means_the_latent_and_the_noise_it_was_made_of(config):
    process = make_process(config)
    z, eps, _ = tensors(4, 2, 4, 4)
    t = process.times([0.05, 0.3, 0.6, 0.8])
    z_t, target = process.add_noise(z, t, eps), process.target(z, t, eps)
    torch.testing.assert_close(process.clean(z_t, t, target), z, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(process.noise(z_t, t, target), eps, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(process.noise_of(z_t, t, z), eps, atol=1e-2, rtol=1e-2)
    clamped = process.clamp(z_t, t, target, 0.5)
    torch.testing.assert_close(process.clean(z_t, t, clamped), z.clamp(-0.5, 0.5), atol=1e-3, rtol=1e-3)
    level = process.noise_level(t)
    assert ((level > 0) & (level <= 1)).all()


@pytest.mark.parametrize(
    ("one", "other"), [(DDPM, V), (V, DDPM), (FLOW, REPA), (REPA, DIFFUSERS), (DIFFUSERS, FLOW)], ids=str
)
def test_predictions_are_converted_exactly_between_conventions(one, other):
    ours, theirs = make_process(one), make_process(other)
    z, eps, _ = tensors(3, 1, 4, 4)
    t = theirs.times([0.1, 0.5, 0.7])
    mine = ours.time_from(theirs, t)
    z_t = theirs.add_noise(z, t, eps)
    torch.testing.assert_close(ours.add_noise(z, mine, eps), z_t, atol=1e-5, rtol=1e-5)
    got = ours.convert_from(theirs, z_t, t, theirs.target(z, t, eps))
    torch.testing.assert_close(got, ours.target(z, mine, eps), atol=1e-4, rtol=1e-4)


def test_a_teacher_of_another_prediction_is_imitated_in_the_students():
    arch = tiny_arch()
    teacher = lively(DiT(arch))
    z, eps, _ = tensors(2, 1, 8, 8)
    process, t = make_process(V), torch.tensor([100, 700])
    batch = NoisedBatch(z, process.add_noise(z, t, eps), eps, t, torch.tensor([1, 2]))
    noise = teacher(batch.z_t, t, batch.y)
    signal, sigma = process.at("signal", t), process.at("sigma", t)
    v = (noise - sigma * batch.z_t) / signal
    loss = OutputDistillation(Teacher(teacher, process=(DDPM, V)))(batch, ModelOutput(v, {}))
    assert loss.abs().max() < 1e-6
    assert OutputDistillation(Teacher(teacher))(batch, ModelOutput(v, {})).min() > 1e-3


def test_min_snr_weights_are_the_papers():
    ratio = torch.tensor(naive_bar(DDPM), dtype=torch.float64)
    ratio = ratio / (1 - ratio)
    t = torch.tensor([0, 200, 500, 999])
    noise = make_process(DiffusionConfig(weighting="min_snr")).weight(t)
    v = make_process(DiffusionConfig(weighting="min_snr", prediction="v")).weight(t)
    for b, step in enumerate(t.tolist()):
        snr = float(ratio[step])
        assert float(noise[b]) == pytest.approx(min(snr, 5) / snr, rel=1e-4)
        assert float(v[b]) == pytest.approx(min(snr, 5) / (snr + 1), rel=1e-4)
    assert make_process(DDPM).weight(t) is None and make_process(FLOW).weight(t) is None


def test_weights_multiply_the_samples_losses():
    process = make_process(DiffusionConfig(weighting="min_snr", min_snr_gamma=1.0))
    z, eps, out = tensors(3, 1, 4, 4)
    t = torch.tensor([0, 300, 900])
    batch = NoisedBatch(z, process.add_noise(z, t, eps), eps, t, t)
    plain = (out - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(DiffusionLoss(process)(batch, ModelOutput(out, {})), process.weight(t) * plain)


def test_flow_times_follow_their_law():
    uniform = ((torch.arange(20_000).double() + 0.5) / 20_000).tolist()
    level = make_process(REPA).times(uniform).double()
    torch.testing.assert_close(level, torch.tensor(uniform, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(make_process(FLOW).times(uniform).double(), 1 - level, atol=1e-6, rtol=0)
    config = REPA.model_copy(update={"time": "logit_normal", "time_mean": 0.5, "time_std": 0.8})
    logit = torch.logit(make_process(config).times(uniform).double())
    # 20,000 quantiles leave out tails of 2.5e-5, which move mean and spread by less than this
    assert float(logit.mean()) == pytest.approx(0.5, abs=1e-2) and float(logit.std()) == pytest.approx(0.8, abs=1e-2)
    shifted = make_process(REPA.model_copy(update={"time_shift": 3.0})).times(uniform).double()
    torch.testing.assert_close(shifted, 3 * level / (1 + 2 * level), atol=1e-6, rtol=1e-6)


def test_an_objective_of_flow_is_the_velocitys_mean_square():
    arch = tiny_arch()
    z = tensors(6, 1, 8, 8)[0]
    batch = SimpleNamespace(step=2, latents=z, labels=torch.arange(6), positions=torch.arange(6))
    objective = Objective(FLOW, arch, seed=1)
    noised = objective.sample_noise(batch)
    assert noised.t.dtype == torch.float32
    again = objective.sample_noise(SimpleNamespace(**{**vars(batch), "latents": z[3:], "positions": torch.arange(3, 6),
                                                      "labels": batch.labels[3:]}))  # fmt: skip
    assert torch.equal(again.z_t, noised.z_t[3:]) and torch.equal(again.t, noised.t[3:])
    losses = objective(lambda z_t, t, y: torch.zeros_like(z_t), batch)
    torch.testing.assert_close(losses, (z - noised.eps).square().flatten(1).mean(1))


@pytest.mark.parametrize("config", ALL, ids=NAMES)
def test_the_held_out_loss_of_a_perfect_model_is_nothing(config):
    z = tensors(10, 1, 4, 4)[0]
    loss = HeldOutLoss(z, torch.arange(10), config)
    process, order = make_process(config), {}

    def oracle(z_t, t, y):
        start = sum(order.values())
        order[start] = len(t)
        part = slice(start, start + len(t))
        return process.target(loss.z[part], t, loss.eps[part])

    assert loss(oracle)["held_out_loss"] < 1e-10
    assert loss(lambda z, t, y: torch.zeros_like(z))["held_out_loss"] > 0.3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"process": "rectified"}, "diffusion.process"),
        ({"process": "flow", "prediction": "noise"}, "prediction noise does not fit process flow; legal: velocity"),
        ({"prediction": "velocity"}, "prediction velocity does not fit process ddpm; legal: noise, v"),
        ({"zero_terminal_snr": True}, "needs process ddpm and prediction v"),
        ({"process": "flow", "weighting": "min_snr"}, "weighting min_snr needs process ddpm"),
        ({"process": "flow", "time_shift": 0}, "time_shift"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_end 0.1 is below beta_start 0.5"),
        ({"num_timesteps": 10**9}, "num_timesteps"),
    ],
)
def test_a_process_that_cannot_be_is_refused_in_one_line(values, words):
    from fine_dist.stages.settings import TrainConfig

    with pytest.raises(ConfigError, match=words) as caught:
        validate(TrainConfig, {"diffusion": values})
    assert "\n" not in str(caught.value)
