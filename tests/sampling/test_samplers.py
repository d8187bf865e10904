"""Sampling against textbook loops, and noise that belongs to the image."""

from __future__ import annotations

import pytest
import torch

from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.samplers import guided, image_generator, sample
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.diffusion.solvers import space_timesteps
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT

DIFFUSION = DiffusionConfig()


def tiny(learn_sigma: bool = False) -> Arch:
    return Arch(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        patch_size=2,
        in_channels=1,
        input_size=8,
        num_classes=10,
        learn_sigma=learn_sigma,
    )


def lively(arch: Arch) -> DiT:
    """A DiT whose zero-initialized layers are not zero, so that its output depends on everything."""
    torch.manual_seed(0)
    model = DiT(arch)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def toy(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in for a model: its output depends on latent, timestep and label."""
    return torch.tanh(z) * (0.5 + t[:, None, None, None] / 2000) + 0.02 * y[:, None, None, None]


def draw(labels: list[int], model=toy, arch: Arch | None = None, **settings) -> torch.Tensor:
    indices = settings.pop("indices", None)
    return sample(
        model,
        labels=torch.tensor(labels),
        arch=arch or tiny(),
        config=SamplerConfig(**settings),
        diffusion=DIFFUSION,
        seed=settings.pop("seed", 7),
        indices=None if indices is None else torch.tensor(indices),
    )


def alpha_bars() -> torch.Tensor:
    beta = torch.linspace(DIFFUSION.beta_start, DIFFUSION.beta_end, DIFFUSION.num_timesteps, dtype=torch.float64)
    return torch.cumprod(1 - beta, dim=0)


def naive_ddim(label: int, index: int, steps: int, limit: float = float("inf")) -> torch.Tensor:
    """DDIM (2010.02502, eq. 12) with eta 0, one image, float64; a clamped start gives its own noise."""
    a = alpha_bars()
    z = torch.randn(1, 1, 8, 8, generator=image_generator(7, index)).double()
    stride = DIFFUSION.num_timesteps // steps
    for t in range(DIFFUSION.num_timesteps - 1, -1, -stride):
        eps = toy(z, torch.tensor([t]), torch.tensor([label]))
        start = (z - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
        start = start.clamp(-limit, limit)
        eps = (z - a[t].sqrt() * start) / (1 - a[t]).sqrt()
        before = a[t - stride] if t - stride >= 0 else torch.tensor(1.0, dtype=torch.float64)
        z = before.sqrt() * start + (1 - before).sqrt() * eps
    return z


def naive_ddpm(label: int, index: int, timesteps: list[int], fraction: float | None) -> torch.Tensor:
    """DDPM (2006.11239, eq. 11) on a respaced chain; `fraction` interpolates log variances (2102.09672, eq. 15)."""
    a = alpha_bars()
    generator = image_generator(7, index)
    z = torch.randn(1, 1, 8, 8, generator=generator).double()
    for t, before in zip(timesteps, [*timesteps[1:], -1]):
        a_prev = a[before] if before >= 0 else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - a[t] / a_prev
        eps = toy(z, torch.tensor([t]), torch.tensor([label]))
        mean = (z - beta / (1 - a[t]).sqrt() * eps) / (1 - beta).sqrt()
        if t == 0:
            return mean
        log_var = (beta * (1 - a_prev) / (1 - a[t])).log()
        if fraction is not None:
            log_var = fraction * beta.log() + (1 - fraction) * log_var
        z = mean + (0.5 * log_var).exp() * torch.randn(1, 1, 8, 8, generator=generator)
    raise AssertionError("the last timestep is 0")


# fp32 against float64 over tens of steps: 1e-3 relative at the noisiest step, where the prediction is divided by 6e-3
TOLERANCE = {"atol": 2e-3, "rtol": 2e-3}


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_is_the_papers_equation(steps):
    out = draw([3, 8], scheduler="ddim", steps=steps)
    expected = torch.cat([naive_ddim(3, 0, steps), naive_ddim(8, 1, steps)])
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)


def test_a_clip_clamps_the_predicted_start_at_every_step():
    out = draw([3, 8], scheduler="ddim", steps=20, clip=0.7)
    expected = torch.cat([naive_ddim(3, 0, 20, limit=0.7), naive_ddim(8, 1, 20, limit=0.7)])
    torch.testing.assert_close(out.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm"])
def test_with_a_clip_a_model_that_knows_nothing_stays_within_it(scheduler):
    """The clean latent of wrong noise is 160 times too large at t = T; the last step returns the clamped start."""

    def ignorant(z, t, y):
        return torch.zeros_like(z)

    settings = {"scheduler": scheduler, "steps": 10}
    assert draw([3], ignorant, **settings).abs().max() > 50
    assert draw([3], ignorant, clip=1.0, **settings).abs().max() <= 1 + 1e-4


def naive_spacing(total: int, count: int) -> list[int]:
    """ADM's: a running sum of strides, rounded to even, one section."""
    at, found = 0.0, []
    for _ in range(count):
        found.append(round(at))
        at += (total - 1) / (count - 1)
    return found


def test_ddpm_walks_the_respaced_chain_of_the_paper():
    timesteps = naive_spacing(1000, 40)[::-1]
    out = draw([3], scheduler="ddpm", steps=40, indices=[5])
    torch.testing.assert_close(out.double(), naive_ddpm(3, 5, timesteps, None), **TOLERANCE)


def test_a_learned_variance_sets_the_ancestral_noise():
    def with_variance(z, t, y):
        return torch.cat([toy(z, t, y), torch.full_like(z, 0.4)], dim=1)  # -1..1 is read as 0..1: 0.7

    timesteps = naive_spacing(1000, 40)[::-1]
    out = draw([3], with_variance, tiny(learn_sigma=True), scheduler="ddpm", steps=40)
    torch.testing.assert_close(out.double(), naive_ddpm(3, 0, timesteps, 0.7), **TOLERANCE)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_deterministic_schedulers_leave_a_learned_variance_aside(scheduler):
    def with_variance(z, t, y):
        return torch.cat([toy(z, t, y), torch.randn_like(z)], dim=1)

    plain = draw([3, 4], scheduler=scheduler, steps=10)
    learned = draw([3, 4], with_variance, tiny(learn_sigma=True), scheduler=scheduler, steps=10)
    assert torch.equal(plain, learned)


def test_dpm_solver_comes_nearer_than_ddim_to_the_exact_solution_at_equal_steps():
    exact = draw([1, 2, 3], scheduler="ddim", steps=1000)
    error = {s: (draw([1, 2, 3], scheduler=s, steps=20) - exact).abs().mean() for s in ("ddim", "dpm")}
    assert error["dpm"] < error["ddim"]


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpm"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_batch_size_changes_no_image(scheduler, guidance):
    """The noise is bit-equal; matrix products of another batch size sum in another order: 1e-5 in fp32, and guidance
    multiplies the error of a prediction by up to `2 guidance - 1`."""
    tolerance = 1e-5 * (2 * guidance - 1)
    arch, labels = tiny(), [i % 10 for i in range(7)]
    model = lively(arch)
    one = draw(labels, model, arch, scheduler=scheduler, steps=20, guidance=guidance, batch=1)
    all_ = draw(labels, model, arch, scheduler=scheduler, steps=20, guidance=guidance, batch=64)
    torch.testing.assert_close(one, all_, atol=tolerance, rtol=tolerance)


def test_two_processes_with_half_the_indices_make_the_same_images():
    arch, labels = tiny(learn_sigma=True), [i % 10 for i in range(6)]
    model = lively(arch)
    whole = draw(labels, model, arch, scheduler="ddpm", steps=10)
    for rank in (0, 1):
        mine = list(range(rank, 6, 2))
        half = draw([labels[i] for i in mine], model, arch, scheduler="ddpm", steps=10, indices=mine)
        torch.testing.assert_close(half, whole[rank::2], atol=1e-5, rtol=1e-5)


def test_no_two_of_fifty_thousand_images_start_from_the_same_noise():
    first = {torch.randint(0, 2**62, (1,), generator=image_generator(0, i)).item() for i in range(50_000)}
    assert len(first) == 50_000


def test_seeds_give_other_images():
    a, b = (torch.randn(8, generator=image_generator(seed, 0)) for seed in (0, 1))
    assert (a - b).abs().min() > 0


def test_guidance_extrapolates_from_the_null_label_and_keeps_the_labelled_variance():
    def model(z, t, y):
        level = y.float()[:, None, None, None].expand_as(z)
        return torch.cat([level, -level], dim=1)

    z, t, y = torch.zeros(2, 1, 2, 2), torch.zeros(2).long(), torch.tensor([3, 4])
    out = guided(model, z, t, y, null=10, scale=1.5, channels=1)
    assert out[:, 0, 0, 0].tolist() == [10 + 1.5 * (3 - 10), 10 + 1.5 * (4 - 10)]
    assert out[:, 1, 0, 0].tolist() == [-3, -4]


def test_guidance_zero_is_the_unconditional_model():
    assert torch.equal(draw([3], steps=5, guidance=0.0), draw([10], steps=5, guidance=1.0))


def test_sampling_leaves_the_model_in_the_mode_it_had():
    arch = tiny()
    model = lively(arch).train()
    draw([1], model, arch, steps=2)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "labels", "words"),
    [
        ({"scheduler": "ddim", "steps": 30}, [1], ["30", "divisor of 1000", "25, 40"]),
        ({"scheduler": "ddpm", "steps": 1}, [1], ["at least 2"]),
        ({"scheduler": "dpm", "steps": 1001}, [1], ["1001", "1000"]),
        ({"steps": 10}, [11], ["label 11", "0..9"]),
        ({"steps": 10}, [-1], ["label -1"]),
        ({"steps": 10, "indices": [0, 1]}, [1], ["one length"]),
        ({"steps": 10, "guidance_channels": 2}, [1], ["guidance_channels 2", "1..1"]),
    ],
)
def test_settings_that_cannot_be_are_named(settings, labels, words):
    with pytest.raises(ConfigError) as error:
        draw(labels, **settings)
    assert all(word in str(error.value) for word in words), error.value


