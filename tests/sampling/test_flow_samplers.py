"""Samplers of flow matching against their equations and against diffusers; what both processes share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.process import make_process
from fine_dist.diffusion.random_draws import image_generator
from fine_dist.diffusion.samplers import sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.dit import DiT
from tests.conftest import lively, tiny_arch

SIT = DiffusionConfig(process="flow")
RECTIFIED = DiffusionConfig(process="flow", direction="data_to_noise", time_scale=1000.0, time_shift=2.0)
ZERO = DiffusionConfig(prediction="v", zero_terminal_snr=True)


def velocity(z, t, y):
    """A nonlinear toy that knows its time and label; of SiT's convention, times in 0..1."""
    return torch.tanh(z * (0.5 + t[:, None, None, None])) - 0.1 * y[:, None, None, None].float()


def draw(model, labels=(3, 8), diffusion=SIT, seed=5, indices=None, arch=None, **settings):
    return sample(
        model,
        labels=torch.tensor(labels),
        arch=arch or tiny_arch(),
        config=SamplerConfig(**settings),
        diffusion=diffusion,
        seed=seed,
        indices=None if indices is None else torch.tensor(indices),
    )


def start(index, seed=5):
    generator = image_generator(seed, index)
    return torch.randn(1, 1, 8, 8, generator=generator), generator


def test_euler_is_the_naive_integration_of_sits_ode():
    got = draw(velocity, scheduler="euler", steps=7)
    for row, label in enumerate((3, 8)):
        z, _ = start(row)
        for i in range(7):  # SiT's time runs from noise at 0 to data at 1
            z = z + velocity(z, torch.tensor([i / 7]), torch.tensor([label])) / 7
        torch.testing.assert_close(got[row : row + 1], z, atol=1e-5, rtol=1e-5)


def test_heun_is_the_trapezoid_rule_with_a_last_step_of_eulers_and_is_more_exact():
    got = draw(velocity, labels=[3], scheduler="heun", steps=5)
    z, _ = start(0)
    y = torch.tensor([3])
    for i in range(5):
        v = velocity(z, torch.tensor([i / 5]), y)
        if i < 4:
            v = (v + velocity(z + v / 5, torch.tensor([(i + 1) / 5]), y)) / 2
        z = z + v / 5
    torch.testing.assert_close(got, z, atol=1e-5, rtol=1e-5)
    exact = draw(velocity, labels=[3], scheduler="euler", steps=2000)
    error = {
        name: float((draw(velocity, labels=[3], scheduler=name, steps=20) - exact).abs().mean())
        for name in ("euler", "heun")
    }
    assert error["heun"] < error["euler"] / 3


