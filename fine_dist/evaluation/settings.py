"""Settings of everything that measures models: the command `evaluate`, and scores while a model trains. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config, PathKey
from fine_dist.data.settings import DataConfig
from fine_dist.sampling.settings import SamplingSettings

TRAIN = "train"
"""In place of a classifier's folder: train one on the shards at hand and keep it in the run directory."""

Byte = Annotated[int, Field(ge=0, le=255)]


class FeaturesConfig(Config):
    """Where the weights of the feature networks are. A folder alone stands for `classifier`."""

    inception: PathKey | None = None
    """The file pt_inception-2015-12-05-6726825d.pth (91 MB), which FID, sFID, IS, precision, recall and KID need.
    Download it from https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/ and give its path."""
    dinov2: PathKey | None = None
    """A local transformers folder of DINOv2, which FDD needs, such as a download of facebook/dinov2-large."""
    classifier: PathKey | None = None
    """Folder of a classifier trained on the images at hand, whose features FD-classifier compares. `train` trains one
    on `data.shards` in a few minutes and keeps it in the run directory's `classifier/`."""

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, value: Any) -> Any:
        return {"classifier": value} if isinstance(value, str) else value


class EvaluateConfig(SamplingSettings):
    """Measure models, or files of images: the held-out loss, FID, sFID, IS, precision, recall, KID, FDD and the
    Fréchet distance on a classifier's features."""

    models: tuple[PathKey, ...] = ()
    """Models of any source, or the runs that made them; also images: an .npz, a .tar or a folder of pictures."""
    metrics: tuple[str, ...] = ()
    """Any of: held_out_loss fid sfid is precision recall kid fdd fd_classifier accuracy (of the classes of samples, by
    the classifier). Default: held_out_loss if data.held_out is given, and fd_classifier if features.classifier is."""
    protocol: Literal["subset", "adm"] = "subset"
    """Which images precision, recall and KID see. `subset`: 10,000 of each side, drawn at random by `seed` (all where
    there are fewer). `adm`: every sample against 10,000 reference images, and Inception Score over consecutive parts,
    as ADM's evaluation script does with 50,000 samples; use it to compare with numbers from the literature."""
    run_dir: PathKey = "runs/evaluate"
    """Folder of evaluate.json. Numbers of another protocol get a file of their own beside it."""
    samples: int = Field(500, ge=2, le=10_000_000)
    """Images that are drawn from each model, classes in turn. Published FIDs use 50,000."""
    reference: PathKey | None = None
    """Real images (.npz, .tar, folder of pictures) or their statistics (ADM's .npz). Default: those of data.shards."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green and blue (0 to 255) under transparent pictures, as for `encode`."""
    features: FeaturesConfig = FeaturesConfig()
    """Weights of the feature networks; a folder alone is a classifier's."""
    data: DataConfig = DataConfig()
    """`held_out` is what the held-out loss is measured on; `shards` are the real images without a `reference`."""


class QuickConfig(Config):
    """Scores of a few samples of the averaged weights while a model trains, by the same code as `evaluate`."""

    every: int = Field(0, ge=0, le=1_000_000_000)
    """Steps between two quick evaluations; each happens at the next held-out measurement (engine.eval_every) and at
    the end. 0 turns them off."""
    samples: int = Field(2048, ge=2, le=10_000_000)
    """Images that are drawn each time, with the same noise and classes every time."""
    metrics: tuple[str, ...] = ()
    """Any of: fid sfid is precision recall kid fdd fd_classifier. Default: fd_classifier."""
    features: FeaturesConfig = FeaturesConfig()
    """Weights of the feature networks; a folder alone is a classifier's."""
    reference: PathKey | None = None
    """Real images or their statistics. Default: those of data.shards."""
