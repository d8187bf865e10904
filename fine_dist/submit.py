"""From a config to job files: the resolved config, a copy of the code, one `JobSpec` per task, all on disk.

    python -m fine_dist.submit prepare fine_dist.condense --config FILE [--KEY VALUE ...]

writes the job file of one job, or of every task of a fan-out, and prints the ticket that `slurm/env.sh` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fine_dist
from fine_dist.config import Config, LaunchConfig, dump_yaml, expand_path, load
from fine_dist.errors import ConfigError, LaunchError, ResumeLater, guard
from fine_dist.jobs import JobSpec, StateTable, Task, write_atomic
from fine_dist.worker import config_class, import_module

SOURCES = (".py", ".sh", ".yaml", ".yml", ".json", ".toml", ".cfg", ".txt")
"""Kinds of files that a copy of the code holds."""


def run_dir_of(config: Config) -> Path:
    """The absolute run directory of a stage's config. `ConfigError` when it has none."""
    run_dir = getattr(config, "run_dir", None)
    if not run_dir:
        raise ConfigError("run_dir: a job needs a run directory; give --run-dir PATH")
    return Path(expand_path(str(run_dir))).absolute()


def launch_of(config: Config) -> LaunchConfig:
    """The launch settings of a stage's config; defaults when it has none."""
    launch = getattr(config, "launch", None)
    return launch if isinstance(launch, LaunchConfig) else LaunchConfig()


def tasks_of(module: str, config: Config) -> list[Task] | None:
    """The tasks of a fan-out, or None when the module is one job. Raises `LaunchError` when two tasks share a name."""
    make = getattr(import_module(module), "tasks", None)
    tasks: list[Task] | None = make(config) if callable(make) else None
    if tasks is None:
        return None
    names = [row for task in tasks for row in (task.rows or (task.name,))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LaunchError(f"{module}: two tasks are named {twice[0]!r}")
    return tasks


def make_spec(
    module: str, config: Config, name: str | None = None, *, code: str | None = None, table: Path | None = None,
    rows: Sequence[str] = (), write: bool = True,
) -> JobSpec:  # fmt: skip
    """The job of one config, whose resolved YAML is written into the run directory (unless `write` is false).

    File names carry a hash of what they hold: a second submission never changes the files of the first.
    """
    launch = launch_of(config)
    run_dir = run_dir_of(config)
    name = name or module.rpartition(".")[2]
    text = dump_yaml(config)
    home = table or run_dir
    path = home / "jobs" / f"{name}-{_hash(text)}.yaml"
    if write:
        write_atomic(path, text)
    return JobSpec(
        name=name,
        module=module,
        config=str(path),
        run_dir=str(run_dir),
        cwd=os.getcwd(),
        code=code,
        table=str(table) if table else None,
        tasks=tuple(rows),
        nodes=launch.nodes,
        processes_per_node=launch.processes,
        accelerators_per_node=launch.gpus * launch.processes,
        cpus_per_process=launch.cpus,
        memory_gb=launch.memory_gb,
        minutes=launch.minutes,
        env=launch.env,
        extras={"slurm": dict(launch.slurm), "ray": dict(launch.ray)},
    )


def make_specs(module: str, config: Config, tasks: Sequence[Task], *, code: str | None = None) -> list[JobSpec]:
    """The jobs of a fan-out, and their pending rows in the state table."""
    home = run_dir_of(config)
    launch = launch_of(config)
    specs = []
    run_dirs: dict[str, str] = {}
    for task in tasks:
        part = task.config
        if "launch" in type(part).model_fields:
            part = part.model_copy(update={"launch": launch})
        spec = make_spec(module, part, task.name, code=code, table=home, rows=task.rows)
        run_dirs |= dict.fromkeys(spec.rows, spec.run_dir)
        specs.append(spec)
    StateTable(home).add([row for spec in specs for row in spec.rows], run_dirs)
    return specs


# --- the copy of the code ------------------------------------------------------------------------------------------


def code_root(module: str) -> str:
    """The folder that `module` is imported from, for workers that run the code where it lies."""
    file = import_module(module).__file__
    if not file:
        raise LaunchError(f"module {module} has no file; a worker cannot import it")
    return str(Path(file).resolve().parents[module.count(".")])


def snapshot(run_dir: Path, module: str = "fine_dist") -> Path:
    """Copy the code into `RUN_DIR/code/HASH` (once per content) and return that folder."""
    files = code_files(module)
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name].read_bytes()).digest())
    target = run_dir / "code" / digest.hexdigest()[:12]
    if target.is_dir():
        return target
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    stage_code(draft, module)
    try:
        os.rename(draft, target)
    except OSError:  # somebody else was faster with the same content
        shutil.rmtree(draft)
        if not target.is_dir():
            raise
    return target


def stage_code(folder: Path, module: str) -> None:
    """Copy `fine_dist`, `launchers`, the scripts in `slurm/` and the package of `module` into a folder."""
    for name, file in code_files(module).items():
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    about = {"git": _git(Path(fine_dist.__file__).resolve().parents[1]), "version": fine_dist.__version__}
    (folder / "SNAPSHOT.json").write_text(json.dumps(about) + "\n")


def code_files(module: str) -> dict[str, Path]:
    """Name in the copy -> file."""
    root = Path(fine_dist.__file__).resolve().parents[1]
    tops = {"fine_dist", "launchers", "slurm"}
    places = {root / top for top in tops if (root / top).is_dir()}
    top = module.partition(".")[0]
    if top not in tops:
        package = Path(code_root(module), top)
        places.add(package if package.is_dir() else package.with_suffix(".py"))
    return {file.relative_to(place.parent).as_posix(): file for place in places for file in _sources(place)}


