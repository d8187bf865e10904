"""Pages that are made from the code: the map of files in docs/house.md, and docs/options.md with every setting.

python docs/generate.py            # write them
python docs/generate.py --check    # fail when one is not current (a test runs this too)
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOUSE, OPTIONS = ROOT / "docs" / "house.md", ROOT / "docs" / "options.md"
BEGIN, END = "<!-- map: begin -->", "<!-- map: end -->"
PACKAGES = [
    "core",
    "model",
    "methods",
    "diffusion",
    "data",
    "engine",
    "artifacts",
    "sampling",
    "evaluation",
    "stages",
    "planning",
    "launchers",
    "family",
    "study",
    "creative",
    "testing",
]
COMMANDS = ["encode", "condense", "init", "train", "sample", "evaluate", "export", "creative", "demo"]


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def house_map() -> str:
    """Every file of the package in one line, package by package."""
    lines = []
    for package in PACKAGES:
        folder = ROOT / ("launchers" if package == "launchers" else f"fine_dist/{package}")
        lines += ["", f"### {folder.relative_to(ROOT)}/", "", first_line(folder / "__init__.py"), ""]
        lines += ["| file | what is in it |", "|---|---|"]
        for path in sorted(folder.rglob("*.py")):
            if path.name != "__init__.py" or path.parent != folder:
                lines.append(f"| `{path.relative_to(folder)}` | {cell(first_line(path))} |")
    lines += ["", "### fine_dist/ (commands)", "", "| file | what is in it |", "|---|---|"]
    for path in sorted((ROOT / "fine_dist").glob("*.py")):
        lines.append(f"| `{path.name}` | {cell(first_line(path))} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def options() -> str:
    """Every setting of every command, as tables."""
    from fine_dist.core.help import settings
    from fine_dist.launchers.worker import config_class, import_module

    lines = [
        "# Options of every command",
        "",
        "Made from the settings by `python docs/generate.py`. A setting is a key of the YAML (`optim: {lr: 1e-4}`)",
        "and a flag (`--optim.lr 1e-4`). Every command also has `--config FILE`, `--dry-run`, `--launcher NAME`,",
        "`--verbose`, `--quiet`, `--help` and `--help-all`. What several commands share is listed under the first.",
    ]
    seen: set[tuple[str, str, str]] = set()
    for command in COMMANDS:
        if command == "demo":
            kind = importlib.import_module("fine_dist.demo").DemoConfig
        else:
            kind = config_class(import_module(f"fine_dist.{command}"))
        rows = []
        for setting in settings(kind):
            row = (setting.path, setting.group, setting.about)
            if row in seen:
                continue
            seen.add(row)
            variant = setting.group.partition(", with ")[2]
            only = f" *With `{variant}`.*" if variant else ""
            rows.append(
                f"| `--{setting.path.replace('_', '-')}` | {cell(setting.shape)} | {cell(setting.about)}{only} |"
            )
        summary = " ".join((kind.__doc__ or "").split())
        lines += ["", f"## {command}", "", summary, "", "| flag | value | meaning |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """The files and their current text."""
    text = HOUSE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    return {HOUSE: f"{head}{BEGIN}\n{house_map()}\n\n{END}{rest.partition(END)[2]}", OPTIONS: options()}


def main(argv: list[str]) -> int:
    """Write the pages, or with `--check` name those that are not current; the exit code."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current: run `python docs/generate.py`")
        return int(bool(stale))
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
