"""`fine-dist` (also `python -m fine_dist`): lists the commands and runs one: `fine-dist condense --help`."""

from __future__ import annotations

import importlib
import sys

from fine_dist.core.config import Config
from fine_dist.core.errors import ConfigError, guard, nearest

COMMANDS = {
    "encode": "encode images, or the embedded digits, into latent shards; inspect and verify shards",
    "condense": "stage 1: condense an ancestor into a learngene, or train a learngene from scratch",
    "init": "stage 2: initialize a family of models of several depths from a learngene",
    "train": "stage 3: train a model, from an initialized target or from scratch",
    "sample": "sample images from one model, or the same images from several",
    "evaluate": "measure held-out loss, FID and other metrics of models or of images",
    "export": "write a model for diffusers, in the original DiT's layout, or as a dense model",
    "creative": 'CreTok: learn a token for "creative" on frozen text encoders',
    "plan": "check a job before it is submitted: memory, time, disk, the cluster's limits",
    "status": "show the tasks of a fan-out: pending, running, done, failed",
    "doctor": "check what jobs can rely on: this machine, or a cluster by one short job",
    "study": "run, measure and report a table of methods x targets x seeds",
    "init-project": "copy the configs and cluster scripts that a user edits into a folder",
    "demo": "run the whole method on the embedded data set and write a report",
}
"""Every command with its one-line description."""

PACKAGES = ("creative", "study")
"""Commands that are packages."""
CONFIGURED = tuple(name for name in COMMANDS if name not in ("plan", "status", "study", "init-project"))
"""Commands whose flags are the settings of a config class of their own."""


def config_of(command: str) -> type[Config]:
    """The config class of one of the commands in `CONFIGURED`."""
    from fine_dist.launchers.worker import config_class, import_module

    return config_class(import_module(f"fine_dist.{command}"))


def main(argv: list[str] | None = None) -> int:
    """List the commands, or run one."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fine-dist COMMAND [--config FILE] [--KEY VALUE ...]\n\ncommands:")
        for name, about in COMMANDS.items():
            print(f"  {name:12} {about}")
        print(
            "\n`fine-dist COMMAND --help` shows examples and the settings used most, `--help-all` all settings. "
            "\n`python -m fine_dist.COMMAND` runs a command too. `fine-dist completion bash` prints completions."
        )
        return 0
    if argv[0] == "--version":
        from fine_dist import __version__

        print(f"fine_dist {__version__}")
        return 0
    if argv[0] == "completion":
        from fine_dist.core.completion import script

        print(script(argv[1:], COMMANDS, {name: config_of(name) for name in CONFIGURED}))
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"no command {argv[0]!r}; {nearest(argv[0], COMMANDS)}")
    # The commands `creative` and `study` are packages; their command is the module `command`.
    name = f"fine_dist.{argv[0].replace('-', '_')}"
    command = importlib.import_module(f"{name}.command" if argv[0] in PACKAGES else name)
    return int(command.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
