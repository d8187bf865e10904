"""The forward process of diffusion as one object: times, noised latents, the target, its weight, and conversions.

`make_process(config)` returns a `DdpmProcess` (arXiv 2006.11239, 2102.09672) or a `FlowProcess` (SiT, 2401.08740). The
objective, the held-out loss, distillation and samplers only use this interface.

Notation: z a clean latent, eps noise, z_t the noised latent, all [B, C, H, H]; t times [B] as the model sees them; out
the model's output [B, C or 2C, H, H], of which the first C channels are the prediction.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fine_dist.diffusion.settings import DiffusionConfig, Precision


def make_process(config: DiffusionConfig) -> Process:
    """The process that a config describes, its tables on the CPU."""
    return FlowProcess(config) if config.process == "flow" else DdpmProcess(config)


class Process(nn.Module, ABC):
    """The interface of a forward process."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.prediction = config.predicts

    @abstractmethod
    def times(self, uniform: Sequence[float]) -> Tensor:
        """Times [B] of uniform numbers in [0, 1), by inverse transform: one random number for each sample."""

    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Random times [count] from a generator, for use outside of the training stream."""
        return self.times(torch.rand(count, generator=generator, dtype=torch.float64).tolist())

    @abstractmethod
    def noise_level(self, t: Tensor) -> Tensor:
        """Noise level of a time, 0 (clean) to 1 (noise), [B]. Guidance intervals are in these units."""

    @abstractmethod
    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noised latent z_t."""

    @abstractmethod
    def target(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the model should predict."""

    @abstractmethod
    def clean(self, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The clean latent that corresponds to a prediction."""

    @abstractmethod
    def noise(self, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """The noise that corresponds to a prediction."""

    def weight(self, t: Tensor) -> Tensor | None:
        """Weights [B] of the samples' losses; None stands for ones."""
        return None

    def variance_bound(self, out: Tensor, z: Tensor, z_t: Tensor, t: Tensor) -> Tensor | None:
        """The additional loss [B] of an output with channels of a learned variance; None without such channels."""
        return None

    def clamp(self, z_t: Tensor, t: Tensor, out: Tensor, limit: float) -> Tensor:
        """The prediction [B, C, H, H] whose clean latent is the predicted one, clamped to [-limit, limit].

        Near pure noise a clean latent is the prediction's error times a large factor (160 at DDPM's last step), and
        small models diverge without it. Rewriting the prediction does the same to every solver.
        """
        start = self.clean(z_t, t, out).clamp(-limit, limit)
        return self.target(start, t, self.noise_of(z_t, t, start))

    @abstractmethod
    def noise_of(self, z_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """The noise that leads from a clean latent z to z_t."""

    def time_from(self, other: Process, t: Tensor) -> Tensor:
        """The time of this process with the noise level that `other` has at its time t."""
        return t

    def convert_from(self, other: Process, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """Another model's output at the same z_t as a prediction of this process; t is the other process's time.

        Exact if the noise levels agree: between noise and v prediction, and between the conventions of a flow.
        """
        if self.config == other.config:
            return out
        channels = z_t.shape[1]
        clean, noise = other.clean(z_t, t, out[:, :channels]), other.noise(z_t, t, out[:, :channels])
        return torch.cat([self.target(clean, self.time_from(other, t), noise), out[:, channels:]], dim=1)


class DdpmProcess(Process):
    """The discrete chain q(z_t | z_0) with a linear schedule of variances; its tables have length T, float32."""

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        # Computed in fp64 and stored in fp32: a product of a thousand factors in fp32 would lose three digits.
        beta = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
        alpha_bar = torch.cumprod(1 - beta, 0)
        if config.zero_terminal_snr:
            alpha_bar = zero_terminal(alpha_bar)
            beta = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        # alpha_bar before the first step is 1: no noise.
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        # The posterior's variance is zero at t = 0; its logarithm is taken at t = 1 there (Improved DDPM, section 3.1).
        clipped = torch.cat([posterior[1:2], posterior[1:]]) if config.num_timesteps > 1 else beta
        tables = {
            "signal": alpha_bar.sqrt(),
            "sigma": (1 - alpha_bar).sqrt(),
            "log_beta": beta.log(),
            "log_posterior": clipped.log(),
            "mean_start": beta * previous.sqrt() / (1 - alpha_bar),
            "mean_noisy": (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
            "loss_weight": self._loss_weights(alpha_bar),
        }
        for name, table in tables.items():
            # Buffers move with the process to a device; they are not saved, because the config determines them.
            self.register_buffer(name, table.float(), persistent=False)
        self.num_timesteps = config.num_timesteps

    def _loss_weights(self, alpha_bar: Tensor) -> Tensor:
        """Min-SNR (arXiv 2303.09556, eq. 5, and section 3.3 for v): min(SNR, gamma) over its own weight."""
        ratio = alpha_bar / (1 - alpha_bar)
        # At an SNR of zero `bounded / ratio` would be 0 / 0 for noise prediction; such a schedule needs v prediction.
        bounded = ratio.clamp(max=self.config.min_snr_gamma)
        return bounded / (ratio + 1) if self.prediction == "v" else bounded / ratio

    def at(self, name: str, t: Tensor) -> Tensor:
        """Entries of a table at times [B], as [B, 1, 1, 1]."""
        return self.get_buffer(name)[t][:, None, None, None]

    def times(self, uniform: Sequence[float]) -> Tensor:
        return torch.tensor([int(u * self.num_timesteps) for u in uniform], dtype=torch.int64)

    def random_times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_timesteps, (count,), generator=generator)

    def noise_level(self, t: Tensor) -> Tensor:
        return (t.double() + 1) / self.num_timesteps

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.at("signal", t) * z + self.at("sigma", t) * eps  # DDPM, eq. 4

    def target(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.at("signal", t) * eps - self.at("sigma", t) * z if self.prediction == "v" else eps

    def clean(self, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        if self.prediction == "v":  # arXiv 2202.00512, appendix D
            return self.at("signal", t) * z_t - self.at("sigma", t) * out
        return (z_t - self.at("sigma", t) * out) / self.at("signal", t)

    def noise(self, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        return self.at("sigma", t) * z_t + self.at("signal", t) * out if self.prediction == "v" else out

    def noise_of(self, z_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return (z_t - self.at("signal", t) * z) / self.at("sigma", t)

    def weight(self, t: Tensor) -> Tensor | None:
        return self.get_buffer("loss_weight")[t] if self.config.weighting == "min_snr" else None

    def variance_bound(self, out: Tensor, z: Tensor, z_t: Tensor, t: Tensor) -> Tensor | None:
        """KL(q(z_{t-1} | z_t, z_0) || p_theta(z_{t-1} | z_t)) in bits a dimension, [B]; at t = 0 the decoder's.

        The hybrid objective weighs the bound (in nats, a sum over T timesteps) by 0.001; with T = 1000 and a uniform t
        that is the bound's own term at t. DiT measures it in bits, and so does this. The mean is held fixed inside it.
        """
        channels = z.shape[1]
        if out.shape[1] != 2 * channels:
            return None
        # Detached: the bound trains the variance alone (Improved DDPM, section 3.1).
        prediction, v = out.detach()[:, :channels], out[:, channels:]
        start = self.clean(z_t, t, prediction)
        mean = self.at("mean_start", t) * start + self.at("mean_noisy", t) * z_t
        true_mean = self.at("mean_start", t) * z + self.at("mean_noisy", t) * z_t
        true_log = self.at("log_posterior", t)
        fraction = (v + 1) / 2  # the model's -1 .. 1 spans posterior .. beta (Improved DDPM, eq. 15)
        log_var = fraction * self.at("log_beta", t) + (1 - fraction) * true_log
        square = (true_mean - mean).square()
        kl = 0.5 * (log_var - true_log + (true_log - log_var).exp() + square * (-log_var).exp() - 1)
        nll = -discretized_log_likelihood(z, mean, log_var)
        # Both branches are computed for all samples, because selecting rows would make the host wait for t.
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


class FlowProcess(Process):
    """The linear interpolant z_s = (1 - s) z + s eps over noise levels s in 0..1; the model predicts its velocity.

    The model's time is `time_scale` times s where time runs from data to noise, and times 1 - s where it runs from
    noise to data. The velocity is the derivative by that direction: eps - z or z - eps.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.sign = 1.0 if config.direction == "data_to_noise" else -1.0

    def times(self, uniform: Sequence[float]) -> Tensor:
        # Transformed in fp64 on the CPU and rounded once, so that times have the same bits on every device.
        level = torch.tensor(list(uniform), dtype=torch.float64)
        if self.config.time == "logit_normal":
            # The ends of a normal's quantile function are infinite; 2^-53 is the smallest step of a uniform double.
            normal = torch.special.ndtri(level.clamp(2.0**-53, 1 - 2.0**-53))
            level = torch.sigmoid(self.config.time_mean + self.config.time_std * normal)
        return self.time_at(self.shift(level)).float()

    def shift(self, level: Tensor) -> Tensor:
        """Noise levels shifted towards noise by `time_shift` (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
        s = self.config.time_shift
        return level if s == 1 else s * level / (1 + (s - 1) * level)

    def time_at(self, level: Tensor) -> Tensor:
        """The model's time of a noise level."""
        return self.config.time_scale * (level if self.sign > 0 else 1 - level)

    def noise_level(self, t: Tensor) -> Tensor:
        part = t / self.config.time_scale
        return part if self.sign > 0 else 1 - part

    def _level(self, t: Tensor) -> Tensor:
        return self.noise_level(t)[:, None, None, None]

    def add_noise(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        s = self._level(t)
        return (1 - s) * z + s * eps

    def target(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.sign * (eps - z)

    def clean(self, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        return z_t - self._level(t) * (self.sign * out)

    def noise(self, z_t: Tensor, t: Tensor, out: Tensor) -> Tensor:
        return z_t + (1 - self._level(t)) * (self.sign * out)

    def noise_of(self, z_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        s = self._level(t)
        # At s = 0 there is no noise in z_t, and any value is correct; the bound avoids 0 / 0.
        return (z_t - (1 - s) * z) / s.clamp_min(torch.finfo(z_t.dtype).tiny)

    def time_from(self, other: Process, t: Tensor) -> Tensor:
        return self.time_at(other.noise_level(t))


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Context with the arithmetic of sampling and evaluation; `tf32` only affects matrix products on a GPU."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    # Restored afterwards, because the same operating-system process may train with another precision.
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def zero_terminal(alpha_bar: Tensor) -> Tensor:
    """A schedule whose last step has no signal (arXiv 2305.08891, algorithm 1): its root shifted and rescaled."""
    root = alpha_bar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)).square()


def discretized_log_likelihood(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log of a Gaussian's mass in a bin of width 2/255 around z (DDPM, arXiv 2006.11239, eq. 13).

    It uses the exact normal distribution function. The original code approximates it by a tanh, so that its loss at
    t = 0 differs by about 5e-4 of its value.
    """
    precision = (-0.5 * log_var).exp()

    def cdf(x: Tensor) -> Tensor:
        return torch.special.ndtr(x * precision)

    above, below = cdf(z - mean + 1 / 255), cdf(z - mean - 1 / 255)
    # The outermost bins reach to infinity: pixels are clipped to [-1, 1].
    mass = torch.where(z < -0.999, above, torch.where(z > 0.999, 1 - below, above - below))
    # For a distant mean the mass is 0 in fp32, and its logarithm would be -Inf.
    return mass.clamp(min=1e-12).log()
