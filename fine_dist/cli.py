"""The command line of every command: `--config FILE`, dotted flags over it, and the flags that all share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from fine_dist.config import C, Config, load_yaml, models_in, validate
from fine_dist.errors import ConfigError, nearest


class Call(NamedTuple):
    """What a user asked of a command besides its config."""

    config: Any
    dry_run: bool
    launcher: str
    options: argparse.Namespace


Options: TypeAlias = Callable[[argparse.ArgumentParser], None]


def parse(
    kind: type[C], argv: list[str] | None, prog: str, default: str | None = None, options: Options | None = None
) -> Call:
    """Read `--config FILE`, dotted flags over it, and the flags every command has.

    kind:    the command's config class; its docstring is the command's description.
    argv:    arguments without the program's name (None: sys.argv).
    default: a config file that is read when `--config` is not given.
    options: adds the command's own flags (they are not part of the config).

    Exits with code 2 after one message when anything is wrong, as argparse does.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    # The deepspeed launcher adds this to every rank's arguments; the environment says the same.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    common = argparse.ArgumentParser(prog=prog, add_help=False, usage=argparse.SUPPRESS, allow_abbrev=False)
    common.add_argument("--config", metavar="FILE", default=default, help=f"YAML file (default: {default})")
    common.add_argument("--dry-run", action="store_true", help="print the resolved config and estimates; do nothing")
    common.add_argument(
        "--launcher",
        metavar="NAME",
        default="auto",
        help="where it runs: auto (Ray in a Ray job, SLURM in an allocation, else local), local, slurm, ray, or here "
        "(this process; default: auto)",
    )
    if options:
        options(common)
    if "-h" in argv or "--help" in argv:
        print(f"usage: {prog} [--config FILE] [--dry-run] [--launcher NAME] [--KEY.KEY VALUE ...]\n")
        print(common.format_help().strip() + "\n\nconfig keys, each also a flag:")
        _print_variants(kind)
        tyro.cli(kind, args=["--help"], prog=prog, default=kind(), config=(tyro.conf.AvoidSubcommands,))
    known, rest = common.parse_known_args(argv)
    values = load_yaml(known.config) if known.config else {}
    values, rest = _take_names(kind, values, rest)
    values = _pick_variants(kind, values, rest)
    base = validate(kind, values, known.config or "config")
    config = tyro.cli(kind, args=rest, prog=prog, default=base, config=(tyro.conf.AvoidSubcommands,))
    return Call(config, known.dry_run, known.launcher, known)


def _take_names(kind: type[Config], values: dict[str, Any], argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--arch DiT-B/2-L6`: a group of keys that may be written as one name in YAML may be so on the command line."""
    values, rest = dict(values), []
    words = iter(argv)
    for word in words:
        key, _, value = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        group = word.startswith("--") and key in kind.model_fields and models_in(kind.model_fields[key].annotation)
        if group:
            values[key] = value or next(words, "")
        else:
            rest.append(word)
    return values, rest


def _pick_variants(kind: type[Config], values: dict[str, Any], argv: list[str]) -> dict[str, Any]:
    """Let `--method.name X` choose another variant of a union: its other keys in the file no longer apply."""
    values = dict(values)
    for key, field in kind.model_fields.items():
        variants = models_in(field.annotation)
        flag = f"--{key}.name"
        chosen = next((a.split("=", 1)[1] for a in argv if a.startswith(flag + "=")), None)
        if flag in argv and argv.index(flag) + 1 < len(argv):
            chosen = argv[argv.index(flag) + 1]
        if len(variants) < 2 or chosen is None:
            continue
        names = [m.model_fields["name"].default for m in variants]
        if chosen not in names:
            raise ConfigError(f"{key}.name: no such variant (got {chosen!r}); {nearest(chosen, names)}")
        current = values.get(key)
        current = current if isinstance(current, dict) else {}
        values[key] = current if current.get("name") == chosen else {"name": chosen}
    return values


def _print_variants(kind: type[Config]) -> None:
    """The keys of a union's other variants, which one help screen of tyro cannot show."""
    for key, field in kind.model_fields.items():
        variants = models_in(field.annotation)
        for model in variants if len(variants) > 1 else ():
            name = model.model_fields["name"].default
            print(f"  --{key}.name {name}: {(model.__doc__ or '').strip().partition(chr(10))[0]}")
            for part, info in model.model_fields.items():
                if part != "name":
                    flag = f"--{key}.{part.replace('_', '-')}"
                    print(f"      {flag:32} {' '.join((info.description or '').split())} (default: {info.default})")
