"""The features of the embedded data set: a small classifier of 1x8x8 digits, trained once by the demo.

Shapes: N images, F features (penultimate activations), K classes. Images are [N, 1, 8, 8] in [-1, 1].
It stands where Inception stands for photographs: the Fréchet distance is measured on its penultimate layer.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fine_dist.errors import ArtifactError, DataError
from fine_dist.metrics.moments import Moments

NUM_FEATURES = 64
_TENSORS, _MANIFEST = "classifier.safetensors", "classifier.json"


class DigitsClassifier(nn.Module):
    """Two convolutions, one hidden layer of `NUM_FEATURES`, ten logits; 72K parameters."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 64, 3, padding=1, stride=2)
        self.hidden = nn.Linear(64 * 4 * 4, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """[N, F] float32: the penultimate activations of images [N, 1, 8, 8]."""
        x = F.relu(self.conv1(images.float()))  # N,16,8,8
        x = F.relu(self.conv2(x))  # N,64,4,4
        return F.relu(self.hidden(x.flatten(1)))  # N,F

    def logits(self, images: Tensor) -> Tensor:
        """[N, K] float32."""
        return self.head(self.features(images))

    forward = logits

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The fraction of images that get their label."""
        return float((self.logits(images).argmax(dim=1) == labels).double().mean())

    @torch.no_grad()
    def moments(self, images: Tensor, batch: int = 512) -> Moments:
        """Float64 moments of the features, for `frechet_distance`."""
        total = Moments.empty(NUM_FEATURES)
        for part in images.split(batch):
            total.update(self.features(part))
        return total


class Trained(NamedTuple):
    """A classifier and how well it does on images it never saw (0..1)."""

    classifier: DigitsClassifier
    accuracy: float


def train_classifier(
    images: Tensor, labels: Tensor, held_out: tuple[Tensor, Tensor], *, seed: int = 0, epochs: int = 40
) -> Trained:
    """Train on images [N, 1, 8, 8] in [-1, 1] and labels [N] int64; a few seconds on one core.

    Deterministic by seed: weights, order and jitter come from one generator, and it runs on one thread, because
    sums over threads round differently. Each image is turned, stretched and moved a little every time, or 1,500 digits
    are learned by heart.
    """
    if images.shape[1:] != (1, 8, 8):
        raise DataError(f"the digits classifier takes images of 1x8x8, not {'x'.join(map(str, images.shape[1:]))}")
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    try:
        model = DigitsClassifier(max(10, int(labels.max()) + 1))
        _train(model, images.float().cpu(), labels.cpu(), epochs)
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(threads)
    model.requires_grad_(False).eval()
    return Trained(model, model.accuracy(*held_out))


def _train(model: DigitsClassifier, images: Tensor, labels: Tensor, epochs: int, batch: int = 50) -> None:
    optim = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, epochs * -(-len(images) // batch))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(_jitter(images[rows])), labels[rows], label_smoothing=0.05)
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


def save_classifier(folder: str | Path, trained: Trained, *, seed: int = 0) -> Path:
    """Write the classifier as safetensors and JSON (accuracy, seed, sha256); returns the folder."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blob = save({key: value.contiguous() for key, value in trained.classifier.state_dict().items()})
    manifest = {
        "kind": "digits_classifier",
        "num_features": NUM_FEATURES,
        "num_classes": trained.classifier.head.out_features,
        "held_out_accuracy": trained.accuracy,
        "seed": seed,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    (folder / _TENSORS).write_bytes(blob)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder


def load_classifier(folder: str | Path) -> Trained:
    """Read what `save_classifier` wrote. `ArtifactError` when it is missing or its hash is wrong."""
    from safetensors.torch import load

    folder = Path(folder)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        blob = (folder / _TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"no digits classifier in {folder} ({error}); run the demo, which trains it") from None
    found = hashlib.sha256(blob).hexdigest()
    if manifest.get("kind") != "digits_classifier" or found != manifest.get("sha256"):
        raise ArtifactError(
            f"{folder / _TENSORS}: sha256 is {found[:12]}…, the manifest says {str(manifest.get('sha256'))[:12]}…; "
            "delete the folder and run the demo again"
        )
    model = DigitsClassifier(int(manifest["num_classes"]))
    model.load_state_dict(load(blob))
    model.requires_grad_(False).eval()
    return Trained(model, float(manifest["held_out_accuracy"]))
