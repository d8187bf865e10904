"""The one path from a batch to losses: draw, ask the model, then weighted terms. The loop and packs both take it.

Terms: noise prediction with the learned variance's bound (Improved DDPM, arXiv 2102.09672), and two kinds of
distillation from a teacher: its full output, and features of its blocks.

Shapes: B batch, C latent channels, H latent side, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fine_dist.diffusion.process import Draws, NoiseSchedule, PrefetchedDraws, draw
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT, ModelOutput

Model = Callable[[Tensor, Tensor, Tensor], "Tensor | ModelOutput"]
"""`(z_t [B, C, H, H], t [B], y [B])` -> the output, or an `ModelOutput` where a term looks at features."""


class LatentBatch(Protocol):
    """What a loss needs of a batch (`fine_dist.data.stream.Batch`)."""

    @property
    def step(self) -> int: ...
    @property
    def latents(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


@dataclass(frozen=True)
class NoisedBatch:
    """What a model is asked in a step: clean and noised latents and the noise [B, C, H, H], timesteps, labels [B]."""

    z: Tensor
    z_t: Tensor
    eps: Tensor
    t: Tensor
    y: Tensor
    """Labels; the null label where they were dropped."""


class LossTerm(Protocol):
    """A part of the loss: `term(question, answer) -> [B]` fp32, counted `weight` times. Weight 0 is not computed."""

    weight: float

    @property
    def name(self) -> str: ...

    def __call__(self, question: NoisedBatch, answer: ModelOutput) -> Tensor: ...


class Objective:
    """The losses of a batch: `objective(model, batch) -> [B]` float32, a weighted sum of terms.

    num_classes: the null label, which dropped labels become. terms: none is noise prediction alone.
    ahead:       the next step is drawn by a thread while this one computes; off where a thread asks already.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        arch: Arch,
        seed: int,
        terms: Sequence[LossTerm] = (),
        num_classes: int | None = None,
        ahead: bool = True,
    ):
        self.null = arch.num_classes if num_classes is None else num_classes
        self.draws: Callable[..., Draws] = partial(
            draw,
            seed,
            shape=arch.latent_shape,
            num_timesteps=config.num_timesteps,
            label_drop=config.label_drop,
        )
        if ahead:
            self.draws = PrefetchedDraws(self.draws)
        self.schedule = NoiseSchedule(config)
        self.terms = [term for term in terms or (DiffusionLoss(self.schedule),) if term.weight]

    def __call__(self, model: Model, batch: LatentBatch) -> Tensor:
        question = self.sample_noise(batch)
        return self.losses(question, model(question.z_t, question.t, question.y))

    def sample_noise(self, batch: LatentBatch) -> NoisedBatch:
        """The question of a batch, on the batch's device; drawn from (seed, step, position) alone."""
        device = batch.latents.device
        draws = self.draws(batch.step, batch.positions, pin=device.type == "cuda")
        t, eps, drop = (x.to(device, non_blocking=True) for x in (draws.t, draws.noise, draws.drop))
        self.schedule.to(device)
        z_t = self.schedule.add_noise(batch.latents, t, eps)
        return NoisedBatch(batch.latents, z_t, eps, t, torch.where(drop, self.null, batch.labels))

    def losses(self, question: NoisedBatch, out: Tensor | ModelOutput) -> Tensor:
        """The weighted sum of all terms, [B]."""
        answer = out if isinstance(out, ModelOutput) else ModelOutput(out, {})
        total: Tensor | None = None
        for term in self.terms:
            loss = term(question, answer)
            loss = loss if term.weight == 1 else term.weight * loss
            total = loss if total is None else total + loss
        if total is None:
            raise ValueError("an objective needs a term whose weight is not 0")
        return total


# --- terms -----------------------------------------------------------------------------------------------------------


class DiffusionLoss:
    """Noise prediction, and the variance's bound when the model predicts one."""

    name = "diffusion"

    def __init__(self, schedule: NoiseSchedule, weight: float = 1.0):
        self.schedule, self.weight = schedule, weight

    def __call__(self, question: NoisedBatch, answer: ModelOutput) -> Tensor:
        q = question
        return per_sample(self.schedule, answer.out.float(), q.z, q.z_t, q.t, q.eps)


