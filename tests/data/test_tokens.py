"""An image encoder's tokens in shards: written once with the latents, streamed with them, checked like them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from fine_dist.core.errors import DataError
from fine_dist.core.files import sha256_of
from fine_dist.data.audit import index_folder, verify
from fine_dist.data.image_decoding import center_crop
from fine_dist.data.manifest import Manifest
from fine_dist.data.settings import DataConfig
from fine_dist.data.shards import ShardWriter
from fine_dist.data.stream import LatentStream, read_all
from fine_dist.encode import main, run
from fine_dist.evaluation.dino import load_dino
from fine_dist.testing import run_distributed
from tests.data.picturing import config, hashes


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    """A tiny random DINOv2 with 4 x 4 patches of a square image."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    settings = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**settings, image_size=224, patch_size=56)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(folder, dino, tmp_path_factory) -> Path:
    """25 pictures of 16 x 16 and their mirror images, as pixels, with tokens."""
    out = tmp_path_factory.mktemp("tokens")
    run(config(folder, out, image_size=16, flips=True, dtype="float32", repa_encoder=str(dino)))
    return out / "train"


def manifest_of(folder: Path) -> Manifest:
    return Manifest.parse((folder / "manifest.json").read_bytes(), "")


def stream(shards: Path, **how) -> LatentStream:
    settings = {"seed": 0, "global_batch": 10, "tokens": True, **how}
    return LatentStream(DataConfig(shards=str(shards), streams=2, window=8), **settings)


def expected(dino: Path, latents: torch.Tensor) -> torch.Tensor:
    """Tokens of pictures, one at a time."""
    encoder = load_dino(dino)
    return torch.cat([encoder.grid_tokens(picture[None]) for picture in latents])


def test_every_sample_comes_with_its_own_picture_s_tokens_mirror_images_too(shards, dino):
    info = manifest_of(shards).tokens
    assert info is not None and info.shape == (24, 4, 4) and info.dtype == "float16" and len(info.sha256) == 64
    mirrored = 0
    with stream(shards) as batches:
        for batch, _ in zip(batches.batches(), range(6)):
            assert batch.tokens is not None and batch.tokens.shape == (10, 24, 4, 4)
            wanted = expected(dino, batch.latents)
            torch.testing.assert_close(batch.tokens.float(), wanted, atol=5e-3, rtol=5e-3)  # rounded to float16
            other = expected(dino, batch.latents.flip(-1))
            mirrored += int((other - wanted).abs().amax((1, 2, 3)).gt(0.05).sum())
            part = batch.part(3, 4)
            assert torch.equal(part.tokens, batch.tokens[3:7])
    assert mirrored > 50  # the mirror image has other tokens: a mismatch would have been seen


def test_the_order_is_that_of_the_same_images_without_tokens_for_any_reader(shards, folder, tmp_path):
    run(config(folder, tmp_path, image_size=16, flips=True, dtype="float32"))
    plain, whole = stream(tmp_path / "train", tokens=False), stream(shards)
    halves = [stream(shards, rank=rank, world_size=2, tokens=True) for rank in (0, 1)]
    later = stream(shards).batches(3)
    for step, a, b, left, right in zip(range(6), plain.batches(), whole.batches(), *(h.batches() for h in halves)):
        assert torch.equal(a.latents, b.latents) and a.tokens is None and b.tokens is not None
        assert torch.equal(torch.cat([left.tokens, right.tokens]), b.tokens)
        if step >= 3:
            assert torch.equal(next(later).tokens, b.tokens)  # resuming is starting at a step


def test_two_encoders_write_what_one_writes(folder, dino, shards, tmp_path):
    again = config(folder, tmp_path, image_size=16, flips=True, dtype="float32", repa_encoder=str(dino))
    run_distributed(run, 2, again)
    assert hashes(tmp_path / "train") == hashes(shards)


def test_any_webdataset_user_can_read_them_and_a_reader_of_latents_ignores_them(shards):
    names = sorted(str(path) for path in shards.glob("*.tar"))
    rows = list(wds.WebDataset(names, shardshuffle=False))
    stored = np.stack([np.load(io.BytesIO(row["tokens.npy"]), allow_pickle=False) for row in rows])
    assert stored.shape == (50, 24, 4, 4) and stored.dtype == np.float16
    latents, labels = read_all(str(shards))
    assert len(latents) == len(labels) == 50
    assert verify(str(shards))[1] == []


