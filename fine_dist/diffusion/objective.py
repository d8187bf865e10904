"""From a batch to losses: noise the latents, run the model, and sum weighted terms. The loop and packs both use it.

Terms: the process's own loss (noise, v or velocity prediction, with the bound of a learned variance) and two kinds of
distillation from a teacher: its full output, and features of its blocks.

Shapes: B batch, C latent channels, H latent side, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fine_dist.diffusion.process import Process, make_process
from fine_dist.diffusion.random_draws import PrefetchedDraws, RandomDraws, draw
from fine_dist.diffusion.settings import DiffusionConfig
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT, ModelOutput

Model = Callable[[Tensor, Tensor, Tensor], "Tensor | ModelOutput"]
"""`(z_t [B, C, H, H], t [B], y [B])` -> the output, or a `ModelOutput` where a term needs features."""


class LatentBatch(Protocol):
    """The attributes of a batch that a loss uses (`fine_dist.data.batch.Batch`)."""

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
    """The inputs of a step: clean and noised latents and the noise [B, C, H, H], times [B], labels [B]."""

    z: Tensor
    z_t: Tensor
    eps: Tensor
    t: Tensor
    """Times as the model sees them: int64 timesteps under ddpm, float32 under flow."""
    y: Tensor
    """Labels; the null label where they were dropped."""
    tokens: Tensor | None = None
    """An image encoder's tokens of the clean images [B, E, h, w], where the stream reads them."""


class LossTerm(Protocol):
    """A part of the loss: `term(batch, output) -> [B]` float32, counted `weight` times. Weight 0 is not computed."""

    weight: float

    @property
    def name(self) -> str: ...

    def __call__(self, batch: NoisedBatch, output: ModelOutput) -> Tensor: ...


class Objective:
    """The losses of a batch: `objective(model, batch) -> [B]` float32, a weighted sum of terms.

    Args:
        config: The diffusion process.
        arch: Gives the latent shape and, without `num_classes`, the null label.
        seed: Seeds times, noise and dropped labels.
        terms: Terms of the loss. Default: the process's own loss alone.
        num_classes: The null label, which dropped labels become. Default: the architecture's.
        ahead: Draw the next step's random numbers in a thread while this step computes. Turn it off if the objective is
            called in a thread already.
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
        self.process = make_process(config)
        self.draws: Callable[..., RandomDraws] = partial(
            draw,
            seed,
            shape=arch.latent_shape,
            times=self.process.times,
            label_drop=config.label_drop,
        )
        if ahead:
            self.draws = PrefetchedDraws(self.draws)
        # A term of weight 0 is left out entirely: a teacher's forward pass costs as much as half a step.
        self.terms = [term for term in terms or (DiffusionLoss(self.process),) if term.weight]
        self._sums: Tensor | None = None

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms if there are several, which are then also summed separately; otherwise empty."""
        return tuple(term.name for term in self.terms) if len(self.terms) > 1 else ()

    def take_terms(self) -> Tensor:
        """The unweighted sum of each term over all samples since the last call, fp64 [terms], on their device."""
        if self._sums is None:
            raise ValueError("no losses were computed since the last call")
        sums, self._sums = self._sums, None
        return sums

    def __call__(self, model: Model, batch: LatentBatch) -> Tensor:
        noised = self.sample_noise(batch)
        return self.losses(noised, model(noised.z_t, noised.t, noised.y))

    def sample_noise(self, batch: LatentBatch) -> NoisedBatch:
        """The noised inputs of a batch, on the batch's device; drawn from (seed, step, position) alone."""
        device = batch.latents.device
        # Drawn on the CPU and copied, because the numbers of a GPU generator depend on the GPU model.
        draws = self.draws(batch.step, batch.positions, pin=device.type == "cuda")
        t, eps, drop = (x.to(device, non_blocking=True) for x in (draws.t, draws.noise, draws.drop))
        self.process.to(device)
        z_t = self.process.add_noise(batch.latents, t, eps)
        labels = torch.where(drop, self.null, batch.labels)
        return NoisedBatch(batch.latents, z_t, eps, t, labels, getattr(batch, "tokens", None))

    def losses(self, batch: NoisedBatch, out: Tensor | ModelOutput) -> Tensor:
        """The weighted sum of all terms, [B]."""
        output = out if isinstance(out, ModelOutput) else ModelOutput(out, {})
        losses = [term(batch, output) for term in self.terms]
        if not losses:
            raise ValueError("an objective needs a term whose weight is not 0")
        if len(losses) > 1:
            # Summed on the device over micro-batches; the loop reads the sums once a step.
            sums = torch.stack([loss.detach().sum(dtype=torch.float64) for loss in losses])
            self._sums = sums if self._sums is None else self._sums + sums
        # A weight of exactly 1 is not multiplied, so that a single term has the bits of the plain loss.
        weighted = [loss if term.weight == 1 else term.weight * loss for term, loss in zip(self.terms, losses)]
        total = weighted[0]
        for loss in weighted[1:]:
            total = total + loss
        return total