class Teacher:
    """A frozen model, asked once a question however many terms imitate it.

    model:  a DiT of the student's latent shape and classes, of any depth and width; put into eval mode and frozen here.
    blocks: whose features are wanted.
    """

    def __init__(self, model: DiT, blocks: Sequence[int] = ()):
        self.model, self.blocks = model.eval().requires_grad_(False), tuple(blocks)
        self._last: tuple[NoisedBatch, ModelOutput] | None = None

    @torch.no_grad()
    def __call__(self, question: NoisedBatch) -> ModelOutput:
        if self._last is None or self._last[0] is not question:
            asked = (question.z_t.to(self.model.patch.weight.dtype), question.t, question.y)
            answer = (
                self.model.forward_with_features(*asked, self.blocks)
                if self.blocks
                else ModelOutput(self.model(*asked), {})
            )
            self._last = (question, answer)
        return self._last[1]


class OutputDistillation:
    """The mean squared difference to the teacher's full output, variance channels included where both have them."""

    name = "output"

    def __init__(self, teacher: Teacher, weight: float = 1.0):
        self.teacher, self.weight = teacher, weight

    def __call__(self, question: NoisedBatch, answer: ModelOutput) -> Tensor:
        wanted, out = self.teacher(question).out.float(), answer.out.float()
        channels = min(wanted.shape[1], out.shape[1])
        return (out[:, :channels] - wanted[:, :channels]).square().flatten(1).mean(1)


class FeatureDistillation:
    """The mean squared difference of features, averaged over pairs of the student's and the teacher's.

    pairs: (student's feature, teacher's feature), named as in `ModelOutput.features`; the student's are already at
           the teacher's width by what trains (`model.maps.Mapped`). An answer may hold the features of some pairs
           only, where a step trains a part of the model: the mean is over those.
    """

    name = "features"

    def __init__(self, teacher: Teacher, pairs: Sequence[tuple[str, str]], weight: float = 1.0):
        self.teacher, self.pairs, self.weight = teacher, tuple(pairs), weight

    def __call__(self, question: NoisedBatch, answer: ModelOutput) -> Tensor:
        wanted = self.teacher(question).features
        parts = [
            (answer.features[ours].float() - wanted[theirs].float()).square().flatten(1).mean(1)
            for ours, theirs in self.pairs
            if ours in answer.features
        ]
        if not parts:
            raise ValueError(f"the answer has features {sorted(answer.features)}, and no pair names one of them")
        return torch.stack(parts).mean(0)


# --- noise prediction ------------------------------------------------------------------------------------------------


def per_sample(schedule: NoiseSchedule, out: Tensor, z: Tensor, z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """`||eps - eps_theta||^2 / size` for each sample, plus the variance's bound when the model predicts one.

    The hybrid objective weighs the bound (in nats, a sum over T timesteps) by 0.001; with T = 1000 and a uniform t that
    is the bound's own term at t. DiT measures it in bits, and so do we. The mean is held fixed inside it.
    """
    channels = z.shape[1]
    losses = (out[:, :channels] - eps).square().flatten(1).mean(1)
    if out.shape[1] == 2 * channels:
        losses = losses + variance_bound(schedule, out, z, z_t, t)
    return losses


def variance_bound(schedule: NoiseSchedule, out: Tensor, z: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """KL(q(z_{t-1} | z_t, z_0) || p_theta(z_{t-1} | z_t)) in bits a dimension, [B]; at t = 0 the decoder's."""
    eps_hat, v = out.detach()[:, : z.shape[1]], out[:, z.shape[1] :]
    start = (z_t - schedule.at("noise", t) * eps_hat) / schedule.at("signal", t)
    mean = schedule.at("mean_start", t) * start + schedule.at("mean_noisy", t) * z_t
    true_mean = schedule.at("mean_start", t) * z + schedule.at("mean_noisy", t) * z_t
    true_log = schedule.at("log_posterior", t)
    fraction = (v + 1) / 2  # the model's -1 .. 1 spans posterior .. beta (eq. 15)
    log_var = fraction * schedule.at("log_beta", t) + (1 - fraction) * true_log
    kl = 0.5 * (log_var - true_log + (true_log - log_var).exp() + (true_mean - mean).square() * (-log_var).exp() - 1)
    nll = -discretised_log_likelihood(z, mean, log_var)
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretised_log_likelihood(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log of a Gaussian's mass in a bin of width 2/255 around z (DDPM, arXiv 2006.11239, eq. 13)."""
    precision = (-0.5 * log_var).exp()

    def cdf(x: Tensor) -> Tensor:
        return torch.special.ndtr(x * precision)

    above, below = cdf(z - mean + 1 / 255), cdf(z - mean - 1 / 255)
    mass = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()
