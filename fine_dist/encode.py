"""`python -m fine_dist.encode`: encode images into latent shards; inspect, verify and index shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import expand_path
from fine_dist.core.errors import guard
from fine_dist.data.settings import EncodeConfig
from fine_dist.launchers import entry


def run(config: EncodeConfig) -> Path:
    """Encode the images of a config, in this process; returns the folder of the splits."""
    from fine_dist.data.encoding import run as encode
    from fine_dist.evaluation.dino import load_dino

    return encode(config, load_dino)


def result_lines(config: EncodeConfig) -> list[str]:
    """Last lines of a successful command: the next command to run."""
    return [f"next: fine-dist condense --data.shards {config.folder() / 'train'}"]


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inspect", metavar="SHARDS", help="describe shards instead of encoding")
    parser.add_argument(
        "--verify", metavar="SHARDS", nargs="?", const="", help="check shards (default: those of out) byte by byte"
    )
    parser.add_argument("--index", metavar="FOLDER", help="write a manifest for tars of another program")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    promise = ""

    def body() -> int:
        nonlocal promise
        call = parse(EncodeConfig, argv, "fine-dist encode", options=_options)
        config: EncodeConfig = call.config
        if call.options.inspect or call.options.verify is not None or call.options.index:
            print("\n".join(_shard_lines(config, call.options)))
            return 0
        config.folder()
        if call.dry_run:
            from fine_dist.data.encoding import dry_run

            entry.check("fine_dist.encode", config, call.launcher)
            print("\n".join(dry_run(config)))
            return 0

        promise = f"the finished shards are in {config.out}; run the same command to resume"
        return entry.launch("fine_dist.encode", config, call.launcher)

    return guard(body, lambda: promise)


def _shard_lines(config: EncodeConfig, options: argparse.Namespace) -> list[str]:
    """Output of `--inspect`, `--verify` or `--index`."""
    from fine_dist.data import audit
    from fine_dist.data.encoding import summary_lines, verify_splits

    if options.inspect:
        return summary_lines(audit.inspect(expand_path(options.inspect)))
    if options.verify is not None:
        return verify_splits(config, options.verify)
    manifest = audit.index_folder(
        expand_path(options.index),
        num_classes=config.num_classes,
        scaling_factor=config.scaling_factor,
        kind=config.kind,
    )
    return [f"indexed: {options.index}: {manifest.count} samples in {len(manifest.shards)} shards"]


__all__ = ["EncodeConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
