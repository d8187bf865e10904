"""Images to latent shards: the arithmetic of the crop, sources, damaged images, what the command says."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from fine_dist.core.config import load
from fine_dist.core.errors import DataError
from fine_dist.data.audit import inspect
from fine_dist.data.image_decoding import center_crop
from fine_dist.data.manifest import Manifest
from fine_dist.data.shards import write_shards
from fine_dist.data.small_images import digits
from fine_dist.data.stream import read_all
from fine_dist.encode import EncodeConfig, main, run
from tests.data.picturing import config, picture

# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (500, 375), (129, 640), (64, 63), (20, 31), (2000, 65)], ids=str)
def test_crops_equal_adm_s_reference_arithmetic(size):
    """Step by step as published, on an image of its own."""
    image = picture(1, *size)
    expected = image
    while min(*expected.size) >= 2 * 32:
        expected = expected.resize(tuple(x // 2 for x in expected.size), resample=Image.BOX)
    scale = 32 / min(*expected.size)
    expected = expected.resize(tuple(round(x * scale) for x in expected.size), resample=Image.BICUBIC)
    array = np.array(expected)
    y, x = (array.shape[0] - 32) // 2, (array.shape[1] - 32) // 2
    expected_chw = array[y : y + 32, x : x + 32].transpose(2, 0, 1)
    np.testing.assert_array_equal(center_crop(image, 32), expected_chw)


def test_a_folder_becomes_shuffled_shards_of_pixels(folder, tmp_path):
    run(config(folder, tmp_path, dtype="float32"))
    latents, labels = read_all(str(tmp_path / "train"))
    manifest = Manifest.parse((tmp_path / "train" / "manifest.json").read_bytes(), "")
    assert latents.shape == (25, 3, 32, 32) and latents.min() >= -1 and latents.max() <= 1
    assert [shard.count for shard in manifest.shards] == [8, 8, 8, 1]
    assert manifest.class_names == ("n01_cat", "n02_dog", "n03_owl") and manifest.num_classes == 3
    assert torch.bincount(labels).tolist() == [12, 9, 4] and labels.tolist() != sorted(labels.tolist())
    wanted = {
        (center_crop(Image.open(path), 32).tobytes(), label)
        for label, name in enumerate(manifest.class_names)
        for path in (folder / name).iterdir()
        if path.suffix != ".txt"
    }
    pixels = ((latents + 1) * 127.5).round().byte().numpy()
    assert {(image.tobytes(), int(label)) for image, label in zip(pixels, labels)} == wanted


def test_digits_survive_the_way_through_shards_exactly(tmp_path):
    run(EncodeConfig(out=str(tmp_path)))
    for split, count in (("train", 1500), ("held_out", 297)):
        pixels, labels = digits(split)
        found = read_all(str(tmp_path / split))
        assert len(pixels) == count and pixels.min() == -1 and pixels.max() == 1
        np.testing.assert_array_equal(found[0].numpy(), pixels)
        np.testing.assert_array_equal(found[1].numpy(), labels)


def test_webdataset_image_shards_become_one_latent_shard_each(tmp_path):
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"images-{shard}.tar"), encoder=False) as tar:
            for i in range(5 + shard):
                stream = io.BytesIO()
                picture(10 * shard + i).save(stream, "JPEG")
                tar.write({"__key__": f"{shard}-{i}", "jpg": stream.getvalue(), "cls": str(i).encode()})
            tar.write({"__key__": f"{shard}-none", "cls": b"1"})
    run(config(tmp_path / "images-{0..1}.tar", tmp_path / "out", max_bad_fraction=0.5))
    latents, labels = read_all(str(tmp_path / "out" / "train"))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert [shard.count for shard in manifest.shards] == [5, 6] and manifest.num_classes == 6
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5] and latents.shape[1:] == (3, 32, 32)
    assert [(bad.source, bad.error) for bad in manifest.bad] == [
        (f"images-{i}.tar:{i}-none", "it has no image") for i in range(2)
    ]


def test_a_damaged_image_tar_gives_what_can_be_read_and_is_listed(tmp_path):
    with wds.TarWriter(str(tmp_path / "images.tar"), encoder=False) as tar:
        for i in range(6):
            stream = io.BytesIO()
            picture(i).save(stream, "PNG")
            tar.write({"__key__": str(i), "png": stream.getvalue(), "cls": b"0"})
    os.truncate(tmp_path / "images.tar", (tmp_path / "images.tar").stat().st_size * 2 // 3)
    run(config(tmp_path / "images.tar", tmp_path / "out", max_bad_fraction=0.5))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert 2 <= manifest.count <= 4 and manifest.bad[-1].error == "the tar is damaged: unexpected end of data"


def corrupt(folder: Path, to: Path) -> Path:
    """A copy of the images in which two are damaged."""
    subprocess.run(["cp", "-r", folder, to], check=True)
    whole = (to / "n01_cat" / "0.JPEG").read_bytes()
    (to / "n01_cat" / "0.JPEG").write_bytes(whole[: len(whole) // 2])
    (to / "n02_dog" / "3.JPEG").write_bytes(b"not an image at all")
    return to


def test_corrupt_images_are_listed_in_the_manifest_and_the_others_encoded(folder, tmp_path):
    broken = corrupt(folder, tmp_path / "images")
    run(config(broken, tmp_path / "out", max_bad_fraction=0.1))
    manifest = Manifest.parse((tmp_path / "out" / "train" / "manifest.json").read_bytes(), "")
    assert manifest.count == 23
    assert sorted(bad.source for bad in manifest.bad) == ["n01_cat/0.JPEG", "n02_dog/3.JPEG"]
    assert all(bad.error for bad in manifest.bad)


def test_too_many_corrupt_images_are_an_error_and_a_higher_limit_continues(folder, tmp_path):
    broken = corrupt(folder, tmp_path / "images")
    with pytest.raises(DataError, match=r"of 25 images cannot be read, more than max_bad_fraction 0\.01 allows"):
        run(config(broken, tmp_path / "out", max_bad_fraction=0.01))
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    run(config(broken, tmp_path / "out", max_bad_fraction=0.1))
    assert read_all(str(tmp_path / "out" / "train"))[0].shape[0] == 23


# --- the command ---------------------------------------------------------------------------------------------------


def test_inspect_prints_what_is_there(folder, tmp_path, capsys):
    run(config(folder, tmp_path))
    assert main(["--inspect", str(tmp_path / "train")]) == 0
    text = capsys.readouterr().out
    for words in ("4 tars", "samples     25", "3x32x32 float16, kind sample, codec identity", "n02_dog", "4 to 12"):
        assert words in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("std", "factor", "words"),
    [
        (5.5, 0.18215, None),
        (1.0, 0.18215, "applied twice"),
        (5.5, 1.0, "not to be applied at all (a factor near 0.18"),
        (60.0, 0.18215, "far from 1"),
    ],
)
def test_inspect_warns_when_the_scaling_looks_wrong(tmp_path, std, factor, words):
    latents = np.random.default_rng(0).standard_normal((200, 4, 8, 8)) * std
    write_shards(tmp_path, latents, np.arange(200) % 5, num_classes=5, scaling_factor=factor, codec="some-vae")
    summary = inspect(str(tmp_path))
    assert summary.std == pytest.approx(std, rel=0.02) and summary.histogram.tolist() == [40] * 5
    assert summary.channel_std == pytest.approx([std] * 4, rel=0.03)
    assert [words in warning for warning in summary.warnings] == ([True] if words else [])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "out: the folder for the shards is needed"),
        (["--out", "x", "--source", "/absent"], "source: /absent: there is no such folder"),
        (["--out", "x", "--source", "/absent/{0..3}.tar"], "/absent/0.tar: there is no such file (4 of 4 missing)"),
        (["--out", "x", "--codec", "vae"], "small gray images, which no autoencoder takes"),
        (["--out", "x", "--kind", "moments"], "identity has no moments"),
        (["--out", "x", "--split", "test"], "digits have no split 'test'; legal: train, held_out"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--launcher", "here"]) == 2
    assert words in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(folder, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--source", str(folder), "--out", str(out), "--flips", "--shard-samples", "10", "--dry-run"]
    assert main(flags) == 0
    assert f"{out}/train: 50 samples in 5 shards" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("name", ["digits", "imagenet256"])
def test_published_configs_are_valid(name):
    path = Path(__file__).parents[2] / "configs" / "encode" / f"{name}.yaml"
    assert load(EncodeConfig, path).out == f"data/{name}"
