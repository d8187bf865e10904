"""`--launcher here`: this process, one task after the other. Inside a job every command runs here."""

from __future__ import annotations

from fine_dist.core.config import Config
from fine_dist.core.errors import LaunchError
from launchers.base import CommandTarget
from launchers.machine import visible_devices
from launchers.preflight import accelerators
from launchers.prepare import make_spec
from launchers.spec import Finding, JobSpec
from launchers.worker import exit_code, import_module, inside


class Here(CommandTarget):
    """This process."""

    name = "here"
    on_this_machine = True

    def run(self, module: str, config: Config) -> int:
        if not inside():  # a job's accelerators are its launcher's to give
            check_accelerators(make_spec(module, config, write=False))
        return run_here(module, config)

    def findings(self, spec: JobSpec, many: bool) -> list[Finding]:
        return accelerators(spec, len(visible_devices()))


def run_here(module: str, config: Config) -> int:
    """Run `module.run(config)` in this process; its exit code."""
    return exit_code(import_module(module).run(config))


def check_accelerators(spec: JobSpec) -> None:
    """`LaunchError` with the remedy when this machine has not the accelerators that a job asks for."""
    for finding in accelerators(spec, len(visible_devices()) if spec.accelerators_per_node else 0):
        if finding.level == "stop":
            raise LaunchError(finding.text)
