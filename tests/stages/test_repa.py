"""REPA: the term against its formula, a projector that trains and is dropped, and what cannot be aligned."""

from __future__ import annotations

import json

import pytest
import torch

from fine_dist.artifacts.load import load_model
from fine_dist.diffusion.alignment import FEATURE, AlignedModel, RepresentationAlignment, resize_tokens
from fine_dist.diffusion.objective import NoisedBatch
from fine_dist.model.artifact import load_artifact
from fine_dist.model.dit import DiT, ModelOutput
from tests.commands.conftest import ARCH, FAST, command, data, refused
from tests.conftest import inputs, lively, tiny_arch


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny random DINOv2 with 16 patches of 56 pixels: as many tokens as the tiny model has."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=224, patch_size=56
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_the_term_is_one_minus_the_mean_cosine_of_tokens():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(3, 16, 5, generator=generator) for _ in range(2))
    z = torch.zeros(3, 1, 8, 8)
    batch = NoisedBatch(z, z, z, torch.zeros(3), torch.zeros(3))
    got = RepresentationAlignment(lambda latents: theirs, 0.5)(batch, ModelOutput(z, {FEATURE: ours}))
    for b in range(3):
        cosines = [float(x @ y / x.norm() / y.norm()) for x, y in zip(ours[b], theirs[b])]
        assert float(got[b]) == pytest.approx(1 - sum(cosines) / 16, rel=1e-5)


def test_token_grids_of_other_sizes_are_resized_in_place_order():
    ramp = torch.arange(64.0).reshape(1, 64, 1)
    small = resize_tokens(ramp, 16).reshape(4, 4)
    assert (small[1:] > small[:-1]).all() and (small[:, 1:] > small[:, :-1]).all()
    assert torch.equal(resize_tokens(ramp, 64), ramp)


def test_the_projector_trains_with_the_model_and_leaves_its_output_alone():
    student = lively(DiT(tiny_arch()))
    aligned = AlignedModel(student, 1, 24, 8, torch.Generator().manual_seed(0))
    z, t, y = inputs(student.arch)
    output = aligned(z, t, y)
    torch.testing.assert_close(output.out, student(z, t, y))
    assert output.features[FEATURE].shape == (len(z), 16, 24)
    output.features[FEATURE].square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in aligned.projector.parameters())
    assert student.blocks[1].get_submodule("qkv").weight.grad.any()
    assert student.blocks[2].get_submodule("qkv").weight.grad is None  # behind the aligned block
    assert aligned.projector_flops() == 6 * 16 * (32 * 8 + 8 * 8 + 8 * 24)


@pytest.mark.parametrize("process", [[], ["--diffusion.process", "flow"]], ids=["ddpm", "flow"])
def test_a_run_with_repa_ends_in_a_plain_model_and_records_its_cost(dino, digit_shards, tmp_path, process):
    argv = ["train", *ARCH, *FAST, *process, *data(digit_shards)]
    repa = ["--loss.repa", "0.5", "--loss.repa-encoder", str(dino), "--loss.repa-width", "16"]
    assert command([*argv, *repa, "--run-dir", str(tmp_path / "repa")]) == 0
    assert command([*argv, "--run-dir", str(tmp_path / "plain")]) == 0
    artifact = load_artifact(tmp_path / "repa" / "model")
    assert set(artifact.tensors) == set(load_artifact(tmp_path / "plain" / "model").tensors)
    assert artifact.extra["repa"]["block"] == 1
    assert type(load_model(tmp_path / "repa")[0]) is DiT
    rows = [json.loads(line) for line in (tmp_path / "repa" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < row.get("loss_repa", 0) < 2 for row in rows)
    flops = [json.loads((tmp_path / run / "DONE.json").read_text())["cost"]["flops"] for run in ("repa", "plain")]
    assert flops[0] > flops[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--loss.repa-encoder"),
        (["--loss.repa-encoder", "nowhere"], "nowhere holds no config.json"),
        (["--loss.repa-encoder", "DINO", "--loss.repa-block", "9"], "legal: 1..3"),
    ],
)
def test_what_cannot_be_aligned_is_one_line(more, words, dino, digit_shards, tmp_path, capsys):
    more = [str(dino) if word == "DINO" else word for word in more]
    argv = ["train", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "r"), "--loss.repa", "0.5", *more]
    assert words in refused(argv, capsys)