def test_a_picture_that_is_not_square_has_tokens_of_its_own_shape(folder, dino, tmp_path):
    run(config(folder, tmp_path, image_size=(8, 32), dtype="float32", repa_encoder=str(dino), repa_dtype="float32"))
    info = manifest_of(tmp_path / "train").tokens
    assert info is not None and info.shape == (24, 2, 8) and info.dtype == "float32"
    picture = torch.from_numpy(center_crop(Image.open(folder / "n01_cat" / "0.JPEG"), (8, 32)))[None]
    assert load_dino(dino).grid_tokens(picture).shape == (1, 24, 2, 8)
    assert load_dino(dino).grid_tokens(picture[..., 12:20]).shape == (1, 24, 4, 4)


def test_held_out_latents_have_none_and_other_settings_are_another_encoding(folder, dino, shards, tmp_path):
    settings = {"image_size": 16, "held_out_fraction": 0.25}
    run(config(folder, tmp_path, repa_encoder=str(dino), **settings))
    assert manifest_of(tmp_path / "held_out").tokens is None and manifest_of(tmp_path / "train").tokens is not None
    with pytest.raises(DataError, match="made with other settings: repa_dtype, repa_encoder"):
        run(config(folder, tmp_path, **settings))
    with pytest.raises(DataError, match=r"holds no tokens of an image encoder; encode again with --repa-encoder"):
        stream(tmp_path / "held_out")


def damaged(shards: Path, to: Path, offset: int, content: bytes) -> Path:
    """A copy of the shards in which some bytes of the first record's tokens are others."""
    shutil.copytree(shards, to)
    layout = manifest_of(shards).layout
    with open(to / "latents-000000.tar", "r+b") as file:
        file.seek(layout.tokens.at + offset)
        file.write(content)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = sha256_of(to / "latents-000000.tar")
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


@pytest.mark.parametrize(
    ("offset", "content", "words"),
    [
        (0, b"999999", "its image's tokens are not where the manifest says: tokens.npy is missing or damaged"),
        (640, np.full(4, np.nan, np.float16).tobytes(), "its image's tokens have NaN or Inf"),
    ],
)
def test_damage_names_the_sample_and_may_be_skipped(shards, offset, content, words, tmp_path):
    bad = damaged(shards, tmp_path / "bad", offset, content)
    with pytest.raises(DataError, match=f"000000-000000: {words}"), stream(bad) as batches:
        for _ in zip(batches.batches(), range(6)):
            pass
    assert verify(str(bad))[1]
    good = {tuple(t.flatten()[:8].tolist()) for b, _ in zip(stream(shards).batches(), range(6)) for t in b.tokens}
    some = DataConfig(shards=str(bad), streams=2, window=8, max_bad_fraction=0.1)
    with LatentStream(some, seed=0, global_batch=10, tokens=True) as batches:
        for batch, _ in zip(batches.batches(), range(6)):
            assert {tuple(t.flatten()[:8].tolist()) for t in batch.tokens} <= good
        assert batches.bad == 1


def test_tars_of_another_program_have_no_tokens_to_read(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").unlink()
    assert index_folder(tmp_path / "foreign", num_classes=3, scaling_factor=None, kind="sample").tokens is None
    assert len(read_all(str(tmp_path / "foreign"))[0]) == 50


def test_what_cannot_be_stored_or_loaded_is_one_line(folder, tmp_path, capsys):
    with ShardWriter(tmp_path, 0, (1, 2, 2), tokens=((3, 1, 1), "float16")) as writer:
        for tokens, words in ((None, "tokens of shape None, not"), (np.full((3, 1, 1), 1e6), "tokens have NaN or Inf")):
            with pytest.raises(DataError, match=words):
                writer.add(np.zeros((1, 2, 2)), 0, tokens)
        writer.add(np.zeros((1, 2, 2)), 0, np.ones((3, 1, 1)))
    argv = ["--source", str(folder), "--out", str(tmp_path / "o"), "--image-size", "16", "--launcher", "here"]
    assert main([*argv, "--repa-encoder", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "has no config.json and model.safetensors" in err and "Traceback" not in err
