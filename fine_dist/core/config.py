"""Base class of all configs: a frozen tree of typed keys, its YAML, and error messages that name the legal values."""

from __future__ import annotations

import os
import reprlib
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.yaml_files import load_yaml, to_yaml

C = TypeVar("C", bound="Config")
MAX_DEPTH = 1000
"""Layers of a model, at most: thirty times the deepest DiT. More is a slip, and would be built for hours."""
Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
"""A number of layers."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A seed, as torch's generators take it."""


def _text_of(value: Any) -> Any:
    """Numbers and booleans as the text that an environment variable or an option holds; other values unchanged."""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, (int, float)) else value


Text = Annotated[str, BeforeValidator(_text_of)]
"""A text that may look like a number: `env: {OMP_NUM_THREADS: 4}`."""


class Config(BaseModel):
    """Base of all configs: frozen, and an unknown key is an error.

    A group of keys that has a default of its own keeps it where a file or flag names only some of the group's keys.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _over_the_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for key, field in cls.model_fields.items():
            # Otherwise a file that names one key of a group would silently
            # replace the group's other defaults by those of its class.
            if isinstance(value.get(key), dict) and isinstance(field.default, Config):
                value[key] = _over(field.default, value[key])
        return value


def _over(default: Config, given: dict[str, Any]) -> dict[str, Any]:
    """The given keys of a group over those of its default; unchanged where they name another variant of a union."""
    own = {
        key: getattr(default, key) for key in default.model_fields_set | {"name"} if key in type(default).model_fields
    }
    if given.get("name", own.get("name")) != own.get("name"):
        return given
    for key, value in given.items():
        inner = own.get(key)
        own[key] = _over(inner, value) if isinstance(value, dict) and isinstance(inner, Config) else value
    return own


def validate(
    kind: type[C], values: dict[str, Any], where: str = "config", flags: Collection[tuple[str, ...]] = ()
) -> C:
    """A config of a class from plain values.

    Args:
        kind: The class.
        values: Nested mappings, as YAML gives them.
        where: Origin of the values for messages, such as a file's path.
        flags: Paths of the keys that come from the command line.

    Raises:
        ConfigError: The message names every wrong key by its full path, with its value and the legal values.
    """
    refuse_strange_letters(values, where)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            path, sentence = _explain(kind, item)
            # An error belongs to a flag when one of the two paths begins
            # with the other: `--arch X` is wrong about `arch.depth` too.
            given = any(path[: len(flag)] == flag or (path and flag[: len(path)] == path) for flag in flags)
            found.setdefault("command line" if given else where, []).append(sentence)
    except RecursionError:
        found = {where: ["values lie too deep inside each other to be a config"]}
    raise ConfigError("\n  ".join(f"{place}: " + "\n  ".join(lines) for place, lines in found.items()))


def refuse_strange_letters(values: Any, where: str) -> None:
    """Refuse texts that neither a file name nor a config file can hold.

    Raises:
        ConfigError: A text holds the character NUL, or is not valid Unicode.
    """
    waiting: list[tuple[str, Any]] = [("", values)]
    seen: set[int] = set()
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise ConfigError(f"{where}: {path}: a text cannot hold the character NUL (got {shown(value)})")
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ConfigError(f"{where}: {path}: a name that is not UTF-8 (got {shown(value)}); rename it")
        elif isinstance(value, (dict, list)) and id(value) not in seen:
            seen.add(id(value))  # YAML's anchors may hold one list ten thousand times
            if isinstance(value, list):
                waiting += [(path, item) for item in value]
                continue
            waiting += [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
            waiting += [(path, key) for key in value]


DumpCache: typing.TypeAlias = dict[str, tuple[Any, str]]
"""Value and text of each key, shared by the calls of `dump_yaml` for many configs that differ in a few keys."""


def dump_yaml(config: Config, known: DumpCache | None = None) -> str:
    """The resolved config as YAML; `validate(type(config), parse_yaml(text, "")) == config`.

    Args:
        config: The config.
        known: Cache for many configs that differ in a few keys: a dictionary, empty at first, that is given to every
            call. The result is the same without it.
    """
    known, text = {} if known is None else known, ""
    for key in type(config).model_fields:
        value = getattr(config, key)
        if key not in known or known[key][0] is not value:
            # A fan-out writes thousands of configs that differ in two keys; YAML is slow enough to make that minutes.
            known[key] = (value, to_yaml(config.model_dump(mode="json", include={key})))
        text += known[key][1]
    return text or "{}\n"


def load(kind: type[C], path: str | Path) -> C:
    """Read a config file as a config of class `kind`. `ConfigError` as in `load_yaml` and `validate`."""
    return validate(kind, load_yaml(path), str(path))


def _explain(kind: type[Config], item: Any) -> tuple[tuple[str, ...], str]:
    """The path of a wrong key as the user wrote it, and the sentence about it."""
    parts, owners = _walk(kind, [str(part) for part in item["loc"]])
    path, got = ".".join(parts), shown(item["input"])
    fields = {key: field for model in owners for key, field in model.model_fields.items()}
    inner = models_in(fields[parts[-1]].annotation) if parts and parts[-1] in fields else []
    if item["type"] == "extra_forbidden":
        return parts, f"{path}: unknown key (value {got}); {nearest(parts[-1], fields)}"
    if item["type"].startswith("union_tag"):
        names = [model.model_fields["name"].default for model in inner]
        name = item["input"].get("name") if isinstance(item["input"], dict) else item["input"]
        if name is None:
            return parts, f"{path}.name: a name is needed (got {got}); legal: {', '.join(sorted(names))}"
        return (*parts, "name"), f"{path}.name: no variant is called {shown(name)}; {nearest(str(name), names)}"
    if item["type"] in ("model_type", "dict_type"):
        keys = dict.fromkeys(key for model in inner for key in model.model_fields)
        hint = f"; legal keys: {', '.join(keys)}" if keys else ""
        return parts, f"{path}: a mapping of keys to values is needed (got {got}){hint}"
    if item["type"] == "too_short":
        least = item["ctx"]["min_length"]
        return parts, f"{path}: give {least} value{'s' if least > 1 else ''} or more (got {got})"
    message = item["msg"].removeprefix("Value error, ")
    return parts, f"{path}: {message[0].lower() + message[1:]} (got {got})" if path else message


def _walk(kind: type[Config], loc: list[str]) -> tuple[tuple[str, ...], list[type[Config]]]:
    """A path without the names of union variants, which are pydantic's, and the classes that may own its last key."""
    path: list[str] = []
    owners: list[type[Config]] = []
    here: list[type[Config]] = [kind]
    for part in loc:
        # pydantic names the variant of a union in the path, and a user has written no such key.
        tagged = [m for m in here if "name" in m.model_fields and m.model_fields["name"].default == part]
        if tagged and len(here) > 1:
            here = tagged
            continue
        owners = here
        fields = [m.model_fields[part].annotation for m in here if part in m.model_fields]
        # a key of a free mapping is a field of none: its values are of the class that is there
        here = [model for field in fields for model in models_in(field)] if fields else here
        path.append(part)
    return tuple(path), owners


