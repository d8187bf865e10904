"""The pages of `--help` (a summary, examples, the most used settings) and `--help-all` (every setting).

Examples and most used settings of each command are in the table `PAGES`; the tests parse every example.
"""

from __future__ import annotations

import argparse
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args, get_origin

from pydantic_core import PydanticUndefined

from fine_dist.core.config import Config, models_in

WIDTH = 110
_FLAGS = 34


@dataclass(frozen=True)
class Page:
    """The part of a command's short help that cannot be generated.

    examples: arguments after the program's name.
    usual: paths of the settings used most.
    """

    examples: tuple[str, ...]
    usual: tuple[str, ...]


_STAGE = ("run_dir", "data.shards", "data.held_out", "steps", "batch", "optim.lr", "seed")
PAGES = {
    "encode": Page(
        (
            "--config configs/encode/digits.yaml",
            "--source photos --out data/photos --image-size 256 --codec vae",
            "--verify data/photos/train",
        ),
        ("source", "out", "split", "codec", "vae", "image_size", "kind", "background", "max_bad_fraction", "workers"),
    ),
    "condense": Page(
        (
            "--config configs/condense/dit_b.yaml --dry-run",
            "--config configs/condense/dit_b.yaml --method.rank 384 --run-dir runs/condense/r384",
            "--arch DiT-S/2 --data.shards data/imagenet256/train --steps 1000",
        ),
        (*_STAGE, "arch", "method.name", "method.rank", "ancestor", "engine.precision", "launch.processes"),
    ),
    "init": Page(
        (
            "--config configs/init/dit_b_family.yaml --dry-run",
            "--parent runs/condense/dit_b/learngene --data.shards data/imagenet256/train --depths 4 6 8",
            "--list runs/init/dit_b",
        ),
        ("run_dir", "parent", "depths", "data.shards", "seeds", "lrs", "variants", "steps", "batch", "optim.lr"),
    ),
    "creative": Page(
        (
            "--config configs/creative/tiny.yaml",
            "--encoders models/sd3 --run-dir runs/creative/sd3 --seeds 0 1 2",
            "--evaluate runs/creative/sd3",
        ),
        ("run_dir", "encoders", "token", "start", "seeds", "concepts", "pairs", "steps", "batch", "optim.lr"),
    ),
    "train": Page(
        (
            "--config configs/train/dit_b.yaml",
            "--parent runs/init/dit_b/L6-s0-lr0.01 --data.shards data/imagenet256/train --steps 100000",
            "--arch DiT-B/2-L6 --data.shards data/imagenet256/train --steps 300000 --run-dir runs/train/scratch",
        ),
        (*_STAGE, "parent", "arch", "method.name", "engine.precision", "engine.backend", "launch.processes"),
    ),
    "sample": Page(
        (
            "--model runs/train/dit_b_l6 --classes 1 7 9 --per-class 4 --sampler.guidance 4",
            "--model models/DiT-XL-2-256 --vae models/sd-vae --formats npz --classes balanced --count 50000",
            "--compare runs/train/a runs/train/b --classes balanced --count 10",
        ),
        (
            *("model", "compare", "run_dir", "classes", "per_class", "count", "formats", "vae", "seed", "weights"),
            *("sampler.scheduler", "sampler.steps", "sampler.guidance"),
        ),
    ),
    "evaluate": Page(
        (
            "--models runs/train/a runs/train/b --data.held-out data/imagenet256/held_out",
            "--models runs/samples/samples.npz --metrics fid sfid is --reference VIRTUAL_imagenet256_labeled.npz "
            "--features.inception pt_inception-2015-12-05-6726825d.pth",
            "--models runs/train/a --data.shards data/digits/train --features.classifier runs/demo/features",
        ),
        (
            *("models", "metrics", "run_dir", "reference", "features.inception", "features.classifier", "samples"),
            *("data.held_out", "vae", "seed", "weights", "sampler.steps", "sampler.guidance"),
        ),
    ),
    "export": Page(
        (
            "--model runs/init/dit_b/L6-s0-lr0.01 --out models/l6",
            "--model runs/train/dit_b_l6 --to diffusers --vae stabilityai/sd-vae-ft-ema --out models/l6_pipeline",
            "--model runs/condense/dit_b --to dit --out models/ancestor.pt",
        ),
        ("model", "out", "to", "vae", "weights", "learngene"),
    ),
    "study": Page(
        (
            "--template mine.yaml",
            "--config mine.yaml --dry-run",
            "--config configs/benchmark/digits.yaml --set seeds=[0]",
        ),
        ("data.shards", "data.held_out", "ancestor", "arch", "depths", "methods", "seeds", "budget", "run_dir"),
    ),
    "doctor": Page(
        ("", "--launcher slurm --launch.gpus 1", "--run-dir /scratch/me/doctor --launcher slurm --launch.nodes 2"),
        ("run_dir", "launch.nodes", "launch.gpus"),
    ),
    "demo": Page(
        ("", "--seeds 3 --run-dir runs/demo3", "--steps A=300 C=100 --no-controls"),
        ("run_dir", "seeds", "steps", "controls", "parallel"),
    ),
}


