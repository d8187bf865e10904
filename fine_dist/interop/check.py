"""Every export is run in its new clothes, beside the model it came from, before it gets its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fine_dist.errors import ArtifactError
from fine_dist.model.dit import DiT
from fine_dist.model.zoo import Arch

LIMIT = 1e-4
"""Largest difference of outputs in fp32, for outputs of size about 1; products sum in another order elsewhere."""


@torch.no_grad()
def largest_error(
    arch: Arch, state: Mapping[str, Tensor], other: Callable[[Tensor, Tensor, Tensor], Tensor], *, batch: int = 2
) -> float:
    """max |ours - other| over a batch of noise at timesteps and labels spread over their ranges, over max(1, |ours|).

    other: `(z [B, C, H, H], t [B] int64, y [B] int64) -> [B, C or 2C, H, H]`.
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, *arch.latent_shape, generator=generator)
    t = torch.linspace(17, 983, batch).long()
    y = torch.linspace(0, arch.num_classes, batch).long()  # the last is the null label
    with torch.device("meta"):
        model = DiT(arch)
    model.load_state_dict({name: tensor.float().cpu() for name, tensor in state.items()}, assign=True)
    model.pos = _positions(arch)
    ours, theirs = model.eval()(z, t, y), other(z, t, y)
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))


def compare(
    arch: Arch, state: Mapping[str, Tensor], other: Callable[[Tensor, Tensor, Tensor], Tensor], where: str
) -> float:
    """`largest_error`, and `ArtifactError` when it is above `LIMIT`."""
    error = largest_error(arch, state, other)
    if not error <= LIMIT:
        raise ArtifactError(
            f"{where}: what was written does not compute what the model does: outputs differ by {error:.3g}, and "
            f"{LIMIT:g} is the limit; nothing was kept. Please report this with the architecture ({arch.name})"
        )
    return error


def _positions(arch: Arch) -> Tensor:
    from fine_dist.model.dit import position_table

    return position_table(arch.hidden_size, arch.input_size // arch.patch_size)
