"""The command line of every command: `--config FILE`, dotted flags that override it, and flags common to all commands.

A flag is a key of the YAML: `--optim.lr 1e-4` is `optim: {lr: 1e-4}`, with the same error messages. Values are written:

    --run-dir runs/a          text; a dash in a key's name is an underscore in the file
    --depths 2 4 6            a list
    --launch.wait             true; also `--launch.wait false`, `--no-launch.wait`
    --engine.threads none     null
    --arch DiT-B/2            a group of keys by its name; `--arch.num-classes 10` changes one of them
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
from fine_dist.core.config import C, Config, models_in, short_repr, validate
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.help import alternatives, every_setting, flags_page, is_named, summary, value_of_mapping
from fine_dist.core.yaml_files import load_yaml, parse_value


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
    """Parse a command line: `--config FILE`, dotted flags that override it, and the flags of the command.

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
    # The deepspeed launcher and torch.distributed.launch add this flag on every rank; LOCAL_RANK holds the same.
    argv = [arg for arg in argv if not re.fullmatch(r"--local[_-]rank=\d+", arg)]
    parser = _command_parser(prog, default, options)
    if {"-h", "--help", "--help-all"} & {*argv}:
        print(every_setting(kind, prog, parser) if "--help-all" in argv else summary(kind, prog, parser, notes))
        raise SystemExit(0)
    # argparse gets only the flags that it knows, because it would read the value of an unknown flag as a positional.
    parser_argv, flags = _split(parser, argv)
    parsed = parser.parse_args(parser_argv)
    logs.configure(parsed)
    values = load_yaml(parsed.config) if parsed.config else {}
    command_flags = [option for action in parser._actions for option in action.option_strings if option[:2] == "--"]
    values, paths = _override(kind, values, flags, command_flags)
    config = validate(kind, values, parsed.config or "config", paths)
    return Call(config, parsed.dry_run, parsed.launcher, parsed)


class FlagParser(argparse.ArgumentParser):
    """An argparse parser of flags that are not settings, with one-line errors and this module's `--help`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, add_help=False, usage=argparse.SUPPRESS, allow_abbrev=False)

    def exit_if_help(self, argv: list[str], usage: str, about: str) -> None:
        """Print all flags and end the program if `argv` asks for help; for commands that have few flags."""
        if {"-h", "--help", "--help-all"} & {*argv}:
            print(flags_page(self, usage, about))
            raise SystemExit(0)

    def parse_flags(self, argv: list[str]) -> argparse.Namespace:
        """Parse flags.

        Raises:
            ConfigError: A flag does not exist; the message suggests the nearest that does.
        """
        known, unknown = self.parse_known_args(argv)
        if unknown:
            legal = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(
                f"command line: {unknown[0]!r} is not a flag of {self.prog}; {nearest(unknown[0], legal)}"
            )
        return known

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error as a `ConfigError`."""
        match = re.fullmatch(r"argument (--[\w-]+).*?: (.*)", message)
        if match and match[2].startswith("expected"):
            raise ConfigError(f"command line: {match[1]}: a value is needed after it")
        if match:
            raise ConfigError(f"command line: {match[1]}: {match[2]}")
        raise ConfigError(f"command line: {message}")


def _command_parser(prog: str, default: str | None, options: Options | None) -> FlagParser:
    parser = FlagParser(prog)
    suffix = f" (default: {default})" if default else ""
    parser.add_argument("--config", metavar="FILE", default=default, help=f"YAML file of settings{suffix}")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and estimates; do nothing")
    parser.add_argument(
        "--launcher",
        metavar="NAME",
        default="auto",
        help="where the command runs (default: auto, which is Ray in a Ray job, SLURM in an allocation, else local; "
        "here: this process)",
    )
    parser.add_argument(
        "--for",
        metavar="DEVICE",
        dest="device",
        help="with --dry-run or plan: the device that estimates assume, such as gpu:h100 or cpu:16 (default: the one "
        "that the job will use)",
    )
    if options:
        options(parser)
    logs.add_flags(parser)
    return parser


class _Flag(NamedTuple):
    """A flag of a setting as it was typed, without its dashes, and the arguments after it."""

    name: str
    args: list[str]


def _split(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], list[_Flag]]:
    """Split arguments into those for argparse and the flags of settings."""
    parser_argv: list[str] = []
    flags: list[_Flag] = []
    current: list[str] | None = None  # where the arguments of the last flag are collected
    complete = ""
    for arg in argv:
        name, equals, value = arg.partition("=")
        if _FLAG.match(arg):
            if name in parser._option_string_actions:
                parser_argv.append(arg)
                current = parser_argv
            else:
                flags.append(_Flag(name[2:], [value] if equals else []))
                current = flags[-1].args
            # After `--key=value` the value is complete, and a further
            # argument is a mistake: most likely a space after a comma.
            complete = arg if equals else ""
        elif current is None or complete:
            after = f" after {complete}" if complete else ""
            raise ConfigError(
                f"command line: {arg!r}{after} belongs to no setting; a setting is written --KEY VALUE "
                "(--help lists the keys)"
            )
        else:
            current.append(arg)
    return parser_argv, flags


# --- overriding the values of the file -----------------------------------------------------------------------------


