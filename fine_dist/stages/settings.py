"""Settings of the stages that train. Read without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fine_dist.artifacts.settings import HintsConfig
from fine_dist.core.config import MAX_DEPTH, Config, PathKey, Seed
from fine_dist.core.settings import LaunchConfig
from fine_dist.data.settings import DataConfig
from fine_dist.diffusion.settings import DiffusionConfig, SamplerConfig
from fine_dist.engine.settings import EngineConfig, OptimConfig
from fine_dist.evaluation.settings import QuickConfig
from fine_dist.methods import CONDENSES, AnyMethod
from fine_dist.model.arch import Arch

PRELOAD = (
    "torch.utils.tensorboard",
    "fine_dist.engine.fit",
    "fine_dist.data.stream",
    "fine_dist.diffusion.samplers",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
)
"""Modules that a local process pool imports once for all jobs of a training stage."""


class LossConfig(Config):
    """Weights of the loss terms. Default of each: the method's own weight."""

    diffusion: float | None = Field(None, ge=0)
    """Weight of the diffusion loss; 0 trains by distillation alone."""
    output: float | None = Field(None, ge=0)
    """Weight of the mean squared difference to the ancestor's output."""
    features: float | None = Field(None, ge=0)
    """Weight of the mean squared difference to features of the ancestor's blocks, for methods that define pairs of
    features."""
    repa: float = Field(0.0, ge=0)
    """Weight of REPA's alignment with an image encoder (arXiv 2410.06940), whose paper uses 0.5; 0 leaves it out. The
    encoder's tokens are those in the shards (`encode --repa-encoder`), or those of `repa_encoder`."""
    repa_encoder: PathKey | None = None
    """Local transformers folder of the DINOv2 encoder that supplies the tokens. It runs at every step, after the VAE if
    latents are not images. Default: the tokens that the shards hold."""
    repa_block: int | None = Field(None, ge=1, le=MAX_DEPTH)
    """Number of the block whose output is aligned, counted from 1. Default: the block at 8/28 of the depth, as in the
    paper."""
    repa_width: int = Field(2048, ge=1, le=65_536)
    """Width of the projector's hidden layers. The projector trains with the model and is not part of the artifact."""

    def repa_identity(self) -> dict[str, Any]:
        """The REPA settings that change a run's result, without the encoder's path (JSON values)."""
        settings = self.model_dump(include={"repa", "repa_block", "repa_width"})
        return settings if self.repa_encoder else {**settings, "repa_tokens": "of the shards"}


class StageConfig(Config):
    """Settings that both training stages share."""

    run_dir: PathKey = "runs/run"
    """Folder of everything that the run writes. Running the same command again resumes the run."""
    seed: Seed = 0
    """Random seed of the initialization, the data order, timesteps, noise and label dropout."""
    steps: int = Field(1000, ge=1, le=1_000_000_000)
    """Total number of updates. A finished run continues when it is started again with more steps."""
    batch: int = Field(64, ge=1, le=2**20)
    """Global batch size: samples per update, over all processes and micro-batches."""
    data: DataConfig = DataConfig()
    """Shards of latents for training, and held-out shards for measurements only."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process that the model learns; it must be that of the parent or ancestor."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule of the learning rate."""
    engine: EngineConfig = EngineConfig()
    """Device, precision, checkpoints, EMA and logs."""
    loss: LossConfig = LossConfig()
    """Weights of the loss terms. Default: the method's in stage 1; in stage 3 the diffusion loss with weight 1, and the
    ancestor's output with weight 1 if an ancestor is given."""
    hints: HintsConfig = HintsConfig()
    """Facts about another project's model file that the file does not state."""
    sampler: SamplerConfig = SamplerConfig()
    """Sampler of previews and quick evaluations."""
    vae: PathKey | None = None
    """Folder or hub name of the autoencoder that decodes the latents of previews and quick evaluations."""
    quick: QuickConfig = QuickConfig()
    """Scores of samples while the model trains."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job, where it is submitted."""
    keep_labels: bool = False
    """Use the data's labels as the parent's classes of the same number, although class names or the number of classes
    differ. Default: refuse, because label 0 of the data would continue training the parent's class 0, an unrelated
    class."""


class CondenseConfig(StageConfig):
    """Stage 1: train a learngene, from a trained ancestor or from random factors."""

    run_dir: PathKey = "runs/condense"
    """Folder of this run: logs, checkpoints and, at the end, the learngene in its `learngene/`. The same command again
    resumes the run."""
    arch: Arch | None = None
    """Shape of the model that stage 1 trains. Its depth is ignored where the method has a setting for the depth.
    Default: the ancestor's shape, or DiT-B/2 without an ancestor."""
    method: AnyMethod = CONDENSES
    """Method of stage 1: how layers share weights."""
    ancestor: PathKey | None = None
    """Trained model that stage 1 starts from and imitates: an artifact or run directory of this project, a DiT `.pt`
    file, a diffusers folder, or a name on the hub. Default: none; factors start at random, and stage 1 then takes as
    long as pre-training."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """Initialization of the shell, that is of the embedders and the final layer: `inherited` copies the ancestor's
    where shapes agree, `scratch` draws it at random, as some papers do."""
    ancestor_licence: str | None = None
    """License of the ancestor's weights, for the learngene's manifest. Default: the license that the ancestor
    states."""


class TrainConfig(StageConfig):
    """Stage 3: train a dense DiT with all its weights free, a fresh optimizer and a fresh EMA."""

    run_dir: PathKey = "runs/train"
    """Folder of this run: logs, checkpoints and, at the end, the model in its `model/`."""
    parent: PathKey | None = None
    """Model to start from: an initialized target, a model or a learngene of this project, a DiT `.pt` file, a diffusers
    folder, or a name on the hub. It is trained as it is, or `method` makes a target from it."""
    parents: str | None = None
    """Run directory of a family that `fine-dist init` made. One model is trained from each of its targets, as a fan-out
    with a sub-folder of run_dir for each. Default: train one model."""
    learngene: PathKey | None = None
    """Current location of an initialized target's learngene, if it has moved."""
    arch: Arch | None = None
    """Architecture of the model. Default: the parent's."""
    method: AnyMethod | None = None
    """Method that initializes the weights. Default: the parent's weights, or training from scratch without a parent."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """Initialization of the shell, that is of the embedders and the final layer: `inherited` takes it from the parent
    or method, `scratch` draws it at random, which shows what the blocks alone are worth."""
    ancestor: PathKey | None = None
    """Trained model whose output the model imitates (distillation): an artifact or run directory of this project, a DiT
    `.pt` file, a diffusers folder, or a name on the hub. Default: none; the model trains on the data alone."""
