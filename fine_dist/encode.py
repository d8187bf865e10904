"""`python -m fine_dist.encode`: images become latent shards, once; `--inspect`, `--verify` and `--index` shards."""

from __future__ import annotations

import argparse
import sys

from fine_dist.core.arguments import parse
from fine_dist.core.config import expand_path
from fine_dist.core.errors import guard
from fine_dist.data.encoding import EncodeConfig, dry_run, out_of, run, show, verified


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inspect", metavar="SHARDS", help="describe shards instead of encoding")
    parser.add_argument(
        "--verify", metavar="SHARDS", nargs="?", const="", help="check shards (default: those of out) byte by byte"
    )
    parser.add_argument("--index", metavar="FOLDER", help="write a manifest for tars of another program")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""

    promise = ""

    def body() -> int:
        nonlocal promise
        call = parse(EncodeConfig, argv, "python -m fine_dist.encode", options=_options)
        config: EncodeConfig = call.config
        if call.options.inspect:
            from fine_dist.data.audit import inspect

            print("\n".join(show(inspect(call.options.inspect))))
            return 0
        if call.options.verify is not None:
            print("\n".join(verified(config, call.options.verify)))
            return 0
        if call.options.index:
            from fine_dist.data.audit import index_folder

            manifest = index_folder(
                expand_path(call.options.index),
                num_classes=config.num_classes,
                scaling_factor=config.scaling_factor,
                kind=config.kind,
            )
            print(f"indexed: {call.options.index}: {manifest.count} samples in {len(manifest.shards)} shards")
            return 0
        out_of(config)
        if call.dry_run:
            from launchers.entry import check

            check("fine_dist.encode", call.config, call.launcher)
            print("\n".join(dry_run(config)))
            return 0
        from launchers.entry import launch

        promise = f"the shards that are done stay in {config.out}, and the same command continues"
        return launch("fine_dist.encode", config, call.launcher)

    return guard(body, lambda: promise)


__all__ = ["EncodeConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
