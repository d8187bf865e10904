"""Inception Score, precision and recall, and kernel distance, in blocks that fit a small memory.

Shapes: N, M samples of two sets, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fine_dist.core.errors import DataError

IS_SPLIT = 5000
"""Images of one Inception Score; of more, the mean over parts of so many is reported, as ADM's evaluation does."""


@dataclass
class ClassSums:
    """Sums of class probabilities p for the Inception Score (arXiv 1606.03498), by part of `IS_SPLIT` images.

        IS = exp mean_i KL(p_i || mean_j p_j)

    count [P], entropy [P] (the sums of Σ_k p log p), classes [P, K] (the sums of p), float64, P parts. The part of an
    image depends on its number alone, so processes may divide the images in any way.
    """

    count: Tensor
    entropy: Tensor
    classes: Tensor

    @classmethod
    def empty(cls, num_images: int, num_classes: int, split: int = IS_SPLIT) -> ClassSums:
        parts = max(1, -(-num_images // split))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((parts,), (parts,), (parts, num_classes))))

    def update(self, logits: Tensor, part: Tensor) -> None:
        """Add logits [N, K] of images that belong to these parts [N]."""
        # In fp64 on the CPU, so that the sums do not depend on the device or the division into batches.
        log_p = logits.detach().cpu().double().log_softmax(dim=1)
        if not torch.isfinite(log_p).all():
            raise DataError("logits of an image are NaN or infinite")
        p, part = log_p.exp(), part.cpu()
        self.count.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
        self.entropy.index_add_(0, part, (p * log_p).sum(dim=1))
        self.classes.index_add_(0, part, p)

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Sum over the processes of the default group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        for name in ("count", "entropy", "classes"):
            value = getattr(self, name).to(device)
            dist.all_reduce(value)
            setattr(self, name, value.cpu())

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts (0 for one)."""
        used = self.count > 0
        if not used.any():
            raise DataError("an Inception Score needs at least one image")
        count, entropy, classes = self.count[used], self.entropy[used], self.classes[used]
        mean = classes / count[:, None]
        # `xlogy` is 0 for a class that no image has, where `p * log p` would be NaN.
        scores = (entropy / count - torch.special.xlogy(mean, mean).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def inception_score(logits: Tensor, split: int = IS_SPLIT) -> tuple[float, float]:
    """Mean and standard deviation over parts of `split` images of logits [N, K]."""
    sums = ClassSums.empty(len(logits), logits.shape[1], split)
    sums.update(logits, torch.arange(len(logits)) // split)
    return sums.score()


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, block: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, eq. 1 and 2) of features real [N, F], fake [M, F].

    Precision is the fraction of fakes that lie within some real sample's distance to its k-th nearest other real one;
    recall the same with the roles exchanged. Distances are computed in float32 about the real mean, `block` rows at a
    time: 10,000 against 10,000 of 2048 features take about 0.4 GiB. The literature takes 10,000 of each.
    """
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or x.shape[1] != real.shape[1]:
            raise DataError(f"{name} features are {list(x.shape)}; both must be [samples, {real.shape[-1]}]")
        if len(x) <= neighbours:
            raise DataError(f"{len(x)} {name} samples have no {neighbours}rd neighbor; take more than {neighbours}")
    # Distances do not change, but their expansion |a|^2 - 2 ab + |b|^2 cancels less about the mean.
    centre = real.float().mean(dim=0)
    real, fake = (x.float() - centre for x in (real, fake))
    radius_real, radius_fake = _radii(real, neighbours, block), _radii(fake, neighbours, block)
    inside_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    inside_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for start in range(0, len(fake), block):
        rows = slice(start, start + block)
        far = _squared_distances(fake[rows], real)  #                                                      [block, N]
        inside_real[rows] = (far <= radius_real).any(dim=1)
        inside_fake |= (far <= radius_fake[rows, None]).any(dim=0)
    return float(inside_real.double().mean()), float(inside_fake.double().mean())


def _radii(x: Tensor, neighbours: int, block: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, [N]."""
    radii = []
    for start in range(0, len(x), block):
        rows = torch.arange(start, min(start + block, len(x)), device=x.device)
        far = _squared_distances(x[rows], x)
        # A sample is not its own neighbor.
        far[rows - start, rows] = torch.inf
        radii.append(far.topk(neighbours, dim=1, largest=False).values.max(dim=1).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # One matrix product instead of a difference for each pair: [block, N] and not [block, N, F] numbers.
    far = torch.addmm(b.square().sum(dim=1)[None, :], a, b.T, alpha=-2)
    return far.add_(a.square().sum(dim=1)[:, None]).clamp_(min=0)


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (arXiv 1801.01401, section 4): mean and standard deviation, over random subsets, of the unbiased squared
    maximum mean discrepancy with the kernel (x·y / F + 1)³.

    Subsets of `size` samples each, drawn without replacement (smaller where a set is). Kernels are in float32, whose
    rounding is far below the spread over subsets, and sums in float64.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise DataError(f"features are {list(real.shape)} and {list(fake.shape)}; both must be [samples, F] of one F")
    size = min(size, len(real), len(fake))
    if size < 2:
        raise DataError(f"KID needs at least 2 samples of each set, not {len(real)} and {len(fake)}")
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        pick = [torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in (real, fake)]
        values[i] = squared_mmd(real[pick[0]], fake[pick[1]])
    return float(values.mean()), float(values.std(correction=0))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared MMD between x [N, F] and y [M, F] with the kernel (x·y / F + 1)³."""
    n, m = len(x), len(y)
    (xx, same_x), (yy, same_y), (xy, _) = _kernel_sums(x, x), _kernel_sums(y, y), _kernel_sums(x, y)
    # Unbiased: pairs of a sample with itself are left out of both sums within a set, and may make the result negative.
    return (xx - same_x) / (n * (n - 1)) + (yy - same_y) / (m * (m - 1)) - 2 * xy / (n * m)


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The sum of the kernel over all pairs, and over the pairs (i, i)."""
    # The cubic kernel by two multiplications; `pow` is many times slower.
    linear = torch.addmm(x.new_ones((), dtype=torch.float32), x.float(), y.float().T, alpha=1 / x.shape[1])
    kernel = linear.square().mul_(linear)
    return float(kernel.sum(dtype=torch.float64)), float(kernel.diagonal().sum(dtype=torch.float64))
