"""Comparison of a model's outputs with those of its export, made before the export gets its final name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT, positions_of

LIMIT = 1e-4
"""Largest allowed `ExportComparison.error`, in fp32. It is not 0, because other code sums in another order."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(z [B, C, H, W], t [B] int64, y [B] int64) -> [B, C or 2C, H, W]`."""


class ExportComparison:
    """Compares other implementations of a model with its own outputs for a batch of noise.

    Timesteps and labels are spread over their ranges; the last label is the null label.

    Args:
        arch: Architecture of the model.
        state: Its tensors, by this project's names.
        batch: Number of samples.
    """

    @torch.no_grad()
    def __init__(self, arch: Arch, state: Mapping[str, Tensor], batch: int = 2) -> None:
        self.arch = arch
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(batch, *arch.latent_shape, generator=generator)
        # Not t = 0, where all frequencies give the same sine and cosine, which would hide wrong frequencies.
        t = torch.linspace(17, 983, batch).long()
        y = torch.linspace(0, arch.num_classes, batch).long()
        self.inputs = (z, t, y)
        with torch.device("meta"):
            model = DiT(arch)
        # Built on the meta device and given the tensors themselves, so that a DiT-XL is not in memory twice.
        model.load_state_dict({name: tensor.float().cpu() for name, tensor in state.items()}, assign=True)
        # A buffer that is not in the state dict, so it is still on the meta device.
        model.pos = positions_of(arch)
        self.expected = model.eval()(*self.inputs)

    @torch.no_grad()
    def error(self, forward: Forward) -> float:
        """Return max |expected - output| / max(1, max |expected|)."""
        return float((self.expected - forward(*self.inputs)).abs().max() / self.expected.abs().max().clamp(min=1))

    def confirm(self, forward: Forward, where: str) -> float:
        """Return `error`. Raises `ArtifactError` if it is above `LIMIT` or NaN."""
        error = self.error(forward)
        # Written so that a NaN counts as an error; `error > LIMIT` would let it pass.
        if not error <= LIMIT:
            raise ArtifactError(
                f"{where}: what was written does not compute what the model does: outputs differ by {error:.3g}, and "
                f"{LIMIT:g} is the limit; nothing was kept. Please report this with the architecture ({self.arch.name})"
            )
        return error