def _sources(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = []
    for folder, inner, files in os.walk(place):
        inner[:] = [name for name in inner if not name.startswith((".", "__pycache__"))]
        found += [Path(folder, name) for name in files if name.endswith(SOURCES)]
    return found


def _git(root: Path) -> str | None:
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    said = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return said.stdout.strip() or None


# --- for the sbatch scripts ----------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return guard(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    whole = "--spread" in argv[:1]
    argv = argv[whole:]
    if argv[:1] == ["prepare"] and len(argv) > 1:
        print(prepare(argv[1], argv[2:], whole))
        return 0
    if argv[:1] == ["spread"] and len(argv) == 2:
        return spread(argv[1])
    print(__doc__)
    return 0 if "--help" in argv or "-h" in argv else 2


def spread(file: str) -> int:
    """Inside an allocation: a fan-out as steps of it. A signal has the steps save, and ends with code 75."""
    from launchers import launch

    def stop(number: int, frame: object) -> None:
        raise ResumeLater(f"received {signal.Signals(number).name}")

    spec = JobSpec.load(file)
    os.chdir(spec.cwd)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
    config = load(config_class(import_module(spec.module)), spec.config)
    if "launch" in type(config).model_fields:  # the nodes are the allocation's; a task has one
        config = config.model_copy(update={"launch": launch_of(config).model_copy(update={"nodes": 1})})
    return launch(spec.module, config, "slurm")


def prepare(module: str, argv: list[str], whole: bool = False) -> Path:
    """Write all that the jobs of a command line need; the ticket, a file of shell words that a script sources.

    JOB is one job's file; or TASKS files are listed in LIST, one a line. FLAGS are the sbatch options it asks for.

    whole: a fan-out is one job (SPREAD is set), whose tasks are found when it starts and run as steps of it.
    """
    from fine_dist.cli import parse
    from fine_dist.plan import preflight, refuse
    from launchers.slurm_queue import slurm_findings

    config = parse(config_class(import_module(module)), argv, prog=f"python -m {module}").config
    needs = launch_of(config)
    run_dir = run_dir_of(config)
    fans_out = callable(getattr(import_module(module), "tasks", None))
    tasks = None if whole and fans_out else tasks_of(module, config)
    first = tasks[0].config if tasks else config
    found = preflight(module, first, make_spec(module, first, write=False), light=fans_out)
    refuse(needs, [*found, *slurm_findings(make_spec(module, config, write=False), needs)])
    code = str(snapshot(run_dir, module)) if needs.snapshot else code_root(module)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    if tasks is None:
        spec = make_spec(module, config, code=code)
        words = {"JOB": str(spec.save(job_file(spec))), "TASKS": "0", "LIST": ""}
    else:
        table = StateTable(run_dir)
        with table.driver("sbatch"):
            specs = [spec for spec in make_specs(module, config, tasks, code=code) if not is_done(table, spec)]
        files = "".join(f"{spec.save(job_file(spec))}\n" for spec in specs)
        listed = run_dir / "jobs" / f"{name}-{_hash(files)}.list"
        write_atomic(listed, files)
        words = {"JOB": "", "TASKS": str(len(specs)), "LIST": str(listed)}
        spec = make_spec(module, config, code=code)
    words |= {"NAME": name, "RUN_DIR": str(run_dir), "CODE": code, "PARALLEL": str(needs.max_parallel or "")}
    words |= {"WANT_NODES": str(spec.nodes), "PROCS": str(spec.processes_per_node)}
    words["SPREAD"] = "1" if whole and fans_out else ""
    lines = [f"{key}={shlex.quote(value)}" for key, value in words.items()]
    slots = math.ceil((needs.max_parallel or spec.nodes) / spec.nodes) if words["SPREAD"] else 1
    lines.append(f"FLAGS=({shlex.join(sbatch_flags(spec, needs, slots))})")
    text = "\n".join(lines) + "\n"
    return write_atomic(run_dir / "jobs" / f"{name}-{_hash(text)}.sh", text)


def sbatch_flags(spec: JobSpec, needs: LaunchConfig, slots: int = 1) -> list[str]:
    """What a job needs as options of sbatch. slots: SLURM tasks a node, each with a torchrun or a step of a fan-out."""
    flags = [f"--nodes={spec.nodes}", f"--ntasks-per-node={slots}"]
    flags.append(f"--cpus-per-task={spec.processes_per_node * spec.cpus_per_process}")
    if spec.accelerators_per_node:
        flags.append(f"--gpus-per-node={math.ceil(spec.accelerators_per_node * slots)}")
    if spec.memory_gb:
        flags.append(f"--mem={math.ceil(spec.memory_gb * 1024 * slots)}M")
    if spec.minutes:
        flags.append(f"--time={spec.minutes}")
    flags += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(needs, key))]
    return [*flags, *(f"--{key.replace('_', '-')}={value}" for key, value in needs.slurm.items())]


def is_done(table: StateTable, spec: JobSpec) -> bool:
    """Whether all rows of a job are done."""
    return all((row := table.get(name)) is not None and row.state == "done" for name in spec.rows)


def job_file(spec: JobSpec) -> Path:
    """Where a job's JSON lies: named by its content, so that no submission changes the files of another."""
    return Path(spec.table or spec.run_dir) / "jobs" / f"{spec.name}-{_hash(spec.model_dump_json())}.json"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


if __name__ == "__main__":
    raise SystemExit(main())
