"""YAML 1.2 (core schema), read by a loader that constructs plain values only.

PyYAML implements version 1.1, in which `24:00:00` is the number 86400, `off` is false, `010` is 8 and `1e-4` is a text.
Here these are a text, a text, 10 and a number. Merge keys (`<<`) of version 1.1 are kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fine_dist.core.errors import ConfigError, NotAFile
from fine_dist.core.regular_files import read_bytes
from fine_dist.core.resources import shipped_config

MAX_CONFIG_BYTES = 4 * 2**20
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_SCHEMA = {
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (re.compile(r"^<<$"), ["<"]),
}
"""Pattern and first letters of the plain scalars of each type. The first match decides; no match is a text."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        ConfigError: The file cannot be read, is too large, is no YAML mapping, or has a key twice.
    """
    remedy = "give a YAML file of keys and values"
    try:
        # One byte more than is legal tells a file that is too large from one that just fits.
        raw = read_bytes(shipped_config(path), MAX_CONFIG_BYTES + 1)
    except NotAFile as error:
        raise ConfigError(f"config file {path} {error.strerror}; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}; {remedy}") from None
    except ValueError as error:  # the path holds NUL or is not valid Unicode
        raise ConfigError(f"config file {path!r}: {error}; {remedy}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"config file {path} is larger than {MAX_CONFIG_BYTES >> 20} MiB; {remedy}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file {path} is not text (byte {error.start} is {raw[error.start]:#04x}, which UTF-8 does not "
            f"have there); {remedy}"
        ) from None
    return parse_yaml(text, f"config file {path}")


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A mapping from YAML text.

    Args:
        text: The text.
        where: Origin of the text for messages.

    Raises:
        ConfigError: The text is no YAML mapping; the message names the line.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{where} is not YAML: {error.problem or error.context}{position}") from None
    except _UNREADABLE as error:
        raise ConfigError(f"{where} is not YAML: {str(error).partition(chr(10))[0]}") from None
    except RecursionError:
        raise ConfigError(f"{where}: values are nested too deeply for a config") from None
    # An empty file is a config without settings, hence all defaults.
    if not isinstance(values if values is not None else {}, dict):
        raise ConfigError(f"{where}: a mapping of keys to values is needed, not {type(values).__name__}")
    return values or {}


def parse_value(text: str) -> Any:
    """The value of a command-line argument as YAML: a scalar, list or mapping. Text that is not YAML stays text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (*_UNREADABLE, RecursionError):
        return text


def to_yaml(values: Any) -> str:
    """Plain values as YAML text that means the same in versions 1.1 and 1.2; keys keep their order."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=110))


_UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError)


class _Loader(yaml.SafeLoader):
    """The safe loader under the core schema; it refuses a key that is given twice."""

    # Empty, to drop the rules of version 1.1; those of version 1.2 are added at the end of this file.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML, but a key that is given twice is an error; PyYAML silently keeps the last value."""
        seen: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key.value!r} is given twice, first in line {seen[key.value] + 1}; keep one",
                    key.start_mark,
                )
            seen[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        """An integer: decimal (leading zeros allowed), octal as `0o17`, or hexadecimal as `0x1f`."""
        text = str(self.construct_scalar(node))
        for prefix, base in (("0o", 8), ("0x", 16)):
            if text.startswith(prefix):
                return int(text[2:], base)
        return int(text)

    def construct_yaml_float(self, node: Any) -> float:
        """A number with a point or an exponent, an infinity or NaN."""
        return float(str(self.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """libyaml's dumper where PyYAML has it, because a fan-out of thousands of tasks writes as many files.

    Texts that version 1.1 or 1.2 would read as another type are quoted.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name
        letter: list(pairs) for letter, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name, (_pattern, _letters) in _SCHEMA.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _letters)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _letters)
for _name in ("int", "float"):
    _Loader.add_constructor(_TAG + _name, getattr(_Loader, f"construct_yaml_{_name}"))