def shown(value: Any) -> str:
    """A value in an error message: its `repr`, cut where it is long."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12
_SHORT.maxlevel = 3


def models_in(annotation: Any) -> list[type[Config]]:
    """All config classes inside an annotation (Optional, Union, Annotated)."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def union_of(variants: list[type[Config]]) -> Any:
    """The annotation of a field that holds one of several configs, told apart by their `name`."""
    return Annotated[typing.Union[tuple(variants)], Field(discriminator="name")] if len(variants) > 1 else variants[0]


def run_dir_of(config: Config) -> Path:
    """The absolute run directory of a command's config. `ConfigError` when it has none."""
    run_dir = getattr(config, "run_dir", None)
    if not run_dir:
        raise ConfigError("run_dir: a job needs a run directory; give --run-dir PATH")
    return Path(expand_path(str(run_dir))).absolute()


def expand_path(path: str) -> str:
    """Expand `~` and `$VARIABLES` in a path. URLs, `pipe:` and variables that are not set here stay as they are.

    A variable such as SLURM_TMPDIR may be set only where the job runs; the path is expanded there once more.
    """
    return path if "://" in path or path.startswith("pipe:") else os.path.expandvars(os.path.expanduser(path))


PathKey = Annotated[str, AfterValidator(expand_path)]
"""A path, or a name that may be one: `~` and `$VARIABLES` are expanded when the config is read."""