def summary(
    kind: type[Config], prog: str, own: argparse.ArgumentParser, notes: Callable[[], list[str]] | None = None
) -> str:
    """The short help of a command.

    Args:
        kind: Its config class.
        prog: What a user types to run it.
        own: Its flags that are not settings.
        notes: Returns further lines, such as a list of methods.
    """
    page = PAGES.get(re.split(r"[ .]", prog)[-1]) or Page((), tuple(kind.model_fields))
    all_settings = list(settings(kind))
    lines = _head(kind, prog)
    if page.examples:
        lines += ["", "examples:", *(f"  {prog} {arguments}".rstrip() for arguments in page.examples)]
    lines += ["", "the settings used most (keys of the YAML, and flags):"]
    for key in page.usual:
        matches = [each for each in all_settings if each.path == key]  # none for a group, several for a union
        if len(matches) > 1 and key.endswith(".name"):
            names = "the list below" if notes else ", ".join(each.shape for each in matches)
            about = f"One of {names}. (default: {matches[0].shape})"
            lines += replace(matches[0], shape="NAME", about=about).lines()
        elif matches:
            lines += matches[0].lines()
    lines += ["", "flags of the command:", *_own_lines(own)]
    if notes:
        lines += ["", *notes()]
    return "\n".join([*lines, "", f"--help-all lists all {len(all_settings)} settings."])


