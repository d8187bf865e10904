"""Named sizes: `DiT-B/2`, `DiT-L/2-L8`. An `Arch` says everything about a DiT's shape; torch is not imported here."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from fine_dist.config import Config
from fine_dist.errors import ConfigError, nearest

KINDS = ("qkv", "o", "in", "out", "adaln")
"""The five weight matrices of a block (methods.md names them so): attention in and out, MLP in and out, modulation."""

SIZES = {
    # name: hidden size, layers, heads     (DiT, arXiv 2212.09748, table 1)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
_NAME = re.compile(r"^DiT-(?P<size>[A-Za-z]+)/(?P<patch>\d+)(?:-L(?P<depth>\d+))?$")


class Arch(Config):
    """The shape of a DiT. In YAML also a name, `DiT-B/2-L6`, or `{name: DiT-B/2, num_classes: 10}`."""

    hidden_size: int = Field(768, ge=2)
    """Width D of a token."""
    num_layers: int = Field(12, ge=1)
    """Number of blocks L."""
    num_heads: int = Field(12, ge=1)
    """Attention heads; must divide the width."""
    patch_size: int = Field(2, ge=1)
    """Side of a patch, in latent pixels."""
    in_channels: int = Field(4, ge=1)
    """Channels of a latent."""
    input_size: int = Field(32, ge=1)
    """Side of a latent; must be a multiple of the patch."""
    num_classes: int = Field(1000, ge=1)
    """Classes; the null label is one more row of the embedding table."""
    learn_sigma: bool = True
    """Predict the variance beside the noise (twice the output channels)."""
    frequency_shift: int = Field(0, ge=0, le=1)
    """The time embedding's i-th frequency is 10000^(-i / (128 - shift)): 0 in DiT, 1 in models trained in diffusers."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, dict) and "name" in value:
            rest = {key: item for key, item in value.items() if key != "name"}
            return {**parse_name(value["name"]), **rest}
        return value

    @model_validator(mode="after")
    def _possible(self) -> Arch:
        if self.hidden_size % self.num_heads:
            legal = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}; legal: {legal}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 (2-d sin-cos position table)")
        if self.input_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide input_size {self.input_size}")
        return self

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def name(self) -> str:
        """`DiT-B/2-L6`, or `DiT-D64/2-L8` for a width outside the table."""
        size = next((k for k, v in SIZES.items() if v[0] == self.hidden_size and v[2] == self.num_heads), None)
        return f"DiT-{size or f'D{self.hidden_size}'}/{self.patch_size}-L{self.num_layers}"

    def matrix(self, kind: str) -> tuple[int, int]:
        """(out, in) features of a block's weight matrix of this kind."""
        d = self.hidden_size
        return {"qkv": (3 * d, d), "o": (d, d), "in": (4 * d, d), "out": (d, 4 * d), "adaln": (6 * d, d)}[kind]

    def rows(self, kind: str, batch: int) -> int:
        """Rows that this kind's matrix multiplies in one forward pass: tokens, but one a sample for adaln."""
        return batch if kind == "adaln" else batch * self.num_tokens

    def with_depth(self, num_layers: int) -> Arch:
        return Arch(**{**self.model_dump(), "num_layers": num_layers})


def parse_name(name: str) -> dict[str, Any]:
    """`DiT-B/2-L6` as the fields it stands for. `ConfigError` when it is no such name."""
    match = _NAME.match(name)
    if not match or match["size"] not in SIZES:
        size = name.removeprefix("DiT-").split("/")[0]
        raise ValueError(
            f"no model is called {name!r}; a name is DiT-SIZE/PATCH or DiT-SIZE/PATCH-LDEPTH, SIZE: "
            + nearest(size, SIZES)
        )
    hidden, layers, heads = SIZES[match["size"]]
    return {
        "hidden_size": hidden,
        "num_layers": int(match["depth"] or layers),
        "num_heads": heads,
        "patch_size": int(match["patch"]),
    }


def arch(name: str, **fields: Any) -> Arch:
    """The `Arch` of a name, with some fields replaced: `arch("DiT-B/2-L6", num_classes=10)`."""
    try:
        return Arch.model_validate({"name": name, **fields})
    except ValueError as error:
        raise ConfigError(str(error)) from None
