"""Every export is run in its new format and compared with the model it came from before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fine_dist.core.errors import ArtifactError
from fine_dist.model.arch import Arch
from fine_dist.model.dit import DiT, positions_of

LIMIT = 1e-4
"""Largest difference of outputs in fp32, for outputs of size about 1; products sum in another order elsewhere."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(z [B, C, H, W], t [B] int64, y [B] int64) -> [B, C or 2C, H, W]`."""


class ExportComparison:
    """Outputs of a model for a batch of noise, at timesteps and labels spread over their ranges, to compare with."""

    @torch.no_grad()
    def __init__(self, arch: Arch, state: Mapping[str, Tensor], batch: int = 2) -> None:
        self.arch = arch
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(batch, *arch.latent_shape, generator=generator)
        # Not from 0, where all frequencies give the same sine and cosine and a mistake in them would not show.
        t = torch.linspace(17, 983, batch).long()
        y = torch.linspace(0, arch.num_classes, batch).long()  # the last is the null label
        self.inputs = (z, t, y)
        with torch.device("meta"):
            model = DiT(arch)
        # Built without memory and given the tensors themselves: a DiT-XL would else be held twice.
        model.load_state_dict({name: tensor.float().cpu() for name, tensor in state.items()}, assign=True)
        # A buffer outside the state dict, which the meta device left without values.
        model.pos = positions_of(arch)
        self.expected = model.eval()(*self.inputs)

    @torch.no_grad()
    def error(self, forward: Forward) -> float:
        """max |ours - other| / max(1, max |ours|)."""
        return float((self.expected - forward(*self.inputs)).abs().max() / self.expected.abs().max().clamp(min=1))

    def confirm(self, forward: Forward, where: str) -> float:
        """`error`, and `ArtifactError` when it is above `LIMIT`."""
        error = self.error(forward)
        # Written so that a NaN counts as an error; `error > LIMIT` would let it pass.
        if not error <= LIMIT:
            raise ArtifactError(
                f"{where}: what was written does not compute what the model does: outputs differ by {error:.3g}, and "
                f"{LIMIT:g} is the limit; nothing was kept. Please report this with the architecture ({self.arch.name})"
            )
        return error
