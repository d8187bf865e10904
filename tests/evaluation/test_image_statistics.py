"""From images on disk to named numbers: folders, tars and npz, statistics files, several processes, bad input."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fine_dist.core.errors import ConfigError, DataError
from fine_dist.evaluation.comparison import cautions, compare, networks
from fine_dist.evaluation.feature_network import Extracted
from fine_dist.evaluation.frechet import frechet_distance
from fine_dist.evaluation.image_reader import open_images
from fine_dist.evaluation.image_statistics import IS_SPLIT, SUBSET, Selection, measure, measure_path, reference
from fine_dist.evaluation.moments import Moments
from fine_dist.evaluation.scores import inception_score, kernel_distance, precision_recall
from fine_dist.sampling.npz import ReferenceStatistics, write_samples, write_statistics


class Toy:
    """A network of fixed random projections, named as Inception so that every metric goes with it."""

    name, distance, num_features, identity = "inception", "FID", 6, "toy"

    def __call__(self, images: torch.Tensor) -> Extracted:
        g = torch.Generator().manual_seed(0)
        x = images.float().flatten(1) / 255
        w = torch.randn(x.shape[1], 6, generator=g) / x.shape[1] ** 0.5
        pooled = torch.tanh(4 * x @ w)
        return Extracted(pooled, pooled[:, :4] ** 2, pooled @ torch.randn(6, 5, generator=g))


def pictures(count: int = 40, seed: int = 0, size=(8, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def as_folder(path, x):
    path.mkdir()
    for i, pixels in enumerate(x):
        (path / f"{i:05}.png").write_bytes(png(pixels))
    return path


def as_tar(path, x):
    with tarfile.open(path, "w") as archive:
        for i, pixels in enumerate(x):
            info = tarfile.TarInfo(f"{i:05}.png")
            info.size = len(png(pixels))
            archive.addfile(info, io.BytesIO(png(pixels)))
    return path


def as_npz(path, x):
    write_samples(path, [x], count=len(x), size=x.shape[1:3])
    return path


@pytest.mark.parametrize("write", [as_folder, as_tar, as_npz])
def test_images_come_the_same_from_a_folder_a_tar_and_an_npz(tmp_path, write):
    x = pictures(10)
    images = open_images(write(tmp_path / f"x{ {as_tar: '.tar', as_npz: '.npz'}.get(write, '') }", x))
    assert images.count == 10
    numbers, parts = zip(*images.batches(3, 2, 9))
    assert torch.cat(numbers).tolist() == list(range(2, 9))
    assert np.array_equal(torch.cat(parts).permute(0, 2, 3, 1), x[2:9])


def test_every_metric_of_a_set_is_its_own_formula(tmp_path):
    x, y = pictures(), pictures(30, 1) // 2
    found = measure_path(Toy(), as_npz(tmp_path / "y.npz", y), batch=7)
    real = reference(Toy(), as_folder(tmp_path / "x", x), batch=7)
    scores = {s.name: s for s in compare(found, real, ["fid", "sfid", "is", "precision", "recall", "kid"])}
    a, b = (Toy()(torch.from_numpy(z).permute(0, 3, 1, 2)) for z in (x, y))
    assert list(scores) == ["FID-30", "sFID-30", "IS-30", "precision", "recall", "KID-30"]
    assert scores["FID-30"].value == pytest.approx(
        frechet_distance(Moments.of(a.pooled), Moments.of(b.pooled)), rel=1e-6
    )
    assert scores["sFID-30"].value == pytest.approx(
        frechet_distance(Moments.of(a.spatial), Moments.of(b.spatial)), rel=1e-6
    )
    assert scores["IS-30"].value == pytest.approx(inception_score(b.logits)[0], rel=1e-6)
    assert (scores["precision"].value, scores["recall"].value) == precision_recall(a.pooled, b.pooled)
    assert scores["KID-30"].spread is not None and scores["IS-30"].better == "higher"


def test_published_statistics_are_a_reference_and_without_spatial_ones_sfid_says_why(tmp_path):
    x = pictures()
    extracted = Toy()(torch.from_numpy(x).permute(0, 3, 1, 2))
    pooled, spatial = Moments.of(extracted.pooled), Moments.of(extracted.spatial)
    full = ReferenceStatistics(
        *(t.numpy() for t in (pooled.mean, pooled.covariance(), spatial.mean, spatial.covariance()))
    )
    write_statistics(tmp_path / "full.npz", full)
    np.savez(tmp_path / "half.npz", mu=full.mu.astype(np.float32), sigma=full.sigma.astype(np.float32), arr_0=x)
    found = measure_path(Toy(), as_folder(tmp_path / "y", pictures(30, 1)))
    direct = compare(found, reference(Toy(), as_npz(tmp_path / "x.npz", x)), ["fid", "sfid", "precision"])
    with_all = compare(found, reference(Toy(), tmp_path / "full.npz"), ["fid", "sfid", "precision"])
    with_half = compare(found, reference(Toy(), tmp_path / "half.npz"), ["fid", "sfid", "precision"])
    assert with_all[0].value == pytest.approx(direct[0].value, rel=1e-9)
    assert with_all[1].value == pytest.approx(direct[1].value, rel=1e-9)
    assert with_half[0].value == pytest.approx(direct[0].value, rel=1e-4)  # stored in float32
    assert with_half[1].value is None and "mu_s, sigma_s" in with_half[1].why
    assert with_all[2].value is None and "arr_0" in with_all[2].why
    assert with_half[2].value == direct[2].value


def test_statistics_of_another_network_are_refused(tmp_path):
    write_statistics(tmp_path / "r.npz", ReferenceStatistics(np.zeros(7), np.eye(7)))
    with pytest.raises(DataError, match="statistics of 7 features; inception has 6"):
        reference(Toy(), tmp_path / "r.npz")
    found = measure_path(Toy(), as_npz(tmp_path / "x.npz", pictures()))
    other = Toy()
    other.identity = "another"
    with pytest.raises(DataError, match="measure both with one network"):
        compare(found, measure_path(other, tmp_path / "x.npz"), ["fid"])
    with pytest.raises(ConfigError, match="fdd is measured with dinov2, not with inception"):
        compare(found, found, ["fdd"])


@pytest.mark.parametrize(
    ("count", "name"), [(5000, "FID-5k"), (50_000, "FID"), (1234, "FID-1234"), (10_000, "FID-10k")]
)
def test_a_fid_is_named_by_its_number_of_images(count, name):
    from dataclasses import replace

    found = measure(Toy(), [(torch.arange(9), torch.from_numpy(pictures(9)).permute(0, 3, 1, 2))], num_images=9)
    found = replace(found, count=count)
    assert compare(found, found, ["fid"])[0].name == name
    told = " ".join(cautions(found, found, ["fid"]))
    assert ("compares only between equal numbers" in told) == (count < 50_000)


def test_too_few_samples_are_told(tmp_path):
    few = measure_path(Toy(), as_npz(tmp_path / "x.npz", pictures(5)))
    told = cautions(few, few, ["fid", "precision"])
    assert "singular covariance" in told[0] and "takes 10000 against 10000" in told[1]


def test_metrics_are_sorted_by_the_network_they_need():
    assert networks(["fid", "fdd", "is"]) == {"inception": ["fid", "is"], "dinov2": ["fdd"]}
    with pytest.raises(ConfigError, match="did you mean 'sfid'"):
        networks(["ssfid"])


def _measured(path: str, unequal: bool) -> object:
    import torch.distributed as dist

    from fine_dist.evaluation.image_reader import open_images
    from fine_dist.evaluation.image_statistics import Selection, measure

    dist.init_process_group("gloo")
    try:
        images, rank, world = open_images(path), dist.get_rank(), dist.get_world_size()
        cuts = [0, 37, 37, 40] if unequal else [images.count * r // world for r in range(world + 1)]
        found = measure(Toy(), images.batches(6, cuts[rank], cuts[rank + 1]), num_images=40, selection=Selection(25))
        return found.pooled.covariance, found.spatial.covariance, found.kept, found.classes  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("unequal", [False, True])
def test_processes_together_measure_what_one_measures(tmp_path, unequal):
    """Three processes, in one case the second without an image."""
    from fine_dist.testing import run_distributed

    path = as_npz(tmp_path / "x.npz", pictures())
    alone = measure_path(Toy(), path, selection=Selection(25))
    for pooled, spatial, kept, classes in run_distributed(_measured, 3, str(path), unequal):
        torch.testing.assert_close(pooled, alone.pooled.covariance, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(spatial, alone.spatial.covariance, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(kept, alone.kept, rtol=1e-5, atol=1e-6)
        assert classes == pytest.approx(alone.classes, rel=1e-6)


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_images_of_mixed_sizes_are_named(tmp_path):
    folder = as_folder(tmp_path / "x", pictures(3))
    (folder / "00002.png").write_bytes(png(pictures(1, size=(6, 6))[0]))
    with pytest.raises(DataError, match=r"00002.png is 6x6, and 00000.png is 6x8"):
        measure_path(Toy(), folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture", "cannot be read"),
        (png(pictures(1)[0])[:80], "cannot be read"),
    ],
)
def test_pictures_that_would_be_measured_wrongly_are_refused(tmp_path, content, words):
    folder = as_folder(tmp_path / "x", pictures(2))
    (folder / "00001.png").write_bytes(content)
    with pytest.raises(DataError, match=f"00001.png.*{words}"):
        measure_path(Toy(), folder)


def test_transparent_and_16_bit_pictures_are_read_as_encode_reads_them(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    clear = np.zeros((8, 6, 4), np.uint8)
    clear[:4] = (10, 20, 30, 255)
    (folder / "0.png").write_bytes(png(clear))
    (folder / "1.png").write_bytes(png(np.full((8, 6), 65535, np.uint16)))
    (folder / "._0.png").write_bytes(b"a companion file that macOS leaves")
    _, both = next(iter(open_images(folder, (9, 8, 7)).batches(2)))
    assert both[0, :, 0, 0].tolist() == [10, 20, 30] and both[0, :, 7, 0].tolist() == [9, 8, 7]
    assert (both[1] == 255).all()


def test_opaque_alpha_and_grey_are_pictures(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    grey = pictures(1)[0, ..., 0]
    (folder / "0.png").write_bytes(png(np.dstack([grey, grey, grey, np.full_like(grey, 255)])))
    (folder / "1.png").write_bytes(png(grey))
    _, both = next(iter(open_images(folder).batches(2)))
    assert torch.equal(both[0], both[1])


def test_places_without_images_are_named(tmp_path):
    for path, words in ((tmp_path, "holds no images"), (tmp_path / "no", "no such"), (tmp_path / "x.txt", "come as")):
        (tmp_path / "x.txt").write_text("x")
        with pytest.raises(DataError, match=words):
            open_images(path)
    (tmp_path / "x.tar").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match="no tar"):
        open_images(tmp_path / "x.tar")


# --- which images precision, recall, KID and Inception Score see ---------------------------------------------------


class Plane:
    """Features that are an image's own first numbers: classes are clusters of pixels."""

    name, distance, num_features, identity = "inception", "FID", 12, "plane"

    def __call__(self, images: torch.Tensor) -> Extracted:
        pooled = images.float().flatten(1)[:, :12] / 64 - 2
        return Extracted(pooled, None, 3 * pooled)


