"""`python -m fine_dist.study --config FILE`: run a table of methods x targets x seeds, measure it and report it."""

from __future__ import annotations

import argparse
import sys

from fine_dist.core.errors import guard


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fine_dist.study", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE", required=True, help="the study, such as configs/benchmark/digits.yaml"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change a setting of the study")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and one seed: a smoke test")
    parser.add_argument("--launcher", default="auto", help="where jobs run: local, slurm, ray, auto, here")
    parser.add_argument("--dry-run", action="store_true", help="name the runs and what they would take; run nothing")
    options = parser.parse_args(argv)
    return guard(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from fine_dist.study import methods

    benchmark = methods.load_benchmark(options.config, options.set, options.quick)
    if options.dry_run:
        print("\n".join([*methods.outline(benchmark), "dry run: nothing was done"]))
        return 0
    methods.run(benchmark, options.launcher)
    return 0


if __name__ == "__main__":
    sys.exit(main())
