"""ADM's files: keys, types and order; streamed, whole or not there; damaged and foreign ones."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fine_dist.core.errors import DataError
from fine_dist.sampling.npz import (
    NpzImages,
    ReferenceStatistics,
    has_statistics,
    read_statistics,
    write_samples,
    write_statistics,
)


def images(count: int = 10, size=(4, 6), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


def test_samples_are_what_numpy_reads_under_adms_key(tmp_path):
    x = images()
    write_samples(tmp_path / "s.npz", (x[a:b] for a, b in ((0, 3), (3, 3), (3, 10))), count=10, size=(4, 6))
    with np.load(tmp_path / "s.npz", allow_pickle=False) as found:
        assert found.files == ["arr_0"]
        assert found["arr_0"].dtype == np.uint8 and np.array_equal(found["arr_0"], x)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_numpys_own_files_come_back_in_batches(tmp_path, save):
    x = images()
    save(tmp_path / "s.npz", x, np.arange(10))
    source = NpzImages(tmp_path / "s.npz")
    assert (source.count, source.size) == (10, (4, 6))
    parts = list(source.batches(4))
    assert [len(p) for p in parts] == [4, 4, 2] and np.array_equal(np.concatenate(parts), x)


def test_neither_way_holds_all_images(tmp_path):
    """64 MiB of images pass through; a few batches of 1 MiB are held."""
    one = images(256, (64, 21))
    tracemalloc.start()
    write_samples(tmp_path / "s.npz", (one for _ in range(64)), count=64 * 256, size=(64, 21))
    total = sum(len(part) for part in NpzImages(tmp_path / "s.npz").batches(256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 64 * 256 and peak < 8 * 2**20


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([images(9)], "10 images were expected, and there are 9"),
        ([images(11)], "more images than the 10"),
        ([images(10, (4, 5))], r"\[10, 4, 5, 3\]"),
        ([images().astype(np.float32)], "float32"),
    ],
)
def test_a_sample_file_is_whole_or_not_there(tmp_path, parts, words):
    with pytest.raises(DataError, match=words):
        write_samples(tmp_path / "s.npz", parts, count=10, size=(4, 6))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["encrypted", "damaged"])
def test_an_array_that_cannot_be_read_is_one_line(tmp_path, fault):
    path = tmp_path / "s.npz"
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    content = bytearray(path.read_bytes())
    if fault == "encrypted":  # bit 0 of the flags in both headers of the first array
        for magic, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            content[content.index(magic) + flags] |= 1
    else:
        content[content.index(b"NUMPY")] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="mu is damaged"):
        read_statistics(path)


def test_statistics_keep_their_names_and_come_back(tmp_path):
    rng = np.random.default_rng(0)
    mu, sigma = rng.standard_normal(5), np.cov(rng.standard_normal((5, 20)))
    write_statistics(tmp_path / "r.npz", ReferenceStatistics(mu, sigma, mu[:3], sigma[:3, :3]))
    with np.load(tmp_path / "r.npz") as found:
        assert sorted(found.files) == ["mu", "mu_s", "sigma", "sigma_s"]
    back = read_statistics(tmp_path / "r.npz")
    assert np.array_equal(back.sigma, sigma) and back.sigma_s is not None and back.sigma_s.shape == (3, 3)
    assert has_statistics(tmp_path / "r.npz")


def test_statistics_without_the_spatial_pair_are_read_as_such(tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(4, np.float32), sigma=np.eye(4, dtype=np.float32))
    found = read_statistics(tmp_path / "r.npz")
    assert found.mu_s is None and found.sigma_s is None and found.sigma.dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros(3)}, "its arrays: x"),
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "square matrix"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "a vector"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, "int64"),
        ({"mu": np.array([object()] * 3), "sigma": np.eye(3)}, "no plain array"),
    ],
)
def test_statistics_that_cannot_be_are_named(tmp_path, arrays, words):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(DataError, match=words):
        read_statistics(tmp_path / "r.npz")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"samples": images()}, "its arrays: samples"),
        ({"arr_0": images().astype(np.float32)}, r"float32 \[10, 4, 6, 3\]; legal: uint8"),
        ({"arr_0": images().transpose(0, 3, 1, 2)}, "legal: uint8"),
        ({"arr_0": images()[0]}, "legal: uint8"),
    ],
)
def test_images_of_another_key_type_or_order_are_named(tmp_path, arrays, words):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=words):
        NpzImages(tmp_path / "s.npz")


def test_files_that_are_no_archives_and_cut_ones_are_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    for reader in (NpzImages, read_statistics, has_statistics):
        with pytest.raises(DataError, match=r"no \.npz file"):
            reader(tmp_path / "a.npz")
        with pytest.raises(DataError, match="no such file"):
            reader(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "s.npz", images())
    blob = bytearray((tmp_path / "s.npz").read_bytes())
    blob[300] ^= 255  # a pixel: the archive's checksum tells
    (tmp_path / "s.npz").write_bytes(bytes(blob))
    with pytest.raises(DataError, match="damaged"):
        list(NpzImages(tmp_path / "s.npz").batches(10))
