"""REPA as a term of a stage's loss: the encoder, the projector around the model, and what both cost."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fine_dist.artifacts.autoencoder import Decoder
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ConfigError
from fine_dist.data.sources import locate
from fine_dist.diffusion.alignment import AlignedModel, RepresentationAlignment
from fine_dist.engine.world import World
from fine_dist.evaluation.dino import DinoV2, load_dino
from fine_dist.model.dit import DiT
from fine_dist.sampling.image_grid import to_uint8
from fine_dist.stages.build import Plan
from fine_dist.stages.settings import StageConfig


def with_alignment(config: StageConfig, plan: Plan, world: World) -> Plan:
    """A plan whose module has a projector and whose loss has the term; the plan itself where `loss.repa` is 0.

    Raises:
        ConfigError: There is no encoder, the method trains no DiT, or nothing decodes the latents.
        ArtifactError: The encoder or the VAE cannot be loaded.
    """
    loss = config.loss
    if not loss.repa:
        return plan
    module = plan.condensation.module
    if not loss.repa_encoder:
        raise ConfigError("loss.repa: give the transformers folder of a DINOv2 with --loss.repa-encoder FOLDER")
    if not isinstance(module, DiT):
        raise ConfigError(
            f"loss.repa: method {plan.method.config.name} trains a {type(module).__name__}, whose blocks' tokens "
            "cannot be aligned; use 0"
        )
    depth = len(module.blocks)
    block = loss.repa_block or max(1, round(depth * 8 / 28))
    if block > depth:
        raise ConfigError(f"loss.repa_block {block}: the model has {depth} blocks; legal: 1..{depth}")
    device = world.device or torch.device("cpu")
    encoder = load_dino(expand_path(loss.repa_encoder), device)
    generator = torch.Generator().manual_seed(config.seed)
    aligned = AlignedModel(module, block - 1, encoder.num_features, loss.repa_width, generator)
    prefix = f"student.{plan.condensation.prefix}"
    term = RepresentationAlignment(LatentEncoder(config, encoder, device), loss.repa)
    extra = aligned.projector_flops() + encoder.token_flops()
    return replace(
        plan,
        condensation=replace(plan.condensation, module=aligned, prefix=prefix),
        terms=(*plan.terms, term),
        extra_flops=plan.extra_flops + extra,
        about={**plan.about, "repa": {"block": block, "weight": loss.repa, "encoder": encoder.identity}},
    )


class LatentEncoder:
    """Clean latents [B, C, H, H] to an image encoder's tokens [B, S, E]: through the VAE, or as the images they are."""

    def __init__(self, config: StageConfig, encoder: DinoV2, device: torch.device) -> None:
        manifest, _ = locate(expand_path(str(config.data.shards)), config.data)
        self.encoder, self.decoder = encoder, None
        if manifest.codec != "identity":
            if not config.vae:
                raise ConfigError("loss.repa: the encoder sees images; give what decodes the latents with --vae FOLDER")
            self.decoder = Decoder(
                config.vae,
                scaling_factor=manifest.scale,
                shift_factor=manifest.shift,
                device=device,
                precision="bf16",
            )

    def __call__(self, latents: Tensor) -> Tensor:
        images = self.decoder.decode(latents) if self.decoder else to_uint8(latents.clamp(-1, 1))
        return self.encoder.tokens(images)
