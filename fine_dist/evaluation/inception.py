"""The Inception network of FID: Inception-v3 (arXiv 1512.00567) as TensorFlow published it in December 2015.

The user provides the file of weights (`pt_inception-2015-12-05-6726825d.pth`, 91 MB); its tensors are named as in
torchvision's `Inception3`, without the auxiliary head and with 1008 classes. The graph differs from torchvision's in
three places, which move FID: padding does not count in average pools, the last block pools by maximum, and images are
resized to 299 as TensorFlow 1 did.

Shapes: N images, 3 channels. What is extracted follows ADM's evaluation (arXiv 2105.05233):

pooled   [N, 2048]  the average over the last block's 8 x 8 places: FID, precision, recall, KID.
spatial  [N, 2023]  the first 7 channels of Mixed_6d's branch1x1 (17 x 17, after its activation), channels last as in
                    TensorFlow: sFID. The order must be that of the published reference statistics.
logits   [N, 1008]  `pooled @ weightᵀ` without the bias: Inception Score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import sha256_of
from fine_dist.evaluation.feature_network import Extracted, as_rgb, check_tensors, read_weights

NUM_POOLED, NUM_CLASSES, SIDE = 2048, 1008, 299
PUBLISHED = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PUBLISHED}"
"""The file name ends with the first digits of its sha256."""

Size = int | tuple[int, int]
Layer = tuple[str, int, Size, int, Size]
"""Name, channels out, kernel, stride, padding."""


class Conv(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels joined in order.

    branches: chains of layers. `pool`: a last branch, `avg` with its 1 x 1 convolution of `pooled` channels, or `max`
    alone, with stride 2, or with its convolution where `pooled` is given.
    forks:    after the last layer of a branch (by its name), a 1 x 3 and a 3 x 1 convolution of 384 channels, joined.
    """

    def __init__(
        self,
        channels: int,
        branches: Sequence[Sequence[Layer]],
        pool: str,
        pooled: int = 0,
        forks: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.chains = [[layer[0] for layer in branch] for branch in branches]
        self.pool, self.pooled, self.forks = pool, pooled, forks or {}
        self.out_channels = pooled or channels
        for branch in branches:
            width = channels
            for name, out, kernel, stride, padding in branch:
                self.add_module(name, Conv(width, out, kernel, stride, padding))
                width = out
            fork = self.forks.get(branch[-1][0])
            if fork:
                self.add_module(f"{fork}a", Conv(width, 384, (1, 3), 1, (0, 1)))
                self.add_module(f"{fork}b", Conv(width, 384, (3, 1), 1, (1, 0)))
                width = 768
            self.out_channels += width
        if pooled:
            self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for chain in self.chains:
            h = x
            for name in chain:
                h = self.get_submodule(name)(h)
            fork = self.forks.get(chain[-1])
            if fork:
                h = torch.cat([self.get_submodule(f"{fork}{side}")(h) for side in "ab"], dim=1)
            outs.append(h)
        if not self.pooled:
            outs.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            outs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            # TensorFlow's average pools divide by the number of pixels inside the image.
            outs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        return torch.cat(outs, dim=1)


def _small(channels: int, pooled: int) -> Mixed:
    """35 x 35 places."""
    return Mixed(
        channels,
        [
            [("branch1x1", 64, 1, 1, 0)],
            [("branch5x5_1", 48, 1, 1, 0), ("branch5x5_2", 64, 5, 1, 2)],
            [("branch3x3dbl_1", 64, 1, 1, 0), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)],
        ],
        "avg",
        pooled,
    )


def _wide(inner: int) -> Mixed:
    """17 x 17 places; convolutions of 7 x 7 in two parts each."""
    row: tuple[Size, int, Size] = ((1, 7), 1, (0, 3))
    column: tuple[Size, int, Size] = ((7, 1), 1, (3, 0))
    return Mixed(
        768,
        [
            [("branch1x1", 192, 1, 1, 0)],
            [("branch7x7_1", inner, 1, 1, 0), ("branch7x7_2", inner, *row), ("branch7x7_3", 192, *column)],
            [
                ("branch7x7dbl_1", inner, 1, 1, 0),
                ("branch7x7dbl_2", inner, *column),
                ("branch7x7dbl_3", inner, *row),
                ("branch7x7dbl_4", inner, *column),
                ("branch7x7dbl_5", 192, *row),
            ],
        ],
        "avg",
        192,
    )


