"""The command line of every command: `--config FILE`, dotted flags that override it, and the flags that all share.

A flag is a key of the YAML: `--optim.lr 1e-4` is `optim: {lr: 1e-4}`, with the same error messages. Values are written:

    --run-dir runs/a          a word; a dash in a key's name is an underscore in the file
    --depths 2 4 6            a list
    --launch.wait             true; also `--launch.wait false`, `--no-launch.wait`
    --engine.threads none     no value
    --arch DiT-B/2            a group of keys by its name; `--arch.num-classes 10` beside it changes one of them
    --launch.env A=1 B=2      keys of a free mapping; also `--launch.env.A 1`
    --stop '{window: 50}'     any list or mapping as YAML
"""

from __future__ import annotations

import argparse
import re
import sys
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias, get_args, get_origin

from fine_dist.core import logs
from fine_dist.core.config import C, Config, models_in, shown, validate
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.help import alternatives, every_setting, flags_page, has_a_name, summary, value_of_mapping
from fine_dist.core.yaml_files import load_yaml, parse_word


class Call(NamedTuple):
    """A parsed command line: the config, and the flags that are not part of it."""

    config: Any
    dry_run: bool
    launcher: str
    options: argparse.Namespace


Options: TypeAlias = Callable[[argparse.ArgumentParser], None]
_FLAG = re.compile(r"--[A-Za-z_]")


