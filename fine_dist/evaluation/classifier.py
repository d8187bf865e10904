"""A small classifier of the images at hand, trained once: features where no published network fits.

Shapes: N images, C channels, H = W pixels, F features (penultimate activations), K classes. Images are in [-1, 1].
For digits (1x8x8) and garments (1x28x28) it replaces Inception: the Fréchet distance is computed on its penultimate
layer, and is called FD-classifier.
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
    """Convolutions with stride 2 down to at most 7 x 7 positions, a hidden layer of `NUM_FEATURES` units, and logits.

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
            raise DataError(f"the classifier takes images of {wanted}, not {given}")
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
    """A classifier and its accuracy on held-out images (0 to 1)."""

    classifier: Classifier
    accuracy: float


TOTAL_SAMPLES = 480_000
"""Training samples of a classifier over all epochs."""
LARGE_SET = 10_000
"""Number of images above which batches are larger and images are not augmented, because there is no overfitting."""


def training_length(images: int) -> tuple[int, int]:
    """(epochs, batch size) for a training set of this size: `TOTAL_SAMPLES` samples, at most 40 epochs."""
    return max(1, min(40, TOTAL_SAMPLES // images)), 100 if images > LARGE_SET else 50


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

    1,500 digits take a few seconds of one core (40 epochs, batches of 50); 60,000 garments a minute or two (8 epochs,
    batches of 100). The result is a deterministic function of the seed: weights, order and augmentation come from one
    generator, and training runs on one thread, because sums over threads round differently. Sets of up to `LARGE_SET`
    images are augmented by small affine maps; otherwise 1,500 digits would be overfitted.

    Args:
        images: Training images.
        labels: Their classes.
        held_out: Images and labels on which the accuracy is measured.
        seed: Seed of all random numbers.
        epochs: Number of epochs. Default: that of `training_length`.
        batch: Batch size. Default: that of `training_length`.

    Raises:
        DataError: Images are not square, or the numbers of images and labels differ.
    """
    shape = tuple(images.shape[1:])
    if len(shape) != 3 or shape[1] != shape[2]:
        raise DataError(f"a classifier takes square images [N, C, H, H], not {list(images.shape)}")
    if not len(images) or len(images) != len(labels) or tuple(held_out[0].shape[1:]) != shape:
        raise DataError(
            f"{len(images)} images of {'x'.join(map(str, shape))}, {len(labels)} labels and held-out images "
            f"{list(held_out[0].shape)} do not fit each other"
        )
    default_epochs, default_batch = training_length(len(images))
    epochs, batch = epochs or default_epochs, batch or default_batch
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
            samples = images[rows] if len(images) > LARGE_SET else _augment(images[rows])
            loss = F.cross_entropy(model.logits(samples), labels[rows], label_smoothing=0.05)
            optim.zero_grad(set_to_none=True)
            loss.backward()
            optim.step()
            schedule.step()


def _augment(images: Tensor, turn: float = 0.2, stretch: float = 0.12, shift: float = 0.15) -> Tensor:
    """Each image under a random affine map of at most `turn` radians, relative `stretch`, and `shift` half widths."""
    num = len(images)
    angle = (torch.rand(num) * 2 - 1) * turn
    scale = 1 + (torch.rand(num, 2) * 2 - 1) * stretch
    move = (torch.rand(num, 2, 1) * 2 - 1) * shift
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(num, 2, 2)
    maps = torch.cat([turned * scale[:, None], move], dim=2)  # N,2,3
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    # grid_sample pads with 0, so images are shifted by 1: outside of an image the result is black, -1
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def classifier_of_shards(folder: str | Path, shards: str, held_out: str | None) -> Trained:
    """The classifier in `folder` if it was trained on these shards; otherwise a new one is trained and saved there.

    Args:
        folder: Folder of the classifier.
        shards: Shards of images (codec identity) to train on.
        held_out: Shards on which the accuracy is measured. Default: every tenth image of `shards`, which is then not
            used for training.

    Raises:
        ConfigError: The shards hold latents of an autoencoder and not images.
        DataError: A sample is damaged.
    """
    manifest = locate(expand_path(shards), DataConfig())[0]
    if manifest.codec != "identity" or manifest.latent_shape[0] not in (1, 3):
        raise ConfigError(
            f"features.classifier: train needs shards of images, and {shards} holds latents of {manifest.codec}; "
            "use --features.inception or --features.dinov2 with --vae FOLDER"
        )
    try:
        saved = json.loads((Path(folder) / _MANIFEST).read_text(encoding="utf-8"))
        if saved["data"] == manifest.hash:
            return load_classifier(folder)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # there is no usable classifier, so one is trained
    images, labels = read_all(expand_path(shards))
    if held_out:
        test_set = read_all(expand_path(held_out))
    else:
        tenth = torch.arange(len(images)) % 10 == 0
        test_set, (images, labels) = (images[tenth], labels[tenth]), (images[~tenth], labels[~tenth])
    trained = train_classifier(images, labels, test_set)
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
    """Read a folder of `save_classifier`. `ArtifactError` when it is missing or damaged, or its hash is wrong."""
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