def _last(channels: int, pool: str) -> Mixed:
    """8 x 8 places."""
    return Mixed(
        channels,
        [
            [("branch1x1", 320, 1, 1, 0)],
            [("branch3x3_1", 384, 1, 1, 0)],
            [("branch3x3dbl_1", 448, 1, 1, 0), ("branch3x3dbl_2", 384, 3, 1, 1)],
        ],
        pool,
        192,
        {"branch3x3_1": "branch3x3_2", "branch3x3dbl_2": "branch3x3dbl_3"},
    )


class Inception(nn.Module):
    """`features(images) -> Extracted`; a `feature_network.Features`. Made by `load_inception`."""

    name, distance, num_features = "inception", "FID", NUM_POOLED

    def __init__(self) -> None:
        super().__init__()
        self.identity = ""
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _small(192, 32), _small(256, 64), _small(288, 64)
        self.Mixed_6a = Mixed(
            288,
            [
                [("branch3x3", 384, 3, 2, 0)],
                [("branch3x3dbl_1", 64, 1, 1, 0), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2, 0)],
            ],
            "max",
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _wide(128), _wide(160), _wide(160), _wide(192)
        self.Mixed_7a = Mixed(
            768,
            [
                [("branch3x3_1", 192, 1, 1, 0), ("branch3x3_2", 320, 3, 2, 0)],
                [
                    ("branch7x7x3_1", 192, 1, 1, 0),
                    ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
                    ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)),
                    ("branch7x7x3_4", 192, 3, 2, 0),
                ],
            ],
            "max",
        )
        self.Mixed_7b, self.Mixed_7c = _last(1280, "avg"), _last(2048, "max")
        self.fc = nn.Linear(NUM_POOLED, NUM_CLASSES)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        """Pooled, spatial and class features; `images` as in `Features.__call__`, of any size."""
        x = as_rgb(images).to(self.fc.weight.device)
        # TensorFlow's own scaling: 0..255 becomes -1 .. 0.992.
        x = (resize_as_tensorflow_1(x.float(), SIDE) - 128) / 128  #                                  [N, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)  #                   [N, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  #                                         [N, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  #                          [N, 768, 17, 17]
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # branch1x1 comes first in the joined channels    [N, 2023]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  #                           [N, 2048, 8, 8]
        pooled = x.mean((2, 3))
        return Extracted(pooled.float(), spatial.float(), F.linear(pooled, self.fc.weight).float())


def resize_as_tensorflow_1(x: Tensor, side: int) -> Tensor:
    """Bilinear resize [N, C, H, W] -> [N, C, side, side] without antialiasing: pixel i is sampled at i H / side.

    TensorFlow 1 placed pixels at the corners of their squares, so the result is shifted by half a pixel.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        # In fp32, as TensorFlow computes it: fp64 gives another neighbor for some pixels.
        at = torch.arange(side, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        share = (at - low).to(x).view([-1, 1] if axis == 2 else [-1])
        before, after = x.index_select(axis, low.to(x.device)), x.index_select(axis, high.to(x.device))
        x = before + (after - before) * share
    return x


def load_inception(path: str | Path, device: torch.device | str = "cpu") -> Inception:
    """The network with the weights of a file. `ArtifactError` when it is missing, damaged, or another network's."""
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(
            f"features.inception: {path}: no such file; FID needs {PUBLISHED} (91 MB): download it from "
            f"{WEIGHTS_URL} and give its path"
        )
    identity = sha256_of(path)
    if path.name == PUBLISHED and not identity.startswith("6726825d"):
        raise ArtifactError(f"{path}: its sha256 begins with {identity[:8]}, not 6726825d: half copied; copy it again")
    return from_state(read_weights(path), str(path), identity).to(device)


def from_state(state: dict[str, Any], where: str, identity: str) -> Inception:
    """The network with these tensors, frozen."""
    model = Inception()
    check_tensors(model, state, where, "FID's Inception (2015-12-05)")
    # The published file also contains counters of batch normalization, which are not used; `check_tensors` has compared
    # all other tensors.
    model.load_state_dict(state, strict=False)
    model.identity = identity
    return model.requires_grad_(False).eval()
