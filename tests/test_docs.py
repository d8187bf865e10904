"""The docs: every link leads somewhere, every public name is there and documented."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT) for pattern in ("*.md", "docs/*.md", "examples/**/*.md") for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(path: Path) -> str:
    return re.sub(r"```.*?```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.S)


def anchors(path: Path) -> set[str]:
    """What a heading is called in a link: lower case, words joined by dashes, no punctuation."""
    heads = re.findall(r"^#+ (.*)$", prose(path.relative_to(ROOT)), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file_and_its_heading(page):
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        there = (ROOT / page.parent / name).resolve() if name else ROOT / page
        assert there.exists(), f"{page}: {link} leads nowhere"
        assert not anchor or anchor in anchors(there), f"{page}: {link}: no such heading"


def names() -> list[str]:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return re.findall(r"`(fine_dist\.[\w.]+)`", tables)


@pytest.mark.parametrize("name", names())
def test_a_public_name_is_there_and_documented(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert inspect.getdoc(found), f"{name} says nothing about itself"


def test_the_site_has_every_page_and_no_link_of_it_is_broken(tmp_path):
    spec = importlib.util.spec_from_file_location("site", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    site.build(tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"index.md", "contributing.md", *(path.name for path in (ROOT / "docs").glob("*.md"))} <= written
    assert {f"{module}.md" for module in site.modules()} == {path.name for path in (tmp_path / "reference").iterdir()}
    for path in tmp_path.glob("*.md"):
        for link in LINK.findall(re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)):
            assert "://" in link or link.startswith("#") or link.partition("#")[0] in written, f"{path.name}: {link}"


def test_the_map_of_files_and_the_table_of_options_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_of_the_site_is_in_its_navigation(tmp_path):
    """The navigation of mkdocs.yml, read as text: its loader has tags that a safe one does not know."""
    named = set(re.findall(r": ([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    spec = importlib.util.spec_from_file_location("site", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    site.build(tmp_path)
    assert {path.name for path in tmp_path.glob("*.md")} == {name for name in named if "/" not in name}
    assert all((tmp_path / name).is_file() for name in named)


def test_every_method_has_a_paragraph_that_says_where_it_is_from():
    from fine_dist.methods import METHODS

    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    sections = {names: body for names, body in re.findall(r"^### (.+)\n((?:(?!^#).*\n?)*)", text, re.M)}
    described = [name for names in sections for name in names.split(", ")]
    assert sorted(described) == sorted(METHODS)
    for names, body in sections.items():
        papers = {found for name in names.split(", ") for found in re.findall(r"\d{4}\.\d{5}", METHODS[name].paper)}
        stated = set(re.findall(r"\d{4}\.\d{5}", body))
        assert "control" in body or papers <= stated, f"{names}: {papers - stated} is missing"