# --- timesteps of a respaced chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 10, 37, 50, 100, 250, 256, 500, 750, 999, 1000])
def test_any_number_of_timesteps_is_spaced_as_adm_spaces_it(count):
    kept = space_timesteps(1000, [count])
    assert kept == naive_spacing(1000, count)
    assert kept[0] == 0 and kept[-1] == 999 and len(set(kept)) == count and kept == sorted(kept)


def test_respaced_timesteps_are_those_of_the_published_sampler():
    """What the published sampler prints for 4, and for 250 (a stride of 999 / 249, summed up)."""
    assert space_timesteps(1000, [4]) == [0, 333, 666, 999]
    kept = space_timesteps(1000, [250])
    assert kept[:6] == [0, 4, 8, 12, 16, 20] and kept[60:64] == [241, 245, 249, 253] and kept[-2:] == [995, 999]


def test_sections_have_spacings_of_their_own():
    """Improved DDPM's example: 300 timesteps in three sections, 10 + 15 + 20 of them kept."""
    kept = space_timesteps(300, [10, 15, 20])
    assert len(kept) == 45 and kept[:10] == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert (kept[10], kept[24], kept[25], kept[-1]) == (100, 199, 200, 299)
    assert space_timesteps(10, [1, 2, 3]) == [0, 4, 6, 7, 8, 9]  # the first section is longer by one
    with pytest.raises(ConfigError, match=r"6 timesteps of a section of 5"):
        space_timesteps(10, [5, 6])


