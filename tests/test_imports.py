"""The house's rules about who may import whom, read from the sources themselves."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fine_dist.__main__ import COMMANDS as NAMES
from fine_dist.__main__ import CONFIGURED
from fine_dist.core.config import models_in
from fine_dist.launchers.worker import config_class, import_module

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p.relative_to(ROOT) for d in ("fine_dist", "launchers") for p in (ROOT / d).rglob("*.py"))
BENCHMARKS = {f"benchmarks.{p.stem}": p.relative_to(ROOT) for p in (ROOT / "benchmarks").glob("*.py")}

# Every package, from the bottom up: a file imports its own package and packages further down; those of one line do not
# import each other.
# Whatever lies flat in `fine_dist/` and is not named here is a command, which is above all of them.
FLOORS = [
    ["core"],
    ["model"],
    ["diffusion"],
    ["methods"],
    ["data", "engine"],
    ["artifacts"],
    ["sampling"],
    ["evaluation"],
    ["stages"],
    ["planning"],
    ["launchers"],
    ["family", "creative"],
    ["study"],
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
COMMANDS = len(FLOORS)
TOOLS = {"testing": LEVEL["planning"]}
"""A package that nothing imports: tools for tests."""
OWNERS = {
    "peft": ("fine_dist/methods/",),
    "deepspeed": ("fine_dist/engine/",),
    "ray": ("launchers/",),
    "submitit": ("launchers/",),
    "wandb": ("fine_dist/engine/tracker_services.py",),
    "mlflow": ("fine_dist/engine/tracker_services.py",),
    "webdataset": ("fine_dist/data/",),
    "diffusers": ("fine_dist/artifacts/", "fine_dist/diffusion/", "fine_dist/data/codecs.py", "fine_dist/creative/"),
}


def imports_of(path: Path, types: bool = False) -> list[tuple[str, int]]:
    """(module, line) of every import, also inside functions. types: those for type checkers alone count too."""
    tree = ast.parse((ROOT / path).read_text())
    skip = {
        id(node)
        for block in ast.walk(tree)
        if not types and isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name of what is imported"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from package import file` is an import of that file; `from file import name` of the file itself
            found += [(name if name in {*MODULES, *BENCHMARKS} else str(node.module), node.lineno) for name in names]
    return found


def module_of(path: Path) -> str:
    # launchers/ lies at the top level and is the package fine_dist.launchers
    parts = path.with_suffix("").parts
    return ".".join(parts if parts[0] == "fine_dist" else ("fine_dist", *parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def package(path: Path) -> str:
    return path.parts[1].removesuffix(".py") if path.parts[0] == "fine_dist" else "launchers"


def level(path: Path) -> int:
    return LEVEL.get(package(path), TOOLS.get(package(path), COMMANDS))


def test_every_room_has_a_level():
    packages = {path.parts[1] for path in FILES if len(path.parts) > 2 and path.parts[0] == "fine_dist"}
    assert packages <= LEVEL.keys() | TOOLS, f"give {packages - LEVEL.keys()} a level"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    for module, line in imports_of(path):
        other = MODULES.get(module)
        if other is None or module == "fine_dist":
            continue
        assert package(other) == package(path) or level(other) < level(path) or level(path) == COMMANDS, (
            f"{path}:{line} imports {module}: {package(other)} is not below {package(path)}"
        )


def edges(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, if only for their types; the `__init__` of another package too."""
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        reached = set()
        for name, _ in imports_of(path, types=True):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                part = ".".join(parts[:end])
                # the packages a file lies in are imported before it is, whatever it says
                if part in modules and (part == name or not f"{module}.".startswith(f"{part}.")):
                    reached.add(part)
        found[module] = reached - {module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle, in order; empty when there is none."""
    done: set[str] = set()

    def walk(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*trail, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_a_circle_of_files_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_files_import_each_other_in_a_circle():
    found = circle(edges(MODULES | BENCHMARKS))
    assert not found, " -> ".join(found)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_heavy_library_is_imported_in_its_own_room_only(path):
    for module, line in imports_of(path):
        owners = OWNERS.get(module.split(".")[0])
        if owners:
            assert str(path).startswith(owners), f"{path}:{line} imports {module}; only {', '.join(owners)} may"


def test_no_file_of_ours_shadows_a_library():
    assert not [p for p in FILES if p.stem in OWNERS or p.stem in ("torch", "numpy")]


# --- one word, one thing -------------------------------------------------------------------------------------------

FLAT = {path.stem for path in FILES if path.parts[0] == "fine_dist" and len(path.parts) == 2}
"""The commands."""
ANYWHERE = {"__init__", "__main__", "settings", "config", "command", "method", *FLAT}
"""File names that several packages may use; `method` is the code of a method that has a folder."""


def in_several_places(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """The names of (name, place) pairs that have more than one place, with their places."""
    places: dict[str, list[str]] = {}
    for name, place in pairs:
        places.setdefault(name, []).append(place)
    return {name: found for name, found in sorted(places.items()) if len(found) > 1}


def test_a_name_in_two_places_is_found():
    assert in_several_places([("Row", "a"), ("Cell", "a"), ("Row", "b")]) == {"Row": ["a", "b"]}


def test_no_two_classes_share_a_name():
    classes = [
        (node.name, f"{path}:{node.lineno}")
        for path in FILES
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    offenders = in_several_places(classes)
    assert not offenders, f"rename all but one: {offenders}"


def test_no_two_rooms_have_a_file_of_one_name():
    files = [(path.stem, str(path)) for path in FILES if path.stem not in ANYWHERE]
    offenders = in_several_places(files)
    assert not offenders, f"rename all but one: {offenders}"


# --- help ----------------------------------------------------------------------------------------------------------


def sentence(text: str) -> bool:
    """Whether a text is at least one whole sentence: a capital or a literal first, a full stop last, no mere label."""
    return bool(re.match(r"[A-Z`0-9]", text)) and text.endswith(".") and len(text) >= 40


def settings_without_a_sentence() -> dict[str, str]:
    """Class.field -> help text, of every setting of every command whose text is no sentence."""
    kinds = [config_class(import_module(f"fine_dist.{name}")) for name in CONFIGURED]
    found, seen = {}, set()
    while kinds:
        kind = kinds.pop()
        if kind in seen:
            continue
        seen.add(kind)
        for key, field in kind.model_fields.items():
            inner = models_in(field.annotation)
            kinds += inner
            text = " ".join((field.description or "").split())
            # a group, and the name that tells its variants apart, are described by their class
            if key != "name" and not inner and not sentence(text):
                found[f"{kind.__name__}.{key}"] = text
    return found


def test_a_label_is_no_sentence():
    assert not sentence("Updates.") and not sentence("(no description)") and not sentence("")
    assert sentence("Number of optimizer updates that this stage makes.")


def test_every_setting_of_every_command_has_a_help_text_that_is_a_sentence():
    offenders = settings_without_a_sentence()
    assert not offenders, f"say what it is, its unit, what the default means and when to change it: {offenders}"


def test_configs_methods_and_jobs_are_read_without_torch():
    code = "import sys, fine_dist.core.arguments, fine_dist.methods, fine_dist.launchers.state_table as table; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_stage_starts_without_diffusers():
    """It loads all of torch.compile, seconds that every process of a job would pay; drawing and exporting import it."""
    code = "import sys, fine_dist.stages.condense, fine_dist.stages.train; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


SLOW_TO_IMPORT = {
    "torch",
    "diffusers",
    "deepspeed",
    "ray",
    "transformers",
    "peft",
    "sklearn",
    "scipy",
    "matplotlib",
    "pandas",
}
"""Packages that take from half a second to several to import, each more than all of a help text."""


def processor_time(*words: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """User and system seconds of a Python process: others may hold the cores meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope="module")
def torch_seconds() -> float:
    """Processor time of importing torch, which measures the machine."""
    return min(processor_time("-c", "import torch")[0] for _ in range(2))


@pytest.mark.parametrize("command", ["", *NAMES])
def test_help_answers_sooner_than_torch_is_imported(command, torch_seconds):
    """Under a second of a usual core; a slow machine takes more for the same work, as it does for torch."""
    module = f"fine_dist.{command.replace('-', '_')}" if command else "fine_dist"
    seconds, done = processor_time("-X", "importtime", "-m", module, "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "fine_dist" in imported and not imported & SLOW_TO_IMPORT
    assert seconds < torch_seconds, f"{module} --help took {seconds:.2f} s, importing torch {torch_seconds:.2f} s"
    assert "usage" in done.stdout.lower()
