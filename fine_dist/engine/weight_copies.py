"""bf16 copies of weights for matrix products, besides the fp32 weights that are trained (the *masters*).

Under autocast every product casts its weight and bias, and every gradient is cast back: twenty small kernels per layer.
Here the model uses bf16 copies while gradients are computed. One kernel for many parameters makes them from the
masters before a step's first micro-batch, and one brings their gradients into the masters' after each micro-batch. The
optimizer, averages, checkpoints and evaluations see masters alone. A product reads the same bits either way, because
autocast rounds the same weights.

Which parameters have a copy is declared by the module that owns them: `multiplied` names those that it uses in products
alone. What else a module does with its parameters (a sum of two, a scaler) it does with the masters, in fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16


def multiplied(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters that are used only in products, as (owning module, name in the module, parameter)."""
    matches = []
    for module in model.modules():
        declared = ("weight", "bias") if type(module) is nn.Linear else getattr(type(module), "multiplied", ())
        matches += [(module, name, p) for name, p in module.named_parameters(recurse=False) if name in declared]
    return matches


class WeightCopies:
    """The bf16 copies of one model's weights, including frozen ones."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = multiplied(model)
        masters = {id(p): p for _, _, p in self._slots}
        self._masters = list(masters.values())
        self._copies = [nn.Parameter(p.detach().to(DTYPE), p.requires_grad) for p in self._masters]
        self.of: dict[int, nn.Parameter] = dict(zip(masters, self._copies))
        """Copies by the `id` of their master."""
        self.trained = {p: copy for p, copy in zip(self._masters, self._copies) if p.requires_grad}
        """Copies of the trained masters."""

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which the model's modules hold the copies, refreshed from the masters."""
        self.refresh()
        try:
            for module, name, master in self._slots:
                module._parameters[name] = self.of[id(master)]
            yield
        finally:
            for module, name, master in self._slots:
                module._parameters[name] = master
            for copy in self._copies:
                copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the trained masters into their copies. Copies of frozen masters do not change."""
        if self.trained:
            torch._foreach_copy_(list(self.trained.values()), list(self.trained))

    def add_gradients(self) -> None:
        """Add the copies' gradients of one backward pass to those of the masters, and forget them."""
        add_gradients(self.trained.items())


@torch.no_grad()
def add_gradients(pairs: Iterable[tuple[Tensor, nn.Parameter]]) -> None:
    """Add each copy's gradient to its master's, in the master's dtype, and forget it.

    Args:
        pairs: (master, copy) of some parameters.
    """
    fresh: list[tuple[Tensor, Tensor]] = []
    more: list[tuple[Tensor, Tensor]] = []
    for master, copy in pairs:
        grad, copy.grad = copy.grad, None
        if grad is None:
            continue
        pairs_of_kind = more if master.grad is not None else fresh
        master.grad = torch.empty_like(master) if master.grad is None else master.grad
        pairs_of_kind.append((master.grad, grad))
    if fresh:
        torch._foreach_copy_([into for into, _ in fresh], [grad for _, grad in fresh])
    if more:
        torch._foreach_add_([into for into, _ in more], [grad for _, grad in more])