def _override(
    kind: type[Config], values: dict[str, Any], flags: list[_Flag], command_flags: list[str]
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """The file's values overridden by the flags of settings, and the paths of the overridden keys.

    Values are not checked here (`validate` does that). Flags that name a whole group are applied first, in any order of
    the command line, so that flags of single keys change the named group.
    """
    values = dict(values)
    located = [(*_locate(kind, flag), flag) for flag in flags]
    paths = []
    for path, annotation, off, flag in sorted(located, key=lambda each: not _names_a_group(each[0], each[1])):
        if annotation is None and len(path) == 1:
            got = short_repr(_untyped(flag.args))
            legal = [*kind.model_fields, *(option[2:] for option in command_flags)]
            raise ConfigError(f"command line: {path[0]}: unknown key (value {got}); {nearest(flag.name, legal)}")
        if off and flag.args:
            raise ConfigError(f"command line: --{flag.name} takes no value (got {short_repr(flag.args)})")
        value = False if off else _value(".".join(path), annotation, flag.args)
        _put(values, path, value)
        paths.append(path)
    return values, paths


def _locate(kind: type[Config], flag: _Flag) -> tuple[tuple[str, ...], Any, bool]:
    """The path of a flag's key, its annotation (None: there is no such key), and whether `no-` turns it off."""
    path, annotation = _resolve(kind, flag.name.split("."))
    if annotation is None:
        parts = flag.name.split(".")
        for i in {0, len(parts) - 1}:  # `--no-launch.wait` and `--launch.no-wait`
            if parts[i].startswith(("no-", "no_")):
                positive, inner = _resolve(kind, [*parts[:i], parts[i][3:], *parts[i + 1 :]])
                if inner is not None and bool in alternatives(inner):
                    return positive, inner, True
    return path, annotation, False


def _resolve(kind: type[Config], parts: list[str]) -> tuple[tuple[str, ...], Any]:
    """The path of keys and the annotation of the last; None where there is no such key."""
    path: list[str] = []
    annotation: Any = kind
    for part in parts:
        key = part.replace("-", "_")
        options = alternatives(annotation) if annotation is not None else []
        owners = [each for each in options if isinstance(each, type) and issubclass(each, Config)]
        fields = [model.model_fields[key].annotation for model in owners if key in model.model_fields]
        inner = [value_of_mapping(each) for each in options if get_origin(each) is dict]
        if key == "name" and not fields and is_named(owners):
            fields = [str]
        path.append(key if owners or not inner else part)
        # Variants of a union may have the same key with different types; any of these types is accepted here.
        if fields:
            annotation = typing.Union[tuple(fields)] if len(fields) > 1 else fields[0]
        else:
            annotation = inner[0] if inner else None
    return tuple(path), annotation


def _names_a_group(path: tuple[str, ...], annotation: Any) -> bool:
    return path[-1] == "name" or any(models_in(each) for each in alternatives(annotation) if annotation is not None)


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a key in nested mappings. Mappings of the file are copied first, because YAML's anchors may share them."""
    group = values
    for part in path[:-1]:
        inner = group.get(part)
        if isinstance(inner, str):
            inner = {"name": inner}
        elif inner is not None and not isinstance(inner, dict):
            return  # the file's value is illegal, and `validate` reports it
        group[part] = group = dict(inner or {})
    key = path[-1]
    if key == "name" and group.get("name", value) != value:
        group.clear()  # another variant: the file's other keys belong to the variant that it replaces
    if isinstance(value, dict) and isinstance(group.get(key), dict):
        value = {**group[key], **value}
    group[key] = value


def _value(path: str, annotation: Any, args: list[str]) -> Any:
    """The arguments of a flag as a value of its key's type; text that does not fit stays text, for `validate`."""
    options = [] if annotation is None else alternatives(annotation)
    origins = {get_origin(each) for each in options}
    literals = [value for each in options if get_origin(each) is not dict for value in _literal(each)]
    one = args[0] if len(args) == 1 else None
    if one is not None and one.lower() in ("none", "null") and type(None) in options and one not in literals:
        return None
    if not options:
        return _untyped(args)
    if one is not None and one[:1] in "[{" and not {str} >= {*options} - {type(None)}:
        return parse_value(one)
    if origins & {tuple, list}:
        item = next(get_args(each)[0] for each in options if get_origin(each) in (tuple, list))
        return [_value(path, item, [arg]) for arg in args]
    if dict in origins:
        return _pairs(path, options, args)
    if not args:
        if bool in options:
            return True
        raise ConfigError(f"command line: {path}: a value is needed after --{path.replace('_', '-')}")
    if one is None:
        raise ConfigError(f"command line: {path}: one value is needed (got {len(args)}: {' '.join(args)})")
    if one in literals or any(models_in(each) for each in options) or (str in options and len(options) < 3):
        return one
    return next((value for value in literals if str(value) == one), parse_value(one))


def _pairs(path: str, options: list[Any], args: list[str]) -> dict[str, Any]:
    """`A=1 B=2`, or `A 1 B 2`, as a mapping."""
    item = next(value_of_mapping(each) for each in options if get_origin(each) is dict)
    if args and not any("=" in arg for arg in args) and len(args) % 2 == 0:
        pairs = list(zip(args[::2], args[1::2]))
    else:
        bad = [arg for arg in args if not arg.partition("=")[0] or "=" not in arg]
        if bad:
            raise ConfigError(f"command line: {path}: pairs KEY=VALUE are needed (got {bad[0]!r})")
        pairs = [(key, value) for key, _, value in (arg.partition("=") for arg in args)]
    return {key: _value(f"{path}.{key}", item, [value]) for key, value in pairs}


def _literal(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if str(get_origin(annotation)) == "typing.Literal" else ()


def _untyped(args: list[str]) -> Any:
    """The arguments of an unknown flag, parsed as YAML, for the error message."""
    values = [parse_value(arg) for arg in args]
    return values[0] if len(values) == 1 else values or True
