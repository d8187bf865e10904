"""Wraps a block's matrices with LoRA and other adapters of Hugging Face's peft, and names what is saved.

`Adapted` calls peft's own layer and merges with peft's own code. Its base weight and bias are saved under the names
that they have in the parent, so a saved target holds the adapter alone wherever the base is left as it was.

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
"""Where peft's layer keeps what it wraps."""

AdapterMacs = Callable[[int, int, int, bool], int]
"""(rows, m, n, whether there is a backward pass) -> multiply-adds of the adapter's own products."""


class Adapted(nn.Module):
    """`(x [..., n], condition) -> [..., m]` through peft's layer around an ordinary `Dense`."""

    below: ClassVar[Role] = "scaler"
    """The role of parameters in modules of peft's, which declare none."""

    def __init__(self, tuned: nn.Module, macs: AdapterMacs):
        super().__init__()
        self.tuned = tuned
        self._macs = macs
        # Hooks rename on the way out and in, so that peft's own layout never reaches a file.
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
        """Of one product of `rows` rows: the frozen base's, and the adapter's own."""
        own = self._macs(rows, self.base.out_features, self.base.in_features, backward)
        return self.base.multiply_adds(rows, backward=backward) + own


def adapt(model: DiT, tuner: type[Any], config: Any, macs: AdapterMacs) -> Any:
    """Put peft's layers around the matrices that `config.target_modules` names; peft's tuner, which may hold more.

    peft draws from torch's global generator: seed that first.
    """
    # peft replaces modules in place; what it has wrapped is no `Dense` any more and is found by that.
    peft_tuner = tuner(model, config, "default")
    for block in model.blocks:
        for matrix in MATRICES:
            module = block.get_submodule(matrix)
            if not isinstance(module, Dense):
                block.add_module(matrix, Adapted(module, macs))
    return peft_tuner


def share(model: DiT, names: Sequence[str]) -> None:
    """Save dicts of buffers that all of peft's layers share once, at the model's root, as `shared.NAME`."""

    def held(module: nn.Module) -> dict[str, Any]:
        first: Any = next(m for m in module.modules() if isinstance(m, Adapted)).tuned
        return {f"shared.{name}": getattr(first, name)["default"] for name in names}

    def save(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state.update({f"{prefix}{name}": buffer.detach() for name, buffer in held(module).items()})

    def load(
        module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str],
        *errors: Any,
    ) -> None:  # fmt: skip
        for name, buffer in held(module).items():
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