def test_the_sde_is_sits_with_the_diffusion_coefficient_of_its_noise_level():
    got = draw(velocity, labels=[3], scheduler="sde", steps=6)
    z, generator = start(0)
    y = torch.tensor([3])
    for i in range(6):
        t = i / 6  # SiT's own time: alpha = t, sigma = 1 - t, velocity of data less noise
        v = velocity(z, torch.tensor([t]), y)
        sigma = 1 - t
        score = (t * v - z) / sigma  # SiT, eq. 9, for the linear interpolant
        z = z + (v + sigma * score) / 6  # w / 2 = sigma
        if i < 5:
            z = z + (2 * sigma / 6) ** 0.5 * torch.randn(1, 1, 8, 8, generator=generator)
    torch.testing.assert_close(got, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers_flow_match_scheduler_step_by_step(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = RECTIFIED.model_copy(update={"time_shift": shift})
    model, arch = lively(DiT(tiny_arch())), tiny_arch()
    seen = []

    def spy(z, t, y):
        seen.append((z.clone(), t.clone()))
        return model(z, t, y)

    got = draw(spy, labels=[4], diffusion=config, scheduler="euler", steps=8)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    z, _ = start(0)
    with torch.no_grad():
        for (ours, t), step in zip(seen, scheduler.timesteps, strict=True):
            torch.testing.assert_close(ours, z, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(t, step.expand(1), atol=1e-2, rtol=1e-5)
            z = scheduler.step(model(z, step.expand(1), torch.tensor([4])), step, z, return_dict=False)[0]
    torch.testing.assert_close(got, z, atol=1e-5, rtol=1e-5)
    assert arch.latent_shape == got.shape[1:]


def test_conventions_of_a_flow_sample_the_same_images():
    def other(z, t, y):
        return -velocity(z, 1 - t / 1000, y)

    scaled = DiffusionConfig(process="flow", direction="data_to_noise", time_scale=1000.0)
    for name in ("euler", "heun", "sde"):
        a = draw(velocity, scheduler=name, steps=6)
        b = draw(other, diffusion=scaled, scheduler=name, steps=6)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "sde"])
def test_an_image_of_a_flow_is_the_same_in_any_batch_and_place(scheduler):
    model, settings = lively(DiT(tiny_arch())), {"scheduler": scheduler, "steps": 4, "guidance": 1.5}
    whole = draw(model, labels=[1, 2, 3, 4], **settings)
    part = draw(model, labels=[4, 2], indices=[3, 1], batch=1, **settings)
    torch.testing.assert_close(part, whole[[3, 1]], atol=1e-5, rtol=1e-5)
    assert not torch.equal(draw(model, labels=[1], seed=6, **settings), whole[:1])


@pytest.mark.parametrize(("diffusion", "scheduler"), [(SIT, "euler"), (DiffusionConfig(), "ddim")])
def test_guidance_acts_within_its_interval_of_noise_levels_alone(diffusion, scheduler):
    calls = []

    def spy(z, t, y):
        calls.append((float(make_process(diffusion).noise_level(t[:1])), len(z)))
        return torch.zeros_like(z)

    draw(
        spy,
        labels=[1],
        diffusion=diffusion,
        scheduler=scheduler,
        steps=10,
        guidance=3.0,
        guidance_interval=[0.25, 0.75],
    )
    assert {level for level, size in calls if size == 2} == {level for level, _ in calls if 0.25 <= level <= 0.75}
    assert 3 <= sum(size == 2 for _, size in calls) <= 6
    model = lively(DiT(tiny_arch()))
    settings = {"diffusion": diffusion, "scheduler": scheduler, "steps": 5}
    assert torch.equal(
        draw(model, guidance=3.0, guidance_interval=[0.0, 0.0], **settings), draw(model, guidance=1.0, **settings)
    )


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm"])
@pytest.mark.parametrize("zero", [False, True])
def test_an_exact_v_model_recovers_its_latent_under_every_scheduler(scheduler, zero):
    config = ZERO if zero else DiffusionConfig(prediction="v")
    process, wanted = make_process(config), torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)

    def exact(z, t, y):
        start = wanted.expand_as(z)
        return process.target(start, t, process.noise_of(z, t, start))

    got = draw(exact, labels=[1], diffusion=config, scheduler=scheduler, steps=20)
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)  # dpm ends at a noise level that is not quite 0


def test_bf16_is_near_and_is_asked_for():
    model = lively(DiT(tiny_arch()))
    plain = draw(model, scheduler="euler", steps=4)
    low = draw(model, scheduler="euler", steps=4, precision="bf16")
    assert not torch.equal(plain, low)
    torch.testing.assert_close(plain, low, atol=0.1, rtol=0.1)
    assert torch.equal(plain, draw(model, scheduler="euler", steps=4, precision="tf32"))  # no matter on a CPU


@pytest.mark.parametrize(
    ("diffusion", "settings", "words"),
    [
        (SIT, {"scheduler": "ddim"}, "ddim: it does not sample a model of process flow; legal: auto, euler, heun, sde"),
        (DiffusionConfig(), {"scheduler": "heun"}, "heun: it does not sample a model of process ddpm"),
    ],
)
def test_a_scheduler_of_another_process_is_refused(diffusion, settings, words):
    with pytest.raises(ConfigError, match=words):
        draw(velocity, diffusion=diffusion, **settings)


@pytest.mark.parametrize("interval", [[0.7, 0.2], [-0.1, 1.0], [0.0, 1.1]])
def test_a_guidance_interval_out_of_order_or_range_is_refused(interval):
    with pytest.raises(ValueError, match="two noise levels in order"):
        SamplerConfig(guidance_interval=interval)
