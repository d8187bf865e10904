"""Check what jobs can rely on, on this machine or, by one short job, on a cluster: `fine-dist doctor`.

It checks environment, storage, locks, links, modes, limits, accelerators, network and requeues, and prints the lines
that slurm/site.sh needs.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
from pathlib import Path

from fine_dist.core.arguments import parse
from fine_dist.core.config import Config, PathKey, dump_yaml, run_dir_of
from fine_dist.core.errors import EXIT_USER_ERROR, LaunchError, guard
from fine_dist.core.settings import LaunchConfig
from fine_dist.launchers.diagnosis import diagnose, read_reports
from fine_dist.launchers.entry import launch
from fine_dist.launchers.probes import TOKEN, probe
from fine_dist.launchers.registry import pick

PRELOAD = ()


class DoctorConfig(Config):
    """Check this machine, or with `--launcher slurm` a cluster by one short job, and print what to set."""

    run_dir: PathKey = "runs/doctor"
    """Folder to test; choose one on the storage of your runs, which all nodes share."""
    launch: LaunchConfig = LaunchConfig(minutes=5)
    """Resources of the job; request the same as your jobs will, such as `--launch.nodes 2 --launch.gpus 1`."""


def run(config: DoctorConfig) -> Path:
    """Inside the job: run the probes in this process; returns the report's file."""
    return probe(run_dir_of(config))


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 when jobs cannot work."""

    def body() -> int:
        call = parse(DoctorConfig, argv, "fine-dist doctor", options=_options)
        config: DoctorConfig = call.config
        if call.dry_run:
            print(dump_yaml(config) + "\ndry run: nothing was done")
            return 0
        return _doctor(config, call.launcher, as_json=call.options.json)

    return guard(body)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _doctor(config: DoctorConfig, launcher: str, as_json: bool) -> int:
    run_dir = run_dir_of(config)
    shutil.rmtree(run_dir / "doctor", ignore_errors=True)  # reports of an earlier call
    os.environ[TOKEN] = token = secrets.token_hex(8)
    needs = config.launch.model_copy(update={"wait": True, "preflight": "off", "retries": 0})
    code = launch("fine_dist.doctor", config.model_copy(update={"launch": needs}), launcher)
    reports = read_reports(run_dir)
    if not reports:
        raise LaunchError(f"the job ended with code {code} before any process reported; its logs are in {run_dir}/logs")
    target = pick(launcher, needs)
    findings, site = diagnose(reports, needs, token, target.name == "slurm")
    stops = any(finding.level == "stop" for finding in findings)
    if as_json:
        print(json.dumps({"findings": [finding._asdict() for finding in findings], "site": site}, indent=1))
    else:
        print("\n".join(f"{finding.level:5} {finding.what:12} {finding.text}" for finding in findings))
        if site:
            print("\nput into slurm/site.sh (copy slurm/site.example.sh):\n" + "\n".join(f"  {line}" for line in site))
        if not stops:
            print("next: fine-dist plan --config CONFIG.yaml --launcher " + target.name)
    return EXIT_USER_ERROR if stops else 0


__all__ = ["PRELOAD", "DoctorConfig", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
