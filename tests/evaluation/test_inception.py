"""FID's Inception: the published size, an independent forward, TensorFlow 1's resizing, files of other things."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from fine_dist.core.errors import ArtifactError, DataError
from fine_dist.evaluation.feature_network import as_rgb
from fine_dist.evaluation.inception import PUBLISHED, Inception, from_state, load_inception, resize_as_tensorflow_1


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights that keep activations of size about 1, under torchvision's names."""
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in Inception().state_dict().items():
        if name.endswith("conv.weight") or name == "fc.weight":
            fan = tensor[0].numel()
            found[name] = torch.randn(tensor.shape, generator=g) * (2 / fan) ** 0.5
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            found[name] = 0.5 + torch.rand(tensor.shape, generator=g)
        elif not name.endswith("num_batches_tracked"):
            found[name] = 0.1 * torch.randn(tensor.shape, generator=g)
    return found


@pytest.fixture(scope="module")
def network(state) -> Inception:
    return from_state(state, "random", "none")


def photos(count: int = 2, side: int = 40) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 6, 6, generator=g)
    return (F.interpolate(coarse, (side, side), mode="bilinear") * 255).to(torch.uint8)


def test_it_has_the_published_number_of_parameters():
    """Keras documents 23,817,352 trainable numbers (1000 classes, no scale in its normalization) and 34,432 others."""
    model = Inception()
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bn.weight"))
    further_classes = 8 * (2048 + 1)
    total = sum(p.numel() for p in model.parameters())
    assert total == 23_850_960 and total - scales - further_classes == 23_817_352
    assert sum(b.numel() for name, b in model.named_buffers() if "running" in name) == 34_432


def reference_forward(s: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same network written out by the names of its tensors: pooled, Mixed_6d's branch1x1, logits without bias."""

    def conv(name, x, stride=1, padding=0):
        y = F.conv2d(x, s[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, scale, shift = (
            s[f"{name}.bn.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((y - mean) / (var + 0.001).sqrt() * scale + shift)

    def mean_pool(x):
        ones = torch.ones_like(x[:1, :1])
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)  # of what is inside the image

    def a(n, x):
        five = conv(f"{n}.branch5x5_2", conv(f"{n}.branch5x5_1", x), padding=2)
        three = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        three = conv(f"{n}.branch3x3dbl_3", three, padding=1)
        return torch.cat([conv(f"{n}.branch1x1", x), five, three, conv(f"{n}.branch_pool", mean_pool(x))], 1)

    def c(n, x):
        seven = conv(f"{n}.branch7x7_2", conv(f"{n}.branch7x7_1", x), padding=(0, 3))
        seven = conv(f"{n}.branch7x7_3", seven, padding=(3, 0))
        double = conv(f"{n}.branch7x7dbl_1", x)
        for i, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = conv(f"{n}.branch7x7dbl_{i}", double, padding=padding)
        return torch.cat([conv(f"{n}.branch1x1", x), seven, double, conv(f"{n}.branch_pool", mean_pool(x))], 1)

    def e(n, x, pool):
        three = conv(f"{n}.branch3x3_1", x)
        three = [conv(f"{n}.branch3x3_2a", three, padding=(0, 1)), conv(f"{n}.branch3x3_2b", three, padding=(1, 0))]
        double = conv(f"{n}.branch3x3dbl_2", conv(f"{n}.branch3x3dbl_1", x), padding=1)
        double = [
            conv(f"{n}.branch3x3dbl_3a", double, padding=(0, 1)),
            conv(f"{n}.branch3x3dbl_3b", double, padding=(1, 0)),
        ]
        return torch.cat([conv(f"{n}.branch1x1", x), *three, *double, conv(f"{n}.branch_pool", pool(x))], 1)

    x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2))
    x = F.max_pool2d(conv("Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(name, x)
    double = conv("Mixed_6a.branch3x3dbl_2", conv("Mixed_6a.branch3x3dbl_1", x), padding=1)
    double = conv("Mixed_6a.branch3x3dbl_3", double, 2)
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2), double, F.max_pool2d(x, 3, 2)], 1)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d"):
        before, x = x, c(name, x)
    spatial = conv("Mixed_6d.branch1x1", before)
    x = c("Mixed_6e", x)
    three = conv("Mixed_7a.branch3x3_2", conv("Mixed_7a.branch3x3_1", x), 2)
    seven = conv("Mixed_7a.branch7x7x3_1", x)
    seven = conv("Mixed_7a.branch7x7x3_3", conv("Mixed_7a.branch7x7x3_2", seven, padding=(0, 3)), padding=(3, 0))
    x = torch.cat([three, conv("Mixed_7a.branch7x7x3_4", seven, 2), F.max_pool2d(x, 3, 2)], 1)
    x = e("Mixed_7b", x, mean_pool)
    x = e("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, 1))
    pooled = x.mean((2, 3))
    return pooled, spatial, pooled @ s["fc.weight"].T


def test_an_independent_forward_gives_the_same_activations(network, state):
    images = photos(1)
    found = network(images)
    x = (resize_as_tensorflow_1(images.float(), 299) - 128) / 128
    with torch.no_grad():
        pooled, spatial, logits = reference_forward(state, x)
    # fp32 through 94 layers, relative to activations of their own size
    for ours, theirs in ((found.pooled, pooled), (found.logits, logits)):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert found.spatial.shape == (1, 2023)
    # places first, channels last: entry (row, column, channel) of the first seven channels
    for row, column, channel in ((0, 0, 1), (3, 16, 6), (16, 2, 0)):
        expected = spatial[:, channel, row, column]
        ours = found.spatial[:, (row * 17 + column) * 7 + channel]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_the_order_of_spatial_features_changes_the_distance_to_published_statistics():
    """Statistics in places-first order against features in channels-first order are another number."""
    from fine_dist.evaluation.frechet import frechet_distance
    from fine_dist.evaluation.moments import Moments

    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 3, 7, generator=g) * torch.linspace(0.1, 2, 7)
    ours, other = x.flatten(1), x.permute(0, 3, 1, 2).flatten(1)
    assert frechet_distance(Moments.of(ours), Moments.of(ours)) < 1e-8
    assert frechet_distance(Moments.of(other), Moments.of(ours)) > 1


@pytest.mark.parametrize(("size", "side"), [((5, 7), 13), ((9, 4), 4), ((3, 3), 3)])
def test_resizing_is_tensorflow_1s_pixel_by_pixel(size, side):
    x = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(1, 2, side, side)
    for i in range(side):
        for j in range(side):
            y, x_ = i * size[0] / side, j * size[1] / side
            y0, x0 = int(y), int(x_)
            y1, x1 = min(y0 + 1, size[0] - 1), min(x0 + 1, size[1] - 1)
            top = x[..., y0, x0] * (1 - (x_ - x0)) + x[..., y0, x1] * (x_ - x0)
            bottom = x[..., y1, x0] * (1 - (x_ - x0)) + x[..., y1, x1] * (x_ - x0)
            expected[..., i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    torch.testing.assert_close(resize_as_tensorflow_1(x, side), expected, atol=1e-6, rtol=1e-5)


def test_floats_are_taken_as_the_pixels_they_would_be_saved_as():
    """What every network sees first is `as_rgb` of its images."""
    images = photos(1)
    assert torch.equal(as_rgb(images.float() / 127.5 - 1), images)
    grey = images[:, :1]
    assert torch.equal(as_rgb(grey), grey.repeat(1, 3, 1, 1))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 4, 32, 32), "latents are decoded first"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "legal: uint8"),
        (torch.full((1, 3, 8, 8), float("inf")), "NaN or infinite"),
    ],
)
def test_what_is_no_image_is_refused(network, images, words):
    with pytest.raises(DataError, match=words):
        network(images)


