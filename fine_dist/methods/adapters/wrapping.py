"""Wraps a block's matrices with LoRA and other adapters of Hugging Face's peft, and names what is saved.

`Adapted` calls peft's own layer and merges with peft's own code. The base weight and bias are saved under their names
in the parent, so that a saved target holds only the adapter if the base is unchanged.

Shapes: m out features, n in features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from fine_dist.model.arch import MATRICES
from fine_dist.model.dit import Condition, Dense, DiT
from fine_dist.model.roles import Role

BASE = "tuned.base_layer."
"""Prefix of the wrapped matrix in the state dict of peft's layer."""

AdapterMacs = Callable[[int, int, int, bool], int]
"""(rows, m, n, whether there is a backward pass) -> multiply-adds of the adapter's own products."""


class Adapted(nn.Module):
    """`(x [..., n], condition) -> [..., m]` through peft's layer around an ordinary `Dense`."""

    below: ClassVar[Role] = "scaler"
    """Role of the parameters in peft's modules, which declare no roles."""

    def __init__(self, tuned: nn.Module, macs: AdapterMacs):
        super().__init__()
        self.tuned = tuned
        self._macs = macs
        # Hooks rename tensors when saving and loading, so that no file contains peft's layout.
        self.register_state_dict_post_hook(_to_parents_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_to_pefts_names)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, condition: Condition | None = None) -> Tensor:
        y: Tensor = self.tuned(x)
        return y

    @property
    def base(self) -> Dense:
        return self.tuned.base_layer  # type: ignore[return-value]

    def merged(self) -> Dense:
        """peft's own merge, on a copy."""
        # peft merges in place, and the model may go on training.
        tuned: Any = copy.deepcopy(self.tuned)
        tuned.merge()
        merged: Dense = tuned.base_layer
        return merged

    def multiply_adds(self, rows: int, *, backward: bool) -> int:
        """Multiply-adds of a product of `rows` rows, of the frozen base and the adapter."""
        adapter = self._macs(rows, self.base.out_features, self.base.in_features, backward)
        return self.base.multiply_adds(rows, backward=backward) + adapter


def adapt(model: DiT, tuner: type[Any], config: Any, macs: AdapterMacs) -> Any:
    """Wrap the matrices that `config.target_modules` names in peft's layers; returns peft's tuner.

    peft draws from torch's global generator, which the caller has to seed.
    """
    # peft replaces modules in place, so the wrapped matrices are those that are no longer a `Dense`.
    peft_tuner = tuner(model, config, "default")
    for block in model.blocks:
        for matrix in MATRICES:
            module = block.get_submodule(matrix)
            if not isinstance(module, Dense):
                block.add_module(matrix, Adapted(module, macs))
    return peft_tuner


def share(model: DiT, names: Sequence[str]) -> None:
    """Save the dicts of buffers that all of peft's layers share once, at the model's root, as `shared.NAME`."""

    def shared(module: nn.Module) -> dict[str, Any]:
        first: Any = next(m for m in module.modules() if isinstance(m, Adapted)).tuned
        return {f"shared.{name}": getattr(first, name)["default"] for name in names}

    def save(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state.update({f"{prefix}{name}": buffer.detach() for name, buffer in shared(module).items()})

    def load(
        module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        *errors: Any,
    ) -> None:  # fmt: skip
        for name, buffer in shared(module).items():
            value = state.pop(f"{prefix}{name}", None)
            if value is None:
                missing.append(f"{prefix}{name}")
            else:
                buffer.copy_(value)

    model.register_state_dict_post_hook(save)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(load)  # type: ignore[no-untyped-call]


def _to_parents_names(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for leaf in ("weight", "bias"):
        state[f"{prefix}{leaf}"] = state.pop(f"{prefix}{BASE}{leaf}")


def _to_pefts_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    for leaf in ("weight", "bias"):
        if f"{prefix}{leaf}" in state:
            state[f"{prefix}{BASE}{leaf}"] = state.pop(f"{prefix}{leaf}")