def parse(
    kind: type[C],
    argv: list[str] | None,
    prog: str,
    default: str | None = None,
    options: Options | None = None,
    notes: Callable[[], list[str]] | None = None,
) -> Call:
    """Parse a command line: `--config FILE`, dotted flags that override it, and the flags that every command has.

    Args:
        kind: The command's config class; its docstring is the command's description.
        argv: Arguments without the program's name. None: those of this process.
        prog: What a user types to run the command, such as `fine-dist condense`.
        default: A config file that is read when `--config` is not given.
        options: Adds the command's own flags, which are not part of the config.
        notes: Further lines of the short help, such as a list of methods.

    Returns:
        The config and the flags. `--help` and `--help-all` print their page and end the program instead.

    Raises:
        ConfigError: A flag, a value or the file is wrong; the message names the legal values.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher and torch.distributed.launch add this for every rank; the environment says the same.
    argv = [word for word in argv if not re.fullmatch(r"--local[_-]rank=\d+", word)]
    own = _own_flags(prog, default, options)
    if {"-h", "--help", "--help-all"} & {*argv}:
        print(every_setting(kind, prog, own) if "--help-all" in argv else summary(kind, prog, own, notes))
        raise SystemExit(0)
    # argparse sees only flags that it knows: it would take the value of an unknown one for a positional argument.
    for_own, settings = _split(own, argv)
    known = own.parse_args(for_own)
    logs.configure(known)
    values = load_yaml(known.config) if known.config else {}
    more = [option for action in own._actions for option in action.option_strings if option.startswith("--")]
    values, paths = _lay_over(kind, values, settings, more)
    config = validate(kind, values, known.config or "config", paths)
    return Call(config, known.dry_run, known.launcher, known)


class FlagParser(argparse.ArgumentParser):
    """argparse for flags that are not settings, with one-line errors and our own `--help` and `--help-all`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, add_help=False, usage=argparse.SUPPRESS, allow_abbrev=False)

    def answer_help(self, argv: list[str], usage: str, about: str) -> None:
        """Print all flags and end the program if `argv` asks for help; for commands that have few flags."""
        if {"-h", "--help", "--help-all"} & {*argv}:
            print(flags_page(self, usage, about))
            raise SystemExit(0)

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse flags.

        Raises:
            ConfigError: A flag does not exist; the message suggests the nearest that does.
        """
        known, unknown = self.parse_known_args(argv)
        if unknown:
            legal = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"command line: {unknown[0]!r} is no flag of {self.prog}; {nearest(unknown[0], legal)}")
        return known

    def error(self, message: str) -> NoReturn:
        """What argparse finds wrong as a `ConfigError`."""
        words = re.fullmatch(r"argument (--[\w-]+).*?: (.*)", message)
        if words and words[2].startswith("expected"):
            raise ConfigError(f"command line: {words[1]}: a value is needed after it")
        if words:
            raise ConfigError(f"command line: {words[1]}: {words[2]}")
        raise ConfigError(f"command line: {message}")


def _own_flags(prog: str, default: str | None, options: Options | None) -> FlagParser:
    own = FlagParser(prog)
    instead = f" (default: {default})" if default else ""
    own.add_argument("--config", metavar="FILE", default=default, help=f"YAML file of settings{instead}")
    own.add_argument("--dry-run", action="store_true", help="print the resolved config and estimates; do nothing")
    own.add_argument(
        "--launcher",
        metavar="NAME",
        default="auto",
        help="where it runs (default: auto, which is Ray in a Ray job, SLURM in an allocation, else local; "
        "here: this process)",
    )
    own.add_argument("--for", metavar="DEVICE", dest="device", help="with --dry-run or plan: the device that estimates "
                     "assume, such as gpu:h100 or cpu:16 (default: the one that the job will use)")  # fmt: skip
    if options:
        options(own)
    logs.add_flags(own)
    return own


class _Setting(NamedTuple):
    """A flag as it was typed, without its dashes, and its words."""

    name: str
    words: list[str]


def _split(own: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[_Setting]]:
    """Separate the words that argparse reads from the settings."""
    mine = own._option_string_actions
    for_own: list[str] = []
    settings: list[_Setting] = []
    taking: list[str] | None = None
    sealed = ""
    for word in argv:
        name, equals, value = word.partition("=")
        if _FLAG.match(word):
            if name in mine:
                for_own.append(word)
                taking = for_own
            else:
                settings.append(_Setting(name[2:], [value] if equals else []))
                taking = settings[-1].words
            # After `--key=value` the value is complete, and a further
            # word is a mistake: most likely a space after a comma.
            sealed = word if equals else ""
        elif taking is None or sealed:
            after = f" after {sealed}" if sealed else ""
            raise ConfigError(
                f"command line: {word!r}{after} belongs to no setting; a setting is written --KEY VALUE "
                "(--help lists the keys)"
            )
        else:
            taking.append(word)
    return for_own, settings


# --- settings over the values of the file --------------------------------------------------------------------------


def _lay_over(
    kind: type[Config], values: dict[str, Any], settings: list[_Setting], more: list[str]
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The file's values overridden by the settings of the command line, and the paths of those settings.

    Values are not checked here (`validate` does that). A flag that names a whole group is applied first, wherever it
    stands, so that flags of single keys change the group that it names.
    """
    values = dict(values)
    found = [(*_locate(kind, setting), setting) for setting in settings]
    paths = []
    for path, annotation, off, setting in sorted(found, key=lambda each: not _names_a_group(each[0], each[1])):
        if annotation is None and len(path) == 1:
            got = shown(_free(setting.words))
            legal = [*kind.model_fields, *(option[2:] for option in more)]
            raise ConfigError(f"command line: {path[0]}: unknown key (value {got}); {nearest(setting.name, legal)}")
        if off and setting.words:
            raise ConfigError(f"command line: --{setting.name} takes no value (got {shown(setting.words)})")
        value = False if off else _value(".".join(path), annotation, setting.words)
        _put(values, path, value)
        paths.append(path)
    return values, paths


def _locate(kind: type[Config], setting: _Setting) -> tuple[tuple[str, ...], Any, bool]:
    """The path of a flag's key, its annotation (None: there is no such key), and whether `no-` turns it off."""
    path, annotation = _follow(kind, setting.name.split("."))
    if annotation is None:
        parts = setting.name.split(".")
        for at in {0, len(parts) - 1}:
            if parts[at].startswith(("no-", "no_")):
                plain, found = _follow(kind, [*parts[:at], parts[at][3:], *parts[at + 1 :]])
                if found is not None and bool in alternatives(found):
                    return plain, found, True
    return path, annotation, False


