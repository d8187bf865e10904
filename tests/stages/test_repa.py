"""REPA: the term against its formula, a projector that trains and is dropped, and what cannot be aligned."""

from __future__ import annotations

import json

import pytest
import torch

from fine_dist import encode
from fine_dist.artifacts.load import load_model
from fine_dist.core.arguments import parse
from fine_dist.diffusion.alignment import FEATURE, AlignedModel, RepresentationAlignment, resize_tokens
from fine_dist.diffusion.objective import NoisedBatch
from fine_dist.model.artifact import load_artifact
from fine_dist.model.dit import DiT, ModelOutput
from fine_dist.planning.estimates import estimate_of
from fine_dist.stages.settings import TrainConfig
from fine_dist.study.config import load_study
from fine_dist.study.graph import plan
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


@pytest.mark.parametrize("source", ["encoder", "shards"])
def test_the_term_is_one_minus_the_mean_cosine_of_tokens(source):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(3, 8, 5, generator=generator), torch.randn(3, 5, 2, 4, generator=generator)
    z = torch.zeros(3, 1, 4, 8)
    batch = NoisedBatch(z, z, z, torch.zeros(3), torch.zeros(3), theirs if source == "shards" else None)
    encode = None if source == "shards" else lambda latents: theirs
    got = RepresentationAlignment(encode, 0.5, (2, 4))(batch, ModelOutput(z, {FEATURE: ours}))
    for b in range(3):
        pairs = [(ours[b, 4 * row + column], theirs[b, :, row, column]) for row in range(2) for column in range(4)]
        cosines = [float(x @ y / x.norm() / y.norm()) for x, y in pairs]
        assert float(got[b]) == pytest.approx(1 - sum(cosines) / 8, rel=1e-5)


def test_token_grids_of_other_sizes_are_resized_in_place_order():
    ramp = torch.arange(128.0).reshape(1, 1, 8, 16)
    small = resize_tokens(ramp, (4, 6)).reshape(4, 6)
    assert (small[1:] > small[:-1]).all() and (small[:, 1:] > small[:, :-1]).all()
    assert torch.equal(resize_tokens(ramp, (8, 16)).flatten(), ramp.flatten())


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
        ([], "the shards hold no tokens to align with; give the transformers folder of a DINOv2 with --loss.repa-enc"),
        (["--loss.repa-encoder", "nowhere"], "nowhere has no config.json"),
        (["--loss.repa-encoder", "DINO", "--loss.repa-block", "9"], "legal: 1..3"),
    ],
)
def test_what_cannot_be_aligned_is_one_line(more, words, dino, digit_shards, tmp_path, capsys):
    more = [str(dino) if word == "DINO" else word for word in more]
    argv = ["train", *ARCH, *FAST, *data(digit_shards), "--run-dir", str(tmp_path / "r"), "--loss.repa", "0.5", *more]
    assert words in refused(argv, capsys)


# --- tokens that the shards hold -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def token_shards(dino, tmp_path_factory):
    """The digits with their tokens beside them, exact to the last bit of float32."""
    out = tmp_path_factory.mktemp("digit tokens")
    encode.run(encode.EncodeConfig(out=str(out), limit=600, repa_encoder=str(dino), repa_dtype="float32"))
    return out


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run) -> list[tuple[float, float]]:
    return [(row["loss"], row["loss_repa"]) for row in rows_of(run) if "loss_repa" in row]


REPA = ["--loss.repa", "0.5", "--loss.repa-width", "16"]


@pytest.fixture(scope="module")
def both(dino, token_shards, tmp_path_factory):
    """Two runs of one start: the encoder at every step, and its tokens from the shards."""
    folder = tmp_path_factory.mktemp("both")
    argv = ["train", *ARCH, *FAST, *data(token_shards), *REPA]
    assert command([*argv, "--loss.repa-encoder", str(dino), "--run-dir", str(folder / "encoder")]) == 0
    assert command([*argv, "--run-dir", str(folder / "shards")]) == 0
    return folder


