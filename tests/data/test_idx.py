"""IDX files as a source, some classes of a source, and a second split from a source of its own."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fine_dist.core.errors import ConfigError, DataError
from fine_dist.data.manifest import Manifest
from fine_dist.data.small_images import digits, read_idx
from fine_dist.data.stream import read_all
from fine_dist.encode import EncodeConfig, main, run

REAL = Path("/usr/share/datasets/fashion-mnist")


def idx(path: Path, array: np.ndarray, packed: bool = True) -> None:
    """Written by the format's own words: 0, 0, 8 (unsigned bytes), the number of axes, their lengths, the numbers."""
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for head, count in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (count, 6, 6), dtype=np.uint8)
        idx(tmp_path / f"{head}-images-idx3-ubyte.gz", images)
        idx(tmp_path / f"{head}-labels-idx1-ubyte", (np.arange(count) % 5).astype(np.uint8), packed=False)
    return tmp_path


def test_both_splits_of_a_folder_become_shards_of_pixels(folder, tmp_path):
    out = run(EncodeConfig(source=f"idx:{folder}", out=str(tmp_path / "out"), shard_samples=8, dtype="float32"))
    for head, split, count in (("train", "train", 30), ("t10k", "held_out", 12)):
        latents, labels = read_all(str(out / split))
        images = read_idx(folder, f"{head}-images-idx3-ubyte", 3)
        assert latents.shape == (count, 1, 6, 6) and labels.tolist() == [i % 5 for i in range(count)]
        assert torch.equal(latents[:, 0], torch.from_numpy(images.astype(np.float32)) / 127.5 - 1)


def test_chosen_classes_are_counted_from_0_in_the_order_given(tmp_path):
    images, labels = digits("train")
    out = run(EncodeConfig(out=str(tmp_path), classes=(6, 9), dtype="float32"))
    found, new = read_all(str(out / "train"))
    kept = np.isin(labels, (6, 9))
    assert np.array_equal(found.numpy(), images[kept])
    assert new.tolist() == [(6, 9).index(label) for label in labels[kept]]
    manifest = Manifest.parse((out / "train" / "manifest.json").read_bytes(), "it")
    assert manifest.num_classes == 2 and list(manifest.class_names) == ["6", "9"]


def test_digits_are_enlarged_to_the_side_that_a_source_names(tmp_path):
    out = run(EncodeConfig(source="digits:32", out=str(tmp_path), dtype="float32"))
    latents, labels = read_all(str(out / "held_out"))
    images, own = digits("held_out")
    assert latents.shape == (297, 1, 32, 32) and latents.abs().max() <= 1 and labels.tolist() == own.tolist()
    # means of 4 x 4 pixels are the digits again, up to the smoothing of bicubic interpolation (range 2)
    small = torch.nn.functional.avg_pool2d(latents, 4)
    assert (small - torch.from_numpy(images)).abs().mean() < 0.1
    manifest = Manifest.parse((out / "train" / "manifest.json").read_bytes(), "it")
    assert sum(shard.count for shard in manifest.shards) == 1500 and manifest.num_classes == 10
    with pytest.raises(ConfigError, match="a number of pixels from 8 to 256"):
        run(EncodeConfig(source="digits:7", out=str(tmp_path / "small")))


def test_a_held_out_folder_is_encoded_beside_the_first(tmp_path):
    for root, count in (("many", 5), ("few", 2)):
        for name in ("cat", "dog"):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 9), (i, 2 * i, 3 * i)).save(tmp_path / root / name / f"{i}.png")
    config = EncodeConfig(source=str(tmp_path / "many"), held_out=str(tmp_path / "few"), out=str(tmp_path / "out"),
                          image_size=8)  # fmt: skip
    out = run(config)
    assert [len(read_all(str(out / split))[1]) for split in ("train", "held_out")] == [10, 4]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "train-images-idx3-ubyte.gz").unlink(), "apt-get install dataset-fashion-mnist"),
        (lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bno"), "cannot be read"),
        (lambda f: idx(f / "train-images-idx3-ubyte.gz", np.zeros(7, np.uint8)), "no IDX file of unsigned bytes"),
        (lambda f: idx(f / "train-labels-idx1-ubyte", np.zeros(7, np.uint8), False), "30 images and 7 labels"),
        (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1])), "holds 1 numbers"),
    ],
)
def test_what_is_wrong_with_idx_files_is_said(folder, tmp_path, spoil, says):
    spoil(folder)
    with pytest.raises(DataError, match=says):
        run(EncodeConfig(source=f"idx:{folder}", out=str(tmp_path / "out")))


def test_a_class_that_is_not_there_is_refused_in_one_line(tmp_path, capsys):
    assert main(["--classes", "3", "10", "--out", str(tmp_path)]) == 2
    assert "classes: there is no class 10; legal: 0 to 9" in capsys.readouterr().err
    assert main(["--classes", "3", "3", "--out", str(tmp_path)]) == 2
    assert "names one twice" in capsys.readouterr().err


@pytest.mark.skipif(not REAL.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debian_s_fashion_mnist_is_read(tmp_path):
    assert read_idx(REAL, "train-images-idx3-ubyte", 3).shape == (60000, 28, 28)
    out = run(EncodeConfig(source=f"idx:{REAL}", out=str(tmp_path), limit=200, split="held_out"))
    latents, labels = read_all(str(out / "held_out"))
    assert latents.shape == (200, 1, 28, 28) and sorted(set(labels.tolist())) == list(range(10))
    assert float(latents.min()) >= -1 and float(latents.max()) <= 1
