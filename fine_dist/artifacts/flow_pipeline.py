# mypy: disable-error-code="attr-defined"
"""A diffusers pipeline for DiTs that were trained by flow matching.

This file is copied into exported folders as `pipeline.py`, so it imports only diffusers and torch. Load a folder with
`DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`.

Shapes: N images, C latent channels, h, w height and width of a latent, H, W height and width of an image.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FlowDiTPipeline(DiTPipeline):
    """Samples class-conditional images from a DiT that predicts velocities, with Euler's method.

    Args:
        transformer: The DiT.
        vae: The autoencoder of its latents.
        scheduler: The scheduler, with the shift of the noise levels.
        id2label: Class names by label.
        direction: `noise_to_data` if the model's time 0 is noise (SiT), `data_to_noise` if it is data.
        time_scale: Factor by which the model's time in [0, 1] is multiplied.
        frequency_shift: 0 for DiT's time frequencies, 1 for those of diffusers.
        null_label: The label that stands for no class in guidance.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        id2label: dict[int, str] | None = None,
        direction: str = "noise_to_data",
        time_scale: float = 1.0,
        frequency_shift: int = 0,
        null_label: int = 1000,
    ):
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_to_config(
            direction=direction, time_scale=time_scale, frequency_shift=frequency_shift, null_label=null_label
        )
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = frequency_shift

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per label.

        Args:
            class_labels: N labels.
            guidance_scale: Scale of classifier-free guidance; 1 is no guidance.
            generator: Random generator of the noise, or one per image.
            num_inference_steps: Number of Euler steps.
            output_type: `pil`, `np` [N, H, W, 3], `pt` [N, 3, H, W], both in [0, 1], or `latent` [N, C, h, w].
            return_dict: Return an `ImagePipelineOutput` instead of a tuple.
        """
        device, config = self._execution_device, self.transformer.config
        labels = torch.tensor(class_labels, device=device).reshape(-1)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        levels = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        self.scheduler.set_timesteps(sigmas=levels, device=device)
        for i, step in enumerate(self.progress_bar(self.scheduler.timesteps)):
            velocity = self._velocity(latents, self.scheduler.sigmas[i], labels, guidance_scale)
            latents = self.scheduler.step(velocity, step, latents, return_dict=False)[0]
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, z: torch.Tensor, level: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        """Return dz/d(level) [N, C, h, w] with guidance, for latents z at a noise level in [0, 1]."""
        # The scheduler integrates over the noise level, which is the model's time or 1 minus it.
        forward = self.config.direction == "data_to_noise"
        time = self.config.time_scale * (level if forward else 1 - level)
        if scale != 1:
            z, labels = torch.cat([z, z]), torch.cat([labels, torch.full_like(labels, self.config.null_label)])
        out = self.transformer(z, timestep=time.to(z.device).expand(len(z)), class_labels=labels).sample
        out = out[:, : z.shape[1]]  # without the channels of a learned variance
        if scale != 1:
            labelled, free = out.chunk(2)
            out = free + scale * (labelled - free)
        return out if forward else -out

    def _decode(self, latents: torch.Tensor, output_type: str):
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        images = self.vae.decode(latents / self.vae.config.scaling_factor + shift).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
