"""A small classifier of the images at hand, trained once: features where no published network fits.

Shapes: N images, C channels, H = W pixels, F features (penultimate activations), K classes. Images are in [-1, 1].
For digits (1x8x8) and garments (1x28x28) it stands where Inception stands for photographs: the Fréchet distance is
measured on its penultimate layer, and is called FD-classifier.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError, ConfigError, DataError
from fine_dist.core.files import write_atomic
from fine_dist.core.json_files import read_json
from fine_dist.core.regular_files import read_bytes
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import locate
from fine_dist.data.stream import read_all
from fine_dist.evaluation.feature_network import Extracted, as_signed
from fine_dist.evaluation.moments import Moments

NUM_FEATURES = 64
_TENSORS, _MANIFEST, _KIND = "classifier.safetensors", "classifier.json", "classifier"


class Classifier(nn.Module):
    """A convolution, as many with stride 2 as leave at most 7 x 7 places, a hidden layer of `NUM_FEATURES`, logits.

    76K parameters for digits of 1x8x8, 211K for garments of 1x28x28. It is a `feature_network.Features`:
    `classifier(images) -> Extracted` with the hidden layer's activations and the logits.
    """

    name, distance, num_features = "classifier", "FD-classifier", NUM_FEATURES

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), num_classes: int = 10) -> None:
        super().__init__()
        self.shape, self.identity = shape, ""
        channels, side = shape[0], shape[1]
        first = 2 if side > 16 else 1
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, stride=first)
        self.conv2 = nn.Conv2d(16, 64, 3, padding=1, stride=2)
        side, further = -(-side // (2 * first)), []
        while side > 7:
            further.append(nn.Conv2d(64, 64, 3, padding=1, stride=2))
            side = -(-side // 2)
        self.further = nn.ModuleList(further)
        self.hidden = nn.Linear(64 * side * side, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """[N, F] float32: the penultimate activations of images [N, C, H, W]. `DataError` for another shape."""
        if tuple(images.shape[1:]) != self.shape:
            wanted, given = ("x".join(map(str, shape)) for shape in (self.shape, images.shape[1:]))
            raise DataError(f"the classifier knows images of {wanted}, not {given}")
        x = F.relu(self.conv1(as_signed(images)))  # N,16,...
        x = F.relu(self.conv2(x))  # N,64,...
        for conv in self.further:
            x = F.relu(conv(x))
        return F.relu(self.hidden(x.flatten(1)))  # N,F

    def logits(self, images: Tensor) -> Tensor:
        """[N, K] float32."""
        return self.head(self.features(images))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Extracted:
        pooled = self.features(images.to(self.head.weight.device))
        return Extracted(pooled, None, self.head(pooled))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor, batch: int = 1024) -> float:
        """The fraction of images that get their label."""
        right = [self.logits(x).argmax(dim=1) == y for x, y in zip(images.split(batch), labels.split(batch))]
        return float(torch.cat(right).double().mean())

    @torch.no_grad()
    def moments(self, images: Tensor, batch: int = 512) -> Moments:
        """Float64 moments of the features, for `frechet_distance`."""
        total = Moments.empty(NUM_FEATURES)
        for part in images.split(batch):
            total.update(self.features(part))
        return total


class Trained(NamedTuple):
    """A classifier and how well it does on images it never saw (0..1)."""

    classifier: Classifier
    accuracy: float


ENOUGH_SHOWN = 480_000
"""Images that a classifier is shown in all, repeats counted."""
MANY = 10_000
"""Images from which batches are larger, and none is learned by heart: they are shown as they are."""


def effort(images: int) -> tuple[int, int]:
    """(epochs, images a batch) for a training set of this size: `ENOUGH_SHOWN` images in all, at most 40 epochs."""
    return max(1, min(40, ENOUGH_SHOWN // images)), 100 if images > MANY else 50


def train_classifier(
    images: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    seed: int = 0,
    epochs: int | None = None,
    batch: int | None = None,
) -> Trained:
    """Train on images [N, C, H, H] in [-1, 1] and labels [N] int64.

    epochs, batch: none: those of `effort`.
    1,500 digits take a few seconds of one core (40 epochs of 50); 60,000 garments a minute or two (8 epochs of 100).

    Deterministic by seed: weights, order and jitter come from one generator, and it runs on one thread, because
    sums over threads round differently. Up to `MANY` images are turned, stretched and moved a little every time, or
    1,500 digits are learned by heart. `DataError` for images that are not square, not finite, or without a label each.
    """
    shape = tuple(images.shape[1:])
    if len(shape) != 3 or shape[1] != shape[2]:
        raise DataError(f"a classifier takes square images [N, C, H, H], not {list(images.shape)}")
    if not len(images) or len(images) != len(labels) or tuple(held_out[0].shape[1:]) != shape:
        raise DataError(
            f"{len(images)} images of {'x'.join(map(str, shape))}, {len(labels)} labels and held-out images "
            f"{list(held_out[0].shape)} do not fit each other"
        )
    usual = effort(len(images))
    epochs, batch = epochs or usual[0], batch or usual[1]
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        model = Classifier((shape[0], shape[1], shape[2]), max(10, int(labels.max()) + 1))
        _train(model, as_signed(images).cpu(), labels.cpu(), epochs, batch)
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(threads)
    model.requires_grad_(False).eval()
    model.identity = hashlib.sha256(_blob(model)).hexdigest()
    return Trained(model, model.accuracy(*held_out))


def _train(model: Classifier, images: Tensor, labels: Tensor, epochs: int, batch: int) -> None:
    optim = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            shown = images[rows] if len(images) > MANY else _jitter(images[rows])
            loss = F.cross_entropy(model.logits(shown), labels[rows], label_smoothing=0.05)
            optim.zero_grad(set_to_none=True)
            loss.backward()
            optim.step()
            schedule.step()


def _jitter(images: Tensor, turn: float = 0.2, stretch: float = 0.12, shift: float = 0.15) -> Tensor:
    """Images moved by a small random affine map each: radians, relative size, fraction of the half width."""
    num = len(images)
    angle = (torch.rand(num) * 2 - 1) * turn
    scale = 1 + (torch.rand(num, 2) * 2 - 1) * stretch
    move = (torch.rand(num, 2, 1) * 2 - 1) * shift
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(num, 2, 2)
    maps = torch.cat([turned * scale[:, None], move], dim=2)  # N,2,3
    where = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, where, align_corners=False) - 1  # what is outside an image is black, -1


def classifier_of_shards(folder: str | Path, shards: str, held_out: str | None) -> Trained:
    """The classifier in `folder` when it was trained on these shards; else one is trained and kept there.

    Args:
        folder: Where it is kept.
        shards: Shards of pictures (codec identity) to train on.
        held_out: Shards that its accuracy is measured on. Default: every tenth picture of `shards`, which is then not
            trained on.

    Raises:
        ConfigError: When the shards hold an autoencoder's latents, not pictures.
        DataError: When a sample is damaged.
    """
    manifest = locate(expand_path(shards), DataConfig())[0]
    if manifest.codec != "identity" or manifest.latent_shape[0] not in (1, 3):
        raise ConfigError(
            f"features.classifier: train needs shards of pictures, and {shards} holds latents of {manifest.codec}; "
            "use --features.inception or --features.dinov2 with --vae FOLDER"
        )
    try:
        manifest_there = json.loads((Path(folder) / _MANIFEST).read_text(encoding="utf-8"))
        if manifest_there["data"] == manifest.hash:
            return load_classifier(folder)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # nothing usable is there: it is trained now
    images, labels = read_all(expand_path(shards))
    if held_out:
        others = read_all(expand_path(held_out))
    else:
        tenth = torch.arange(len(images)) % 10 == 0
        others, (images, labels) = (images[tenth], labels[tenth]), (images[~tenth], labels[~tenth])
    trained = train_classifier(images, labels, others)
    save_classifier(folder, trained, data=manifest.hash)
    return trained


def save_classifier(folder: str | Path, trained: Trained, *, seed: int = 0, data: str | None = None) -> Path:
    """Write the classifier as safetensors and JSON (shape, accuracy, seed, sha256); returns the folder.

    Args:
        data: Hash of the shards that it was trained on, where it was trained on shards.
    """
    folder, model = Path(folder), trained.classifier
    blob = _blob(model)
    manifest = {
        "kind": _KIND,
        "shape": model.shape,
        "num_features": NUM_FEATURES,
        "num_classes": model.head.out_features,
        "held_out_accuracy": trained.accuracy,
        "seed": seed,
        "data": data,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    write_atomic(folder / _TENSORS, blob)
    write_atomic(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return folder


def load_classifier(folder: str | Path) -> Trained:
    """Read what `save_classifier` wrote. `ArtifactError` when it is missing, damaged, or its hash is wrong."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / _MANIFEST, ArtifactError, "delete the folder, and train a classifier again")
        blob = read_bytes(folder / _TENSORS)
    except OSError as error:
        raise ArtifactError(
            f"features.classifier: no classifier in {folder} ({error}); --features.classifier train trains one on "
            "data.shards"
        ) from None
    digest = hashlib.sha256(blob).hexdigest()
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise ArtifactError(
            f"{folder / _MANIFEST} describes no classifier; delete the folder and use --features.classifier train"
        )
    if digest != manifest.get("sha256"):
        raise ArtifactError(
            f"{folder / _TENSORS}: sha256 is {digest[:12]}…, the manifest says {str(manifest.get('sha256'))[:12]}…; "
            "delete the folder and use --features.classifier train"
        )
    try:
        channels, height, width = manifest["shape"]
        model = Classifier((int(channels), int(height), int(width)), int(manifest["num_classes"]))
        model.load_state_dict(load(blob))
        accuracy = float(manifest["held_out_accuracy"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder / _MANIFEST} does not fit its tensors: {str(error)[:200]}") from None
    model.requires_grad_(False).eval()
    model.identity = digest
    return Trained(model, accuracy)


def _blob(model: Classifier) -> bytes:
    return save({key: value.contiguous() for key, value in model.state_dict().items()})
