"""Batches of samples from any image on, and plain grids of images."""

from __future__ import annotations

import pytest
import torch

from fine_dist.artifacts.model_facts import ModelFacts
from fine_dist.core.errors import ConfigError
from fine_dist.diffusion.samplers import sample, sample_batches
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.model.flops import forward_macs
from fine_dist.sampling.image_grid import tile_images
from fine_dist.sampling.renderer import ImageRenderer
from tests.sampling.test_samplers import DIFFUSION, draw, lively, tiny, toy


def stream(count: int, start: int = 0, model=toy, **settings):
    return sample_batches(
        model,
        labels=torch.arange(count) % 10,
        arch=tiny(),
        config=SamplerConfig(steps=5, batch=4, **settings),
        diffusion=DIFFUSION,
        seed=7,
        start=start,
    )


def test_batches_are_the_images_in_order_and_drawn_when_they_are_asked_for():
    calls = []

    def spy(z, t, y):
        calls.append(len(z))
        return toy(z, t, y)

    batches = stream(10, model=spy)
    assert not calls
    first = next(batches)
    assert calls == [4] * 5 and first.indices.tolist() == [0, 1, 2, 3] and first.labels.tolist() == [0, 1, 2, 3]
    rest = list(batches)
    assert [len(b.latents) for b in rest] == [4, 2]
    assert torch.equal(
        torch.cat([first.latents, *(b.latents for b in rest)]), draw([i % 10 for i in range(10)], steps=5)
    )


@pytest.mark.parametrize("start", [0, 3, 9, 10])
def test_sampling_goes_on_from_any_image(start):
    whole = torch.cat([b.latents for b in stream(10, scheduler="ddpm")])
    parts = list(stream(10, start, scheduler="ddpm"))
    assert [i for b in parts for i in b.indices.tolist()] == list(range(start, 10))
    if parts:  # the toy works on each number by itself, so that batches of another size change no bit
        assert torch.equal(torch.cat([b.latents for b in parts]), whole[start:])


def test_a_model_is_in_its_own_mode_between_batches():
    arch = tiny()
    model = lively(arch).train()
    for _ in sample_batches(
        model, labels=torch.arange(4), arch=arch, config=SamplerConfig(steps=2, batch=2), diffusion=DIFFUSION, seed=0
    ):
        assert model.training


def test_a_model_trained_without_dropping_labels_cannot_be_guided():
    with pytest.raises(ConfigError, match="label_drop 0"):
        sample(
            toy,
            labels=torch.tensor([1]),
            arch=tiny(),
            config=SamplerConfig(guidance=1.5),
            diffusion=DiffusionConfig(label_drop=0.0),
            seed=0,
        )


def test_no_images_are_an_empty_tensor():
    assert draw([], steps=5).shape == (0, 1, 8, 8)


def test_a_grid_lays_images_out_row_by_row_between_white_lines():
    images = torch.stack([torch.full((1, 2, 2), v) for v in (-1.0, 0.0, 1.0)])
    picture = tile_images(images, columns=2)
    assert picture.shape == (1, 5, 5)
    assert picture[0, 0].tolist() == [0, 0, 1, 0.5, 0.5]
    assert picture[0, 3].tolist() == [1, 1, 1, 1, 1]


def test_a_grid_of_four_channel_latents_shows_the_first_three():
    assert tile_images(torch.zeros(2, 4, 3, 3), columns=8, zoom=2, gap=0).shape == (3, 6, 12)


@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
@pytest.mark.parametrize(("guidance", "interval"), [(1.0, (0.0, 1.0)), (3.0, (0.0, 1.0)), (3.0, (0.25, 0.75))])
def test_the_flops_of_sampling_are_those_of_the_models_calls(scheduler, guidance, interval):
    """Up to a step at each end of the interval; Heun's last step is Euler's."""
    arch = tiny()
    model, seen = lively(arch), []
    model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    process = "flow" if scheduler == "heun" else "ddpm"
    config = SamplerConfig(steps=20, batch=4, scheduler=scheduler, guidance=guidance, guidance_interval=interval)
    diffusion = DiffusionConfig(process=process)
    renderer = ImageRenderer(model, "model", {}, ModelFacts(), config, diffusion, None, pictures=True)
    list(renderer.render(torch.arange(4), torch.arange(4), 0, False))
    per_image = 2 * forward_macs(arch) * 4
    calls = 2 if scheduler == "heun" else 1
    assert renderer.flops(4) == pytest.approx(sum(seen) / 4 * per_image, abs=2 * calls * per_image)
    assert renderer.flops(4) == renderer.flops(1) * 4