class DiffusionLoss:
    """The diffusion loss: squared error of the prediction, plus the variational bound of a learned variance.

    The error is the mean over the numbers of a sample, times the process's weight at its time.
    """

    name = "diffusion"

    def __init__(self, process: Process, weight: float = 1.0):
        self.process, self.weight = process, weight

    def __call__(self, batch: NoisedBatch, output: ModelOutput) -> Tensor:
        # Always in fp32: squares of bf16 differences would lose most digits.
        out = output.out.float()
        target = self.process.target(batch.z, batch.t, batch.eps)
        losses = (out[:, : batch.z.shape[1]] - target).square().flatten(1).mean(1)
        weight = self.process.weight(batch.t)
        losses = losses if weight is None else weight * losses
        bound = self.process.variance_bound(out, batch.z, batch.z_t, batch.t)
        return losses if bound is None else losses + bound


class Teacher:
    """A frozen model that runs once for each batch, however many terms use it.

    Args:
        model: A DiT of the student's latent shape and classes, of any depth and width. It is put into eval mode and
            frozen here.
        blocks: Numbers of the blocks whose features are needed.
        process: The process that the teacher was trained for, and the student's. If their predictions differ, the
            teacher's output is converted exactly to the student's. Default: both are the same.
    """

    def __init__(
        self, model: DiT, blocks: Sequence[int] = (), process: tuple[DiffusionConfig, DiffusionConfig] | None = None
    ):
        self.model, self.blocks = model.eval().requires_grad_(False), tuple(blocks)
        self._processes: tuple[Process, Process] | None = None
        if process is not None and process[0].model_copy(update={"label_drop": 0}) != process[1].model_copy(
            update={"label_drop": 0}
        ):
            device = next(model.parameters()).device
            self._processes = (make_process(process[0]).to(device), make_process(process[1]).to(device))
        self._last: tuple[NoisedBatch, ModelOutput] | None = None

    @torch.no_grad()
    def __call__(self, batch: NoisedBatch) -> ModelOutput:
        # Compared by identity: several terms use the same batch, and the teacher runs once.
        if self._last is None or self._last[0] is not batch:
            t = batch.t
            if self._processes:
                # The teacher's time for the same noise level, in its own time convention.
                t = self._processes[0].time_from(self._processes[1], t)
            inputs = (batch.z_t.to(self.model.patch.weight.dtype), t, batch.y)
            if self.blocks:
                output = self.model.forward_with_features(*inputs, self.blocks)
            else:
                output = ModelOutput(self.model(*inputs), {})
            if self._processes:
                teacher, student = self._processes
                output = ModelOutput(student.convert_from(teacher, batch.z_t, t, output.out.float()), output.features)
            self._last = (batch, output)
        return self._last[1]


class OutputDistillation:
    """Mean squared difference to the teacher's full output, including the variance channels if both have them."""

    name = "output"

    def __init__(self, teacher: Teacher, weight: float = 1.0):
        self.teacher, self.weight = teacher, weight

    def __call__(self, batch: NoisedBatch, output: ModelOutput) -> Tensor:
        target, out = self.teacher(batch).out.float(), output.out.float()
        # Only one of the two may predict a variance; the prediction comes first in both.
        channels = min(target.shape[1], out.shape[1])
        return (out[:, :channels] - target[:, :channels]).square().flatten(1).mean(1)


class FeatureDistillation:
    """Mean squared difference of features, averaged over pairs of the student's and the teacher's.

    Args:
        teacher: Gives the features to match.
        pairs: (student's feature, teacher's feature), named as in `ModelOutput.features`. The student's features are
            already projected to the teacher's width. If a step trains only a part of the model, its output may have the
            features of some pairs only; the mean is over those.
        weight: Weight of the term.
    """

    name = "features"

    def __init__(self, teacher: Teacher, pairs: Sequence[tuple[str, str]], weight: float = 1.0):
        self.teacher, self.pairs, self.weight = teacher, tuple(pairs), weight

    def __call__(self, batch: NoisedBatch, output: ModelOutput) -> Tensor:
        targets = self.teacher(batch).features
        parts = [
            (output.features[student].float() - targets[teacher].float()).square().flatten(1).mean(1)
            for student, teacher in self.pairs
            if student in output.features
        ]
        if not parts:
            raise ValueError(f"the output has features {sorted(output.features)}, and no pair names one of them")
        return torch.stack(parts).mean(0)
