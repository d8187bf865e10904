"""The shape of a DiT (`Arch`) and named sizes such as `DiT-B/2` and `DiT-L/2-L8`. Torch is not imported here."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from fine_dist.core.config import Config, Depth, short_repr, validate
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.limits import GIB, memory_bytes

MATRICES = ("qkv", "o", "in", "out", "adaln")
"""The five weight matrices of a block: attention in and out, MLP in and out, modulation."""

TIME_FREQUENCIES = 256
"""Number of sinusoids in the embedding of a timestep."""
SIZES = {
    # name: hidden size, layers, heads     (DiT, arXiv 2212.09748, table 1)
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
Sides: TypeAlias = int | tuple[int, int]
"""Height and width, or one number where they are equal, so that a square has one form on disk and one hash."""


def sides(height: int, width: int) -> Sides:
    """Height and width as settings and files hold them: one number for a square."""
    return height if height == width else (height, width)


def both(value: Sides) -> tuple[int, int]:
    """(height, width) of either form."""
    return (value, value) if isinstance(value, int) else value


def _read_sides(value: Any) -> Any:
    """A number or a list of one or two numbers, in the form of `sides`; None stays None. Else `ValueError`."""
    if value is None:
        return None
    lengths = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(lengths) not in (1, 2) or any(type(side) is not int or not 1 <= side <= 2**16 for side in lengths):
        raise ValueError(f"one whole number from 1 to {2**16} is needed, or two: height and width")
    return sides(lengths[0], lengths[-1])


SidesKey = Annotated[Sides, BeforeValidator(_read_sides)]
"""The type of a setting that is one side of a square, or height and width."""
_NAME = re.compile(r"^DiT-(?P<size>[A-Za-z]+)/(?P<patch>\d+)(?:-L(?P<depth>\d+))?$")


class Arch(Config):
    """The shape of a DiT. In YAML also a name, `DiT-B/2-L6`, or `{name: DiT-B/2, num_classes: 10}`."""

    BY_NAME: ClassVar[bool] = True
    """The command line takes `--arch NAME` for the whole group."""
    hidden_size: int = Field(768, ge=2, le=2**16)
    """Width D: the number of features of a token in every block."""
    num_layers: Depth = 12
    """Depth L: the number of transformer blocks, 1 to 1000."""
    num_heads: int = Field(12, ge=1, le=2**16)
    """Attention heads; must divide the width. Default: DiT's own number for its widths, otherwise one head for 64
    features."""
    patch_size: int = Field(2, ge=1, le=2**16)
    """Side of a patch, in pixels of the latent; 2 is DiT's usual choice."""
    in_channels: int = Field(4, ge=1, le=2**16)
    """Channels of a latent: 4 for the usual autoencoders, 1 for grayscale digits."""
    input_size: SidesKey = 32
    """Side of a latent in latent pixels, or its height and width; multiples of the patch. 32 is the latent of an image
    of 256 pixels."""
    num_classes: int = Field(1000, ge=1, le=10**8)
    """Number of classes, without the null label of classifier-free guidance."""
    learn_sigma: bool = True
    """Predict the variance as well as the noise, which doubles the output channels (Improved DDPM)."""
    frequency_shift: int = Field(0, ge=0, le=1)
    """The time embedding's i-th frequency is 10000^(-i / (128 - shift)): 0 in DiT, 1 in models trained in diffusers."""
    position_grid: SidesKey | None = None
    """Side (or height and width), in patches, of the grid that the weights were trained on. Positions of the latent's
    grid are rescaled to its range. Default: the latent's own grid. Set it for weights from another resolution."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, dict) and "name" in value:
            if not isinstance(value["name"], str):
                raise ValueError(f"name: a name such as DiT-B/2-L6 is needed, not {short_repr(value['name'])}")
            rest = {key: item for key, item in value.items() if key != "name"}
            value = {**parse_name(value["name"]), **rest}
        # Before validation, because pydantic would fill in the default of another width.
        if isinstance(value, dict) and "num_heads" not in value and type(value.get("hidden_size")) is int:
            value = {**value, "num_heads": heads_of_width(value["hidden_size"])}
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
        if any(side % self.patch_size for side in both(self.input_size)):
            raise ValueError(f"patch_size {self.patch_size} does not divide input_size {self.input_size}")
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = both(self.input_size)
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, *both(self.input_size))

    @property
    def name(self) -> str:
        """`DiT-B/2-L6`, or `DiT-D64/2-L8` for a width outside the table."""
        size = next((k for k, v in SIZES.items() if v[0] == self.hidden_size and v[2] == self.num_heads), None)
        return f"DiT-{size or f'D{self.hidden_size}'}/{self.patch_size}-L{self.num_layers}"

    def matrix(self, name: str) -> tuple[int, int]:
        """(out, in) features of one of a block's matrices."""
        d = self.hidden_size
        return {"qkv": (3 * d, d), "o": (d, d), "in": (4 * d, d), "out": (d, 4 * d), "adaln": (6 * d, d)}[name]

    def rows(self, name: str, batch: int) -> int:
        """Rows that a matrix multiplies in one forward pass: all tokens, or one row for each sample for adaln."""
        return batch if name == "adaln" else batch * self.num_tokens

    def with_depth(self, num_layers: int) -> Arch:
        """This architecture with another depth. `ConfigError` when the depth is not 1 to 1000."""
        return validate(Arch, {**self.model_dump(), "num_layers": num_layers}, "arch")

    def shell_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters outside the blocks, and of the blocks' biases, by state-dict name."""
        d, inner = self.hidden_size, self.in_channels * self.patch_size**2
        last = self.out_channels * self.patch_size**2
        shapes: dict[str, tuple[int, ...]] = {
            "patch.weight": (d, inner),
            "patch.bias": (d,),
            "time.hidden.weight": (d, TIME_FREQUENCIES),
            "time.hidden.bias": (d,),
            "time.out.weight": (d, d),
            "time.out.bias": (d,),
            "label.weight": (self.num_classes + 1, d),
            "final.adaln.weight": (2 * d, d),
            "final.adaln.bias": (2 * d,),
            "final.linear.weight": (last, d),
            "final.linear.bias": (last,),
        }
        layers = range(self.num_layers)
        biases = {f"blocks.{i}.{matrix}.bias": self.matrix(matrix)[:1] for i in layers for matrix in MATRICES}
        return {**shapes, **biases}

    def count(self, rank: int | None = None) -> int:
        """Number of parameters of a dense DiT; with a rank, of one whose blocks are shared factors (U, V and sigma)."""
        shell = sum(math.prod(shape) for shape in self.shell_shapes().values())
        sides = [self.matrix(matrix) for matrix in MATRICES]
        if rank is None:
            return shell + self.num_layers * sum(m * n for m, n in sides)
        return shell + rank * sum(m + n for m, n in sides) + self.num_layers * len(MATRICES) * rank


def heads_of_width(width: int) -> int:
    """Default heads of a width: those of `SIZES`, or the largest divisor of the width up to width / 64."""
    known = {size[0]: size[2] for size in SIZES.values()}
    fits = (heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
    return known.get(width) or next(fits, 1)


def parse_name(name: str) -> dict[str, Any]:
    """The fields of `Arch` that a name such as `DiT-B/2-L6` stands for. `ValueError` when it is not such a name."""
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
    return validate(Arch, {"name": name, **fields}, "arch")


def check_size(numbers: int, what: str) -> None:
    """Refuse to allocate more float32 numbers than this machine's memory holds.

    Args:
        numbers: Count of numbers, such as `arch.count(rank)`.
        what: Name of the tensors in the message.

    Raises:
        ConfigError: The numbers do not fit.
    """
    needed, available = 4 * numbers, memory_bytes()
    if needed > available:
        raise ConfigError(
            f"{what}: {numbers:,} numbers are {needed / GIB:,.1f} GiB as float32, and this machine has "
            f"{available / GIB:,.1f} GiB of memory; choose a smaller rank, width, depth or number of classes"
        )
