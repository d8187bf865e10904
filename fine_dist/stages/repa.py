"""REPA as a term of a stage's loss: the encoder, the projector around the model, and what both cost."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fine_dist.artifacts.autoencoder import Decoder
from fine_dist.artifacts.layouts import read_json
from fine_dist.core.config import expand_path
from fine_dist.core.errors import ArtifactError, ConfigError, DataError
from fine_dist.data.manifest import Manifest
from fine_dist.data.sources import locate
from fine_dist.diffusion.alignment import AlignedModel, RepresentationAlignment
from fine_dist.engine.world import World
from fine_dist.evaluation.dino import DinoV2, load_dino
from fine_dist.model.dit import DiT
from fine_dist.sampling.image_grid import to_uint8
from fine_dist.stages.build import Plan
from fine_dist.stages.settings import StageConfig

DINO_B = (768, 346_000_000)
"""Width and bytes of a DINOv2-B, whose size is assumed of an encoder that is not there yet."""


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
    manifest, _ = locate(expand_path(str(config.data.shards)), config.data)
    if not loss.repa_encoder and manifest.tokens is None:
        raise ConfigError(
            "loss.repa: the shards hold no tokens to align with; give the transformers folder of a DINOv2 with "
            "--loss.repa-encoder FOLDER, or encode them once with `fine-dist encode --repa-encoder FOLDER`"
        )
    if not isinstance(module, DiT):
        raise ConfigError(
            f"loss.repa: method {plan.method.config.name} trains a {type(module).__name__}, whose blocks' tokens "
            "cannot be aligned; use 0"
        )
    depth = len(module.blocks)
    # Block 8 of DiT-XL's 28 is the paper's; other depths align at the same share of their depth.
    block = loss.repa_block or max(1, round(depth * 8 / 28))
    if block > depth:
        raise ConfigError(f"loss.repa_block {block}: the model has {depth} blocks; legal: 1..{depth}")
    encode: LatentEncoder | None = None
    if loss.repa_encoder:
        device = world.device or torch.device("cpu")
        encoder = load_dino(expand_path(loss.repa_encoder), device)
        encode = LatentEncoder(config, manifest, encoder, device)
        width, identity, encoder_flops = encoder.num_features, encoder.identity, encoder.token_flops()
    else:
        assert manifest.tokens is not None
        width, identity, encoder_flops = manifest.tokens.shape[0], manifest.tokens.sha256, 0.0
    generator = torch.Generator().manual_seed(config.seed)
    aligned = AlignedModel(module, block - 1, width, loss.repa_width, generator)
    return replace(
        plan,
        condensation=replace(plan.condensation, module=aligned, prefix=f"student.{plan.condensation.prefix}"),
        terms=(*plan.terms, RepresentationAlignment(encode, loss.repa, module.arch.grid)),
        extra_flops=plan.extra_flops + aligned.projector_flops() + encoder_flops,
        reads_tokens=encode is None,
        metadata={**plan.metadata, "repa": {"block": block, "weight": loss.repa, "encoder": identity}},
    )


class LatentEncoder:
    """Clean latents [B, C, H, W] to an image encoder's tokens [B, E, h, w], through the VAE or as images themselves."""

    def __init__(self, config: StageConfig, manifest: Manifest, encoder: DinoV2, device: torch.device) -> None:
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
        return self.encoder.grid_tokens(images)


def encoder_facts(config: StageConfig) -> tuple[int, int]:
    """(width of the image encoder's tokens, bytes of its weights) without loading it, for estimates.

    The bytes are 0 where the shards hold the tokens. What is not there yet is taken for a DINOv2-B.
    """
    if config.loss.repa_encoder:
        folder = Path(expand_path(config.loss.repa_encoder))
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, ArtifactError):
            size = int(read_json(folder / "config.json")["hidden_size"])
            return size, (folder / "model.safetensors").stat().st_size
        return DINO_B
    if config.data.shards:
        with contextlib.suppress(DataError):
            manifest, _ = locate(expand_path(config.data.shards), config.data)
            if manifest.tokens:
                return manifest.tokens.shape[0], 0
    return DINO_B[0], 0
