"""The pages of the site, from the repository's own Markdown: `python docs/site.py FOLDER`, which mkdocs.yml reads.

README.md becomes the first page; links between files are rewritten to where the pages lie; links to anything that is no
page (a config, a script) become plain text. Each public module of docs/python.md gets a page from its docstrings.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def pages() -> dict[Path, str]:
    """Every Markdown file that is a page, and its name on the site."""
    found = {ROOT / "README.md": "index.md"}
    found |= {ROOT / f"{name}.md": f"{name.lower()}.md" for name in ("CONTRIBUTING", "CHANGELOG")}
    found |= {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    return found | {path: f"example_{path.parent.name}.md" for path in sorted((ROOT / "examples").glob("*/README.md"))}


def modules() -> list[str]:
    """The modules of the public names."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    names = re.findall(r"`(fine_dist\.[\w.]+)`", tables)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def build(folder: Path) -> None:
    """Write the pages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    known = pages()
    for path, name in known.items():
        (folder / name).write_text(rewritten(path, known), encoding="utf-8")
    for picture in sorted((ROOT / "docs").glob("*.png")):
        shutil.copy(picture, folder / picture.name)
    reference = folder / "reference"
    reference.mkdir()
    for module in modules():
        (reference / f"{module}.md").write_text(f"# {module}\n\n::: {module}\n", encoding="utf-8")


def rewritten(path: Path, known: dict[Path, str]) -> str:
    """A page's text with links as they are on the site."""

    def link(found: re.Match[str]) -> str:
        bang, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        there = (path.parent / target).resolve()
        if there in known:
            return f"{bang}[{text}]({known[there]}{anchor})"
        return f"{bang}[{text}]({there.name})" if bang else text

    text = LINK.sub(link, path.read_text(encoding="utf-8"))
    # names of flags are not broken at their dashes
    return (
        f"{text}\n<style>td:first-child code {{ white-space: nowrap }}</style>\n" if path.name == "options.md" else text
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