def test_the_model_is_asked_at_exactly_these_timesteps():
    asked = []

    def spy(z, t, y):
        asked.append(int(t[0]))
        return toy(z, t, y)

    draw([3], spy, scheduler="ddpm", steps=250)
    assert asked == space_timesteps(1000, [250])[::-1]


# --- guidance on some channels ---------------------------------------------------------------------------------------


def test_guidance_of_three_channels_leaves_the_fourth_and_the_variance_to_the_label():
    def model(z, t, y):
        return y.float()[:, None, None, None].expand(-1, 8, 2, 2) * torch.arange(1, 9)[:, None, None]

    z, t, y = torch.zeros(1, 4, 2, 2), torch.zeros(1).long(), torch.tensor([3])
    out = guided(model, z, t, y, null=10, scale=4.0, channels=3)[0, :, 0, 0]
    assert out.tolist() == [c * (10 + 4 * (3 - 10)) for c in (1, 2, 3)] + [c * 3 for c in (4, 5, 6, 7, 8)]


def test_the_originals_guidance_is_a_setting_and_another_image():
    arch = Arch(**{**tiny().model_dump(), "in_channels": 4})
    model = lively(arch)
    settings = {"scheduler": "ddim", "steps": 5, "guidance": 4.0}
    all_, three, four = (draw([1, 2], model, arch, guidance_channels=n, **settings) for n in (None, 3, 4))
    assert torch.equal(all_, four)
    assert (all_ - three).norm() > 1e-3 * all_.norm()  # rounding is 100 times smaller


def test_both_halves_of_guidance_go_through_the_model_at_once():
    sizes = []

    def spy(z, t, y):
        sizes.append(len(z))
        return toy(z, t, y)

    draw([1, 2, 3], spy, steps=2, guidance=2.0)
    draw([1, 2, 3], spy, steps=2, guidance=1.0)
    assert sizes == [6, 6, 3, 3]