def test_tokens_of_the_shards_train_what_the_encoder_trains_and_cost_no_encoder(both):
    encoder, shards = (losses(both / name) for name in ("encoder", "shards"))
    assert len(shards) == 2
    for found, wanted in zip(shards, encoder):
        assert found == pytest.approx(wanted, rel=1e-4)  # batches of another size sum in another order
    costs = [json.loads((both / name / "DONE.json").read_text())["cost"]["flops"] for name in ("encoder", "shards")]
    encoder_flops = 2 * 17 * (4 * 24 * 24 + 2 * 2 * 24 * 24)  # one layer: attention and an MLP of ratio 2, 17 tokens
    assert costs[0] - costs[1] == pytest.approx(4 * 16 * encoder_flops, rel=0.1)  # biases, norms and scales beside
    about = [load_artifact(both / name / "model").extra["repa"] for name in ("encoder", "shards")]
    assert about[0] == about[1] and len(about[0]["encoder"]) == 64


def test_a_run_that_reads_tokens_resumes_as_if_it_had_not_stopped(both, token_shards, tmp_path):
    argv = ["train", *ARCH, *FAST, *data(token_shards), *REPA, "--engine.checkpoint-every", "2"]
    assert command([*argv, "--steps", "2", "--run-dir", str(tmp_path / "r")]) == 0
    assert command([*argv, "--run-dir", str(tmp_path / "r")]) == 0
    assert losses(tmp_path / "r") == losses(both / "shards")
    ends = [load_artifact(run / "model").hash for run in (tmp_path / "r", both / "shards")]
    assert ends[0] == ends[1]


def test_a_run_does_not_go_on_with_tokens_of_another_origin(both, dino, token_shards, capsys):
    argv = ["train", *ARCH, *FAST, *data(token_shards), *REPA, "--run-dir", str(both / "shards"), "--steps", "6"]
    assert "repa" in refused([*argv, "--loss.repa-encoder", str(dino)], capsys)


def test_a_learngene_is_condensed_with_tokens_of_the_shards(token_shards, tmp_path):
    argv = ["condense", *ARCH, *FAST, *data(token_shards), *REPA, "--method.rank", "8"]
    assert command([*argv, "--run-dir", str(tmp_path / "c")]) == 0
    assert len(losses(tmp_path / "c")) == 2


def test_projector_and_encoder_are_in_the_estimate_of_memory(dino, token_shards, tmp_path):
    def memory(*words: str):
        argv = [*ARCH, *data(token_shards), "--batch", "8", *words]
        return estimate_of(parse(TrainConfig, argv, "fine-dist train").config).memory(1)

    plain, shards = memory(), memory("--loss.repa", "0.5")
    online = memory("--loss.repa", "0.5", "--loss.repa-encoder", str(dino))
    aligned = AlignedModel(DiT(tiny_arch(num_layers=3)), 0, 24)
    numbers = sum(p.numel() for p in aligned.projector.parameters())
    assert shards.weights - plain.weights == 4 * numbers and shards.optimizer - plain.optimizer == 8 * numbers
    assert shards.encoder == plain.encoder == 0
    assert online.encoder == (dino / "model.safetensors").stat().st_size
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in aligned.parameters()}
    z, t, y = inputs(aligned.student.arch, batch=8)
    batch = NoisedBatch(z, z, z, t, y, torch.randn(8, 24, 4, 4))
    features = aligned.student.forward_with_features(z, t, y, [0]).features["block.0"].detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projected = aligned.projector(features)
        RepresentationAlignment(None, 0.5, (4, 4))(batch, ModelOutput(z, {FEATURE: projected})).sum().backward()
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert shards.activations - plain.activations == pytest.approx(measured, rel=0.15)


def test_a_study_compares_rows_with_and_without_the_term():
    study = load_study("configs/study/repa.yaml", seeds=[0])
    graph = plan(study)
    assert graph["data"].config.repa_encoder == "models/dinov2-base"
    assert graph["repa-L12-s0"].config.loss.repa == 0.5 and graph["plain-L12-n20000-s0"].config.loss.repa == 0
    assert {run.config.diffusion.process for run in graph.runs if run.module == "fine_dist.train"} == {"flow"}
