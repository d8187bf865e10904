"""Settings of everything that measures models: the command `evaluate`, and scores while a model trains. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fine_dist.core.config import Config, PathKey
from fine_dist.data.settings import DataConfig
from fine_dist.sampling.settings import SamplingSettings

TRAIN = "train"
"""Value of `features.classifier` that trains a classifier on the shards and saves it in the run directory."""

Byte = Annotated[int, Field(ge=0, le=255)]


class FeaturesConfig(Config):
    """Paths of the weights of feature networks. A plain path is that of `classifier`."""

    inception: PathKey | None = None
    """The file pt_inception-2015-12-05-6726825d.pth (91 MB), which FID, sFID, IS, precision, recall and KID need.
    Download it from https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/ and give its path."""
    dinov2: PathKey | None = None
    """Local transformers folder of DINOv2, for FDD, such as a download of facebook/dinov2-large."""
    classifier: PathKey | None = None
    """Folder of a classifier trained on the same kind of images, for FD-classifier. `train` trains one on `data.shards`
    in a few minutes and saves it in `classifier/` of the run directory."""

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, value: Any) -> Any:
        return {"classifier": value} if isinstance(value, str) else value


class EvaluateConfig(SamplingSettings):
    """Measure models, or files of images: the held-out loss, FID, sFID, IS, precision, recall, KID, FDD and the
    Fréchet distance on a classifier's features."""

    models: tuple[PathKey, ...] = ()
    """Models of any source or their run directories; also sets of images: an .npz, a .tar or a folder of images."""
    metrics: tuple[str, ...] = ()
    """Any of: held_out_loss fid sfid is precision recall kid fdd fd_classifier accuracy (of the classes of samples, by
    the classifier). Default: held_out_loss if data.held_out is given, and fd_classifier if features.classifier is."""
    protocol: Literal["subset", "adm"] = "subset"
    """Images for precision, recall and KID. `subset`: 10,000 samples and 10,000 real images, drawn at random by `seed`
    (all if there are fewer). `adm`: all samples against 10,000 reference images, and Inception Score over consecutive
    parts, as in ADM's evaluation script with 50,000 samples; use it to compare with published numbers."""
    run_dir: PathKey = "runs/evaluate"
    """Folder of evaluate.json. Numbers of another protocol are written to a separate file."""
    samples: int = Field(500, ge=2, le=10_000_000)
    """Number of images sampled from each model, cycling through the classes. Published FIDs use 50,000."""
    reference: PathKey | None = None
    """Real images (.npz, .tar, folder of images) or their statistics (ADM's .npz). Default: those of data.shards."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Background color of transparent images: red, green and blue from 0 to 255, as in `encode`."""
    features: FeaturesConfig = FeaturesConfig()
    """Weights of the feature networks; a plain path is that of a classifier."""
    data: DataConfig = DataConfig()
    """`held_out`: shards of the held-out loss. `shards`: shards of the real images if no `reference` is given."""


class QuickConfig(Config):
    """Scores of a few samples of the averaged weights while a model trains, by the same code as `evaluate`."""

    every: int = Field(0, ge=0, le=1_000_000_000)
    """Steps between two quick evaluations; each happens at the next held-out measurement (engine.eval_every) and at
    the end. 0 turns them off."""
    samples: int = Field(2048, ge=2, le=10_000_000)
    """Number of images sampled each time, always with the same noise and classes."""
    metrics: tuple[str, ...] = ()
    """Any of: fid sfid is precision recall kid fdd fd_classifier. Default: fd_classifier."""
    features: FeaturesConfig = FeaturesConfig()
    """Weights of the feature networks; a plain path is that of a classifier."""
    reference: PathKey | None = None
    """Real images or their statistics. Default: the images of data.shards."""
