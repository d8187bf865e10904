"""`python -m fine_dist` (also `fine-dist`): lists the commands and runs one: `fine-dist condense --help`."""

from __future__ import annotations

import importlib
import sys

from fine_dist.core.errors import EXIT_USER_ERROR, guard, nearest

COMMANDS = {
    "encode": "images or the embedded digits -> latent shards; --inspect and --verify them",
    "condense": "stage 1: train a learngene from an ancestor's architecture or weights",
    "init": "stage 2: initialise a family of targets by training sigma alone",
    "creative": 'CreTok: learn a token for "creative" on frozen text encoders',
    "train": "stage 3: train a model, from an initialised target or from scratch",
    "sample": "draw images from a model, or the same from several",
    "evaluate": "held-out loss, FID and its kin, of models or of images",
    "plan": "check a job before it is submitted: memory, time, disk, the cluster's limits",
    "status": "the tasks of a fan-out: pending, running, done, failed",
    "export": "a model for this project, for diffusers, or in the original DiT's layout",
    "study": "a table of methods x targets x seeds, run, measured and reported",
    "demo": "the whole method on the embedded data set, with a report",
}

ROOMS = ("creative", "study")
"""Commands that are packages."""


def main(argv: list[str] | None = None) -> int:
    """List the commands, or run one."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m fine_dist COMMAND [--config FILE] [--KEY VALUE ...]\n\ncommands:")
        for name, what in COMMANDS.items():
            print(f"  {name:10} {what}")
        print("\n`python -m fine_dist.COMMAND --help` shows examples and the settings used most, `--help-all` all.")
        return 0
    if argv[0] == "--version":
        from fine_dist import __version__

        print(f"fine_dist {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"error: no command {argv[0]!r}; {nearest(argv[0], COMMANDS)}", file=sys.stderr)
        return EXIT_USER_ERROR
    # a room that is also a command (`creative`, `study`) keeps it in a module of its own
    name = f"fine_dist.{argv[0]}"
    command = importlib.import_module(f"{name}.command" if argv[0] in ROOMS else name)
    return int(command.main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
