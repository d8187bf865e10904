"""Shell completions: every command, every flag, and the values of flags that have few, as one script.

    source <(fine-dist completion bash)          in ~/.bashrc; `zsh` likewise in ~/.zshrc

shtab generates the script from an argparse parser that lists all settings but parses none.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from fine_dist.core import logs
from fine_dist.core.config import Config
from fine_dist.core.errors import ConfigError, nearest
from fine_dist.core.help import settings

SHELLS = ("bash", "zsh", "tcsh")
HELP = """usage: fine-dist completion SHELL

Print completions for a shell (bash, zsh or tcsh): every command, every flag, and the values of those that have a few.
Add this line to ~/.bashrc, or with zsh to ~/.zshrc, and start a new shell:

  source <(fine-dist completion bash)"""


def script(argv: list[str], commands: Mapping[str, str], kinds: Mapping[str, type[Config]]) -> str:
    """The script for a shell.

    Args:
        argv: Arguments after `completion`: the shell's name.
        commands: One-line description of every command, by name.
        kinds: The config classes of the commands that have one.

    Raises:
        ConfigError: The shell is none of `SHELLS`, or shtab is not installed.
    """
    if {"-h", "--help"} & {*argv}:
        return HELP
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise ConfigError(f"completion: for which shell? {nearest(argv[0] if argv else '', SHELLS)}")
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion needs shtab: python -m pip install 'fine_dist[completion]'") from None
    return str(shtab.complete(parser_of(commands, kinds), argv[0]))


def parser_of(commands: Mapping[str, str], kinds: Mapping[str, type[Config]]) -> argparse.ArgumentParser:
    """A parser with every flag of every command, for listing them; commands do not parse with it."""
    root = argparse.ArgumentParser(prog="fine-dist")
    subcommands = root.add_subparsers(dest="command")
    for name, about in commands.items():
        command = subcommands.add_parser(name, help=about)
        command.add_argument("--help-all", action="store_true", help="help with every setting")
        logs.add_flags(command)
        kind = kinds.get(name)
        if kind is None:
            continue
        command.add_argument("--config", metavar="FILE", help="YAML file of settings")
        command.add_argument(
            "--dry-run", action="store_true", help="print the resolved config and estimates; do nothing"
        )
        command.add_argument("--launcher", choices=("auto", "here", "local", "slurm", "ray"), help="where it runs")
        flags: dict[str, list[str]] = {}
        abouts: dict[str, str] = {}
        for setting in settings(kind):
            flag = f"--{setting.path.replace('_', '-')}"
            flags.setdefault(flag, []).extend(_values(setting.shape))
            abouts.setdefault(flag, setting.about)
        for flag, values in flags.items():
            # argparse interpolates percent signs in help texts, and shtab prints them as they are.
            text = abouts[flag].replace("%", "%%")
            command.add_argument(flag, choices=list(dict.fromkeys(values)) or None, metavar="VALUE", help=text)
    return root


def _values(shape: str) -> list[str]:
    """The legal values of a setting that has few (`fp32|bf16`); an empty list for texts and numbers."""
    values = shape.strip("[]").split("|")
    return values if all(value.islower() and value.isidentifier() for value in values) else []