# --- its file --------------------------------------------------------------------------------------------------------


def test_the_file_is_read_without_unpickling_and_its_hash_is_kept(tmp_path, network, state):
    torch.save(state, tmp_path / "weights.pth")
    found = load_inception(tmp_path / "weights.pth")
    assert len(found.identity) == 64
    kept, ours = found.state_dict(), network.state_dict()
    assert kept.keys() == ours.keys() and all(torch.equal(kept[name], ours[name]) for name in ours)


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_other_files_are_named_and_nothing_in_them_is_run(tmp_path, state):
    torch.save({**state, "x": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    with pytest.raises(ArtifactError, match="nothing in it was run"):
        load_inception(tmp_path / "bomb.pth")
    assert not (tmp_path / "executed").exists()
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match=r"472 missing .*1 unknown \(conv1.weight\)"):
        load_inception(tmp_path / "other.pth")
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "wide.pth")
    with pytest.raises(ArtifactError, match=r"1 of another shape \(fc.weight\)"):
        load_inception(tmp_path / "wide.pth")
    (tmp_path / PUBLISHED).write_bytes(b"half")
    with pytest.raises(ArtifactError, match="not 6726825d: half copied"):
        load_inception(tmp_path / PUBLISHED)
    with pytest.raises(ArtifactError, match="91 MB"):
        load_inception(tmp_path / "nowhere.pth")


def test_torch_fidelity_gives_the_same_features_where_it_can_be_imported(tmp_path, network, state):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    torch.save(state, tmp_path / "weights.pth")
    theirs = module.FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "weights.pth"))
    found = network(photos()).pooled
    assert (theirs(photos())[0] - found).abs().max() < 1e-4 * found.abs().max()