def _follow(kind: type[Config], parts: list[str]) -> tuple[tuple[str, ...], Any]:
    path: list[str] = []
    here: Any = kind
    for part in parts:
        key = part.replace("-", "_")
        options = alternatives(here) if here is not None else []
        owners = [each for each in options if isinstance(each, type) and issubclass(each, Config)]
        fields = [model.model_fields[key].annotation for model in owners if key in model.model_fields]
        inner = [value_of_mapping(each) for each in options if get_origin(each) is dict]
        if key == "name" and not fields and has_a_name(owners):
            fields = [str]
        path.append(key if owners or not inner else part)
        # variants of a union that share a key may mean different things by it: each alternative is one of theirs
        here = (
            (typing.Union[tuple(fields)] if len(fields) > 1 else fields[0]) if fields else inner[0] if inner else None
        )
    return tuple(path), here


def _names_a_group(path: tuple[str, ...], annotation: Any) -> bool:
    return path[-1] == "name" or any(models_in(each) for each in alternatives(annotation) if annotation is not None)


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a key in nested mappings. Mappings of the file are copied first, because YAML's anchors may share them."""
    here = values
    for part in path[:-1]:
        inner = here.get(part)
        if isinstance(inner, str):
            inner = {"name": inner}
        elif inner is not None and not isinstance(inner, dict):
            return  # the file's value is wrong already, and is what gets named
        here[part] = here = dict(inner or {})
    key = path[-1]
    if key == "name" and here.get("name", value) != value:
        here.clear()  # another variant: the other keys in the file are those of the one before
    if isinstance(value, dict) and isinstance(here.get(key), dict):
        value = {**here[key], **value}
    here[key] = value


def _value(path: str, annotation: Any, words: list[str]) -> Any:
    """The words of a flag as a value of its key's type; one that does not fit stays text for `validate` to name."""
    options = [] if annotation is None else alternatives(annotation)
    origins = {get_origin(each) for each in options}
    literals = [value for each in options if get_origin(each) is not dict for value in _literal(each)]
    one = words[0] if len(words) == 1 else None
    if one is not None and one.lower() in ("none", "null") and type(None) in options and one not in literals:
        return None
    if not options:
        return _free(words)
    if one is not None and one[:1] in "[{" and not {str} >= {*options} - {type(None)}:
        return parse_word(one)
    if origins & {tuple, list}:
        item = next(get_args(each)[0] for each in options if get_origin(each) in (tuple, list))
        return [_value(path, item, [word]) for word in words]
    if dict in origins:
        return _pairs(path, options, words)
    if not words:
        if bool in options:
            return True
        raise ConfigError(f"command line: {path}: a value is needed after --{path.replace('_', '-')}")
    if one is None:
        raise ConfigError(f"command line: {path}: one value is needed (got {len(words)}: {' '.join(words)})")
    if one in literals or any(models_in(each) for each in options) or (str in options and len(options) < 3):
        return one
    return next((value for value in literals if str(value) == one), parse_word(one))


def _pairs(path: str, options: list[Any], words: list[str]) -> dict[str, Any]:
    """`A=1 B=2`, or `A 1 B 2`, as a mapping."""
    item = next(value_of_mapping(each) for each in options if get_origin(each) is dict)
    if words and not any("=" in word for word in words) and len(words) % 2 == 0:
        pairs = list(zip(words[::2], words[1::2]))
    else:
        bad = [word for word in words if not word.partition("=")[0] or "=" not in word]
        if bad:
            raise ConfigError(f"command line: {path}: pairs KEY=VALUE are needed (got {bad[0]!r})")
        pairs = [(key, value) for key, _, value in (word.partition("=") for word in words)]
    return {key: _value(f"{path}.{key}", item, [value]) for key, value in pairs}


def _literal(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if str(get_origin(annotation)) == "typing.Literal" else ()


def _free(words: list[str]) -> Any:
    """The words of an unknown flag as YAML reads them, for the error message."""
    values = [parse_word(word) for word in words]
    return values[0] if len(values) == 1 else values or True