def classes(num: int, each: int, seed: int, order: str) -> torch.Tensor:
    """`each` images of every class, uint8 [N, 3, 2, 2], by class or shuffled; all seeds are of one distribution."""
    centers = torch.randint(40, 216, (num, 12), generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(num * each, 12, generator=g) * 8
    x = (centers.repeat_interleave(each, 0) + noise).round().clamp(0, 255).to(torch.uint8).view(-1, 3, 2, 2)
    return x if order == "sorted" else x[torch.randperm(len(x), generator=g)]


DEFAULT = Selection()


def statistics(x: torch.Tensor, selection: Selection = DEFAULT):
    parts = ((torch.arange(len(x))[i : i + 1000], x[i : i + 1000]) for i in range(0, len(x), 1000))
    return measure(Plane(), parts, num_images=len(x), selection=selection)


def test_sets_that_are_sorted_by_class_score_like_shuffled_ones():
    """Of 600 images the first 400 are of 20 of the 30 classes; a random subset of 400 is of all of them."""
    few, everything = Selection(400), Selection(None)
    real, fake = classes(30, 20, 0, "sorted"), classes(30, 20, 1, "sorted")
    whole = precision_recall(statistics(real, everything).kept, statistics(fake, everything).kept)
    for order in ("sorted", "shuffled"):
        found = statistics(classes(30, 20, 1, order), few)
        real_few = statistics(real, few)
        scores = [score.value for score in compare(found, real_few, ["precision", "recall"])]
        assert scores == pytest.approx(whole, abs=0.06)
        assert abs(kernel_distance(real_few.kept, found.kept, subsets=1)[0]) < 0.03
    first = statistics(fake[:400], everything).kept  # what the first images would score
    shuffled = statistics(classes(30, 20, 0, "shuffled"), everything).kept[:400]
    assert (
        precision_recall(first, shuffled)[0] < whole[0] - 0.15 and kernel_distance(first, shuffled, subsets=1)[0] > 0.03
    )


def test_fifteen_thousand_images_by_class_score_under_the_usual_protocol_as_shuffled_ones_do():
    """30 classes x 500: of each set 10,000 images that the protocol takes, not those of the first 20 classes."""
    real = statistics(classes(30, 500, 0, "sorted")).kept
    fakes = [statistics(classes(30, 500, 1, order)).kept for order in ("sorted", "shuffled")]
    assert [len(kept) for kept in (real, *fakes)] == [SUBSET] * 3
    by_class, shuffled = ([*precision_recall(real, kept), kernel_distance(real, kept, 20)[0]] for kept in fakes)
    assert by_class[:2] == pytest.approx(shuffled[:2], abs=0.015)
    assert abs(by_class[2]) < 0.01 and abs(shuffled[2]) < 0.01
    first = classes(30, 500, 1, "sorted")[:SUBSET].float().flatten(1) / 64 - 2  # the kind's fault
    assert precision_recall(real[::4], first[::4])[1] < by_class[1] - 0.1


def test_inception_scores_of_sorted_sets_are_those_of_shuffled_ones():
    x = classes(30, 500, 0, "sorted")
    sorted_, consecutive = statistics(x).classes[0], statistics(x, Selection(consecutive=True)).classes[0]
    shuffled = statistics(classes(30, 500, 0, "shuffled"), Selection(consecutive=True)).classes[0]
    assert len(x) == 3 * IS_SPLIT
    assert sorted_ == pytest.approx(shuffled, rel=0.01) and consecutive < shuffled * 0.99


def test_the_subset_is_the_same_every_time_and_another_with_another_seed():
    x = classes(3, 50, 0, "sorted")
    one, same, other = (statistics(x, Selection(20, seed)).kept for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and len(one) == 20
    assert Selection(20).subset(7).tolist() == list(range(7))


def test_a_statistics_file_gives_a_random_subset_of_its_images(tmp_path):
    x = classes(3, 50, 0, "sorted")
    array = x.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "r.npz", mu=np.zeros(12), sigma=np.eye(12), arr_0=array)
    kept = reference(Plane(), tmp_path / "r.npz", selection=Selection(20)).kept
    assert torch.equal(kept, statistics(x, Selection(20)).kept)
