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
"""Maximum number of layers: thirty times the deepest DiT. A larger number is a typing error that would take hours to
build."""
Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
"""Number of layers."""
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A seed in the range of torch's generators."""


def _text_of(value: Any) -> Any:
    """Numbers and booleans as text, for environment variables and options; other values unchanged."""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, (int, float)) else value


Text = Annotated[str, BeforeValidator(_text_of)]
"""A text that YAML may parse as a number: `env: {OMP_NUM_THREADS: 4}`."""


class Config(BaseModel):
    """Base class of all configs: frozen, and an unknown key is an error.

    Where a file or flag gives only some keys of a group, the other keys keep the default of that group.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _merge_defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        for key, field in cls.model_fields.items():
            # Without this, a file that gives one key of a group would replace
            # the group's other defaults by those of its class.
            if isinstance(value.get(key), dict) and isinstance(field.default, Config):
                value[key] = _merge(field.default, value[key])
        return value


def _merge(default: Config, given: dict[str, Any]) -> dict[str, Any]:
    """The given keys of a group merged into its default; unchanged if they name another variant of a union."""
    merged = {
        key: getattr(default, key) for key in default.model_fields_set | {"name"} if key in type(default).model_fields
    }
    if given.get("name", merged.get("name")) != merged.get("name"):
        return given
    for key, value in given.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(value, dict) and isinstance(inner, Config) else value
    return merged


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
    check_text(values, where)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for item in error.errors(include_url=False):
            path, sentence = _explain(kind, item)
            # An error belongs to a flag when one of the two paths is a prefix
            # of the other: `--arch X` may also cause an error at `arch.depth`.
            from_flag = any(path[: len(flag)] == flag or (path and flag[: len(path)] == path) for flag in flags)
            messages.setdefault("command line" if from_flag else where, []).append(sentence)
    except RecursionError:
        messages = {where: ["values are nested too deeply for a config"]}
    raise ConfigError("\n  ".join(f"{source}: " + "\n  ".join(lines) for source, lines in messages.items()))


def check_text(values: Any, where: str) -> None:
    """Check that all texts can be written to a config file and used as file names.

    Raises:
        ConfigError: A text holds the character NUL, or is not valid Unicode.
    """
    stack: list[tuple[str, Any]] = [("", values)]
    seen: set[int] = set()
    while stack:
        path, value = stack.pop()
        if isinstance(value, str):
            if "\0" in value:
                raise ConfigError(f"{where}: {path}: a text cannot hold the character NUL (got {short_repr(value)})")
            if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
                raise ConfigError(f"{where}: {path}: a text must be valid UTF-8 (got {short_repr(value)}); rename it")
        elif isinstance(value, (dict, list)) and id(value) not in seen:
            seen.add(id(value))  # with YAML's anchors one list may occur ten thousand times
            if isinstance(value, list):
                stack += [(path, item) for item in value]
                continue
            stack += [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
            stack += [(path, key) for key in value]


DumpCache: typing.TypeAlias = dict[str, tuple[Any, str]]
"""Value and text of each key, shared by the calls of `dump_yaml` for many configs that differ in a few keys."""


def dump_yaml(config: Config, cache: DumpCache | None = None) -> str:
    """The resolved config as YAML; `validate(type(config), parse_yaml(text, "")) == config`.

    Args:
        config: The config.
        cache: For many configs that differ in a few keys: a dictionary, empty at first, that is passed to every call.
            The result is the same without it.
    """
    cache, text = {} if cache is None else cache, ""
    for key in type(config).model_fields:
        value = getattr(config, key)
        if key not in cache or cache[key][0] is not value:
            # A fan-out writes thousands of configs that differ in two keys, which takes minutes without the cache.
            cache[key] = (value, to_yaml(config.model_dump(mode="json", include={key})))
        text += cache[key][1]
    return text or "{}\n"


def load(kind: type[C], path: str | Path) -> C:
    """Read a config file as a config of class `kind`. `ConfigError` as in `load_yaml` and `validate`."""
    return validate(kind, load_yaml(path), str(path))


def _explain(kind: type[Config], item: Any) -> tuple[tuple[str, ...], str]:
    """The path of a wrong key as the user wrote it, and the error message about it."""
    parts, owners = _walk(kind, [str(part) for part in item["loc"]])
    path, got = ".".join(parts), short_repr(item["input"])
    fields = {key: field for model in owners for key, field in model.model_fields.items()}
    inner = models_in(fields[parts[-1]].annotation) if parts and parts[-1] in fields else []
    if item["type"] == "extra_forbidden":
        return parts, f"{path}: unknown key (value {got}); {nearest(parts[-1], fields)}"
    if item["type"].startswith("union_tag"):
        names = [model.model_fields["name"].default for model in inner]
        name = item["input"].get("name") if isinstance(item["input"], dict) else item["input"]
        if name is None:
            return parts, f"{path}.name: a name is needed (got {got}); legal: {', '.join(sorted(names))}"
        return (*parts, "name"), f"{path}.name: no variant is called {short_repr(name)}; {nearest(str(name), names)}"
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
    """The path without the names of union variants, which pydantic inserts, and the classes that may have its end."""
    path: list[str] = []
    owners: list[type[Config]] = []
    models: list[type[Config]] = [kind]
    for part in loc:
        # pydantic inserts the name of the union's variant into the path; users write no such key.
        tagged = [m for m in models if "name" in m.model_fields and m.model_fields["name"].default == part]
        if tagged and len(models) > 1:
            models = tagged
            continue
        owners = models
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        # A key of a free mapping is a field of no class; the classes of the mapping's values remain.
        models = [model for field in fields for model in models_in(field)] if fields else models
        path.append(part)
    return tuple(path), owners


def short_repr(value: Any) -> str:
    """The `repr` of a value for an error message, shortened if it is long."""
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
    """The annotation of a field that holds one of several configs, which their `name` distinguishes."""
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
