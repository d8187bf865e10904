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
    "fine_dist.engine.loop",
    "fine_dist.data.stream",
    "fine_dist.diffusion.samplers",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.schedulers.scheduling_dpmsolver_multistep",
)
"""What a local pool imports once for all jobs of a stage that trains."""


class LossConfig(Config):
    """Weights of the terms of stage 1's loss; none: what the method says."""

    diffusion: float | None = Field(None, ge=0)
    """Noise prediction; 0 is pure distillation."""
    output: float | None = Field(None, ge=0)
    """Mean squared difference to the ancestor's full output."""
    features: float | None = Field(None, ge=0)
    """Mean squared difference to features of the ancestor's blocks, where the method names some."""
    repa: float = Field(0.0, ge=0)
    """Weight of REPA's alignment with an image encoder (arXiv 2410.06940), whose paper uses 0.5; 0 leaves it out. The
    encoder's tokens are those in the shards (`encode --repa-encoder`), or those of `repa_encoder`."""
    repa_encoder: PathKey | None = None
    """Local transformers folder of the DINOv2 whose tokens are aligned with. It runs at every step, and the VAE before
    it where latents are not images. Default: the tokens that the shards hold."""
    repa_block: int | None = Field(None, ge=1, le=MAX_DEPTH)
    """Number of the block, counted from 1, whose output is aligned. Default: the one at 8/28 of the depth, as in the
    paper."""
    repa_width: int = Field(2048, ge=1, le=65_536)
    """Width of the projector's hidden layers, which train beside the model and are dropped at the end."""

    def repa_identity(self) -> dict[str, Any]:
        """What of REPA changes a run, wherever the encoder lies; JSON."""
        found = self.model_dump(include={"repa", "repa_block", "repa_width"})
        return found if self.repa_encoder else {**found, "repa_tokens": "of the shards"}


class StageConfig(Config):
    """Settings of a stage that trains."""

    run_dir: PathKey = "runs/run"
    """Folder of everything that the run writes. The same command again continues what is there."""
    seed: Seed = 0
    """Seeds the initialization, the order of the data, times, noise and dropped labels."""
    steps: int = Field(1000, ge=1, le=1_000_000_000)
    """Updates in all. A finished run continues when it is started again with more."""
    batch: int = Field(64, ge=1, le=2**20)
    """Samples of an update, over all processes and micro-batches."""
    data: DataConfig = DataConfig()
    """Shards of latents to train on, and held-out shards that are only measured on."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """The diffusion process that the model learns; it must be that of the parent or ancestor."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule of the learning rate."""
    engine: EngineConfig = EngineConfig()
    """Device, precision, checkpoints, averages and logs."""
    loss: LossConfig = LossConfig()
    """Weights of the terms of the loss. Default: in stage 1 those of the method; in stage 3 noise prediction, and the
    ancestor's output where one is given, with weight 1 each."""
    hints: HintsConfig = HintsConfig()
    """What another project's file does not say of itself."""
    sampler: SamplerConfig = SamplerConfig()
    """How previews in TensorBoard and quick evaluations are sampled."""
    vae: PathKey | None = None
    """Folder or hub name of the autoencoder that decodes those pictures, and what a quick evaluation draws."""
    quick: QuickConfig = QuickConfig()
    """Scores of samples while the model trains."""
    launch: LaunchConfig = LaunchConfig()
    """Resources of the job, where it is submitted."""
    keep_labels: bool = False
    """Use labels of the data as the parent's classes of the same numbers, although class names or their number differ.
    Default: refuse, because label 0 of the data would continue as class 0 of the parent, whatever that shows."""


class CondenseConfig(StageConfig):
    """Stage 1: train a learngene, from a trained ancestor or from random factors."""

    run_dir: PathKey = "runs/condense"
    """Folder of this run: logs, checkpoints and, at the end, the learngene in its `learngene/`. The same command again
    resumes the run."""
    arch: Arch | None = None
    """Shape of the model that stage 1 trains. Its depth is ignored where the method has a setting for the depth.
    Default: the ancestor's shape, or DiT-B/2 without an ancestor."""
    method: AnyMethod = CONDENSES
    """How layers share weights."""
    ancestor: PathKey | None = None
    """Trained model that stage 1 starts from and imitates: a folder or run directory of ours, DiT's `.pt`, a folder of
    diffusers, or a name on the hub. Default: none; factors start at random and need a stage 1 as long as a whole
    pre-training."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """Start of what lies outside the blocks (embedders, final layer): `inherited` copies the ancestor's where shapes
    agree, `scratch` draws them at random, as some papers do."""
    ancestor_licence: str | None = None
    """License of the ancestor's weights, kept in the learngene's manifest. Default: the one that it states."""


class TrainConfig(StageConfig):
    """Stage 3: train a dense DiT with all its weights free, a fresh optimizer and a fresh EMA."""

    run_dir: PathKey = "runs/train"
    """Where everything is written; the model lands in its `model/`."""
    parent: PathKey | None = None
    """An initialized target, a model or a learngene, of ours or another project's (DiT's `.pt`, a folder of diffusers,
    a name on the hub): trained as it is, or what `method` makes a target of."""
    parents: str | None = None
    """Run directory of a family that `fine-dist init` made. One model is trained from each of its targets, as a fan-out
    with a folder of run_dir for each; none trains one model."""
    learngene: PathKey | None = None
    """Where the learngene of an initialized target lies now, when it has moved."""
    arch: Arch | None = None
    """Architecture; none: that of the parent."""
    method: AnyMethod | None = None
    """How the weights begin; none: as in the parent, or from scratch where there is no parent."""
    shell: Literal["inherited", "scratch"] = "inherited"
    """What is outside the blocks (embedders, final layer) begins as the parent or method has it, or from scratch: what
    the blocks alone are worth."""
    ancestor: PathKey | None = None
    """Trained model whose output the model imitates while it trains (distillation): a folder or run directory of ours,
    DiT's `.pt`, a folder of diffusers, or a name on the hub. Default: none, training on the data alone."""