def flags_page(own: argparse.ArgumentParser, usage: str, about: str) -> str:
    """The help page of a command that has flags but no settings."""
    return "\n".join([f"usage: {own.prog} {usage}", "", *textwrap.wrap(about, WIDTH), "", *_own_lines(own)])


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of names and descriptions, in the same two columns as flags and their help."""
    return [line for name, about in rows for line in _columns(name, about)]


def every_setting(kind: type[Config], prog: str, own: argparse.ArgumentParser) -> str:
    """The long help of a command: all settings by group. Arguments as in `summary`."""
    lines = [*_head(kind, prog), "", "flags of the command:", *_own_lines(own)]
    group = None
    for setting in settings(kind):
        if setting.group != group:
            group = setting.group
            lines += ["", f"{group}:" if group else "settings (keys of the YAML, and flags):"]
        lines += setting.lines()
    return "\n".join(lines)


def _head(kind: type[Config], prog: str) -> list[str]:
    about = " ".join((kind.__doc__ or "").split())
    return [
        f"usage: {prog} [--config FILE] [--dry-run] [--launcher NAME] [--KEY VALUE ...]",
        "",
        *textwrap.wrap(about, WIDTH),
    ]


def _own_lines(own: argparse.ArgumentParser) -> list[str]:
    lines = []
    for action in own._actions:
        shape = "" if action.nargs == 0 else f" {_shape_of_flag(action)}"
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest.upper())
        lines += _columns(name + (f" [{shape[1:]}]" if action.nargs == "?" else shape).rstrip(), action.help or "")
    return lines + _columns("--help, --help-all", "print this page, briefly or with every setting")


def _shape_of_flag(action: argparse.Action) -> str:
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or action.dest.upper(),)
    if isinstance(action.nargs, int):
        names = tuple(names[0] for _ in range(action.nargs)) if len(names) == 1 else names
    shape = "|".join(map(str, action.choices)) if action.choices else " ".join(map(str, names))
    return f"{shape} ..." if action.nargs in ("+", "*") else "" if not action.option_strings else shape


def _columns(left: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, WIDTH - _FLAGS - 3) or [""]
    first = (
        [f"  {left:{_FLAGS}} {wrapped[0]}"] if len(left) <= _FLAGS else [f"  {left}", " " * (_FLAGS + 3) + wrapped[0]]
    )
    return [*first, *(" " * (_FLAGS + 3) + line for line in wrapped[1:])]


@dataclass(frozen=True)
class Setting:
    """One setting in the help.

    path: its keys, joined by dots.
    group: heading under which it is listed.
    shape: how its value is written.
    about: its description, with the default.
    """

    path: str
    group: str
    shape: str
    about: str

    def lines(self) -> list[str]:
        """Lines with the flag, the shape of its value, and its description."""
        return _columns(f"--{self.path.replace('_', '-')} {self.shape}".rstrip(), self.about)


def settings(kind: type[Config], path: tuple[str, ...] = (), default: Any = None) -> Iterator[Setting]:
    """All settings of a config class: a group's own keys first, then the groups in it, with all variants of a union.

    Args:
        kind: The config class.
        path: Keys of the group that `kind` is.
        default: Config with the defaults of the group. None: the defaults of the class.
    """
    groups = []
    for key, field in kind.model_fields.items():
        here = (*path, key)
        options = alternatives(field.annotation)
        models = [each for each in options if isinstance(each, type) and issubclass(each, Config)]
        inner = [model for each in options if get_origin(each) is dict for model in models_in(value_of_mapping(each))]
        value = getattr(default, key, PydanticUndefined) if default is not None else field.default
        about = " ".join((field.description or "").split())
        if (not models and not inner) or is_named(models):
            yield Setting(".".join(here), ".".join(path), shape_of(field.annotation), about + _default(value))
        for model in models:
            groups.append((model, here, value if isinstance(value, model) else None, len(models) > 1))
        groups += [(model, (*here, "NAME"), None, False) for model in inner]
    for model, here, group_default, variant in groups:
        inner_settings = settings(model, here, group_default)
        if not variant:
            yield from inner_settings
            continue
        name = model.model_fields["name"].default
        for each in inner_settings:
            about = " ".join((model.__doc__ or "").split()) if each.path.endswith(".name") else each.about
            shape = name if each.path == ".".join((*here, "name")) else each.shape
            yield Setting(each.path, f"{each.group}, with --{'.'.join(here)}.name {name}", shape, about)


def is_named(models: list[type[Config]]) -> bool:
    """Whether a group may be given as one name (`--arch DiT-B/2`)."""
    return any(getattr(model, "BY_NAME", False) for model in models)


def _default(value: Any) -> str:
    if value is PydanticUndefined or isinstance(value, Config):
        return ""
    if isinstance(value, (tuple, list)):
        value = " ".join(map(str, value)) or "empty"
    if isinstance(value, bool):
        value = str(value).lower()
    return f" (default: {'none' if value is None else value})"


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union annotation; of any other annotation, a list with that one."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [each for part in get_args(annotation) for each in alternatives(part)]
    return [annotation]


def value_of_mapping(annotation: Any) -> Any:
    """The type X of the values of a `dict[str, X]`."""
    return get_args(annotation)[1]


def shape_of(annotation: Any) -> str:
    """How a value is written: `NUMBER|none`, `fp32|bf16`, `INT ...`."""
    names = {str: "TEXT", int: "INT", float: "NUMBER", bool: "[true|false]", type(None): "none"}
    shapes = []
    for each in alternatives(annotation):
        origin = get_origin(each)
        if str(origin) == "typing.Literal":
            shapes += [str(value) for value in get_args(each)]
        elif origin in (tuple, list):
            item = shape_of(get_args(each)[0])
            fixed = origin is tuple and Ellipsis not in get_args(each)
            shapes.append(" ".join([item] * len(get_args(each))) if fixed else f"{item} ...")
        elif origin is dict:
            shapes.append("KEY=VALUE ...")
        else:
            shapes.append(names.get(each, "NAME"))
    return "|".join(dict.fromkeys(shapes))
