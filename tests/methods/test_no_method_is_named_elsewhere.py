"""Other packages ask a method for what they need: no method's name stands outside `methods`."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from fine_dist.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
MAY = ("fine_dist/methods/", "fine_dist/model/factors.py")
FILES = sorted(
    path
    for folder in ("fine_dist", "launchers")
    for path in (ROOT / folder).rglob("*.py")
    if not str(path.relative_to(ROOT)).startswith(MAY)
)
ENGLISH = {"scratch", "wave", "kind", "svd", "front", "pruned"}
"""Names that are words of plain English, or of linear algebra: only in quotes do they name a method."""
WORDS = {"kind", "scratch", "front"}
"""And those that are keys and values elsewhere, in quotes too: there the class of its settings tells."""
UNIQUE = sorted(set(METHODS) - ENGLISH - {"fine"})
CLASSES = sorted({method.__name__ for method in METHODS.values()} | {m.Config.__name__ for m in METHODS.values()})
# `fine` is the project's own name too: as a word of its own, in capitals or in quotes, it is the method's.
PATTERN = re.compile(
    "|".join(
        [r"\bFINE\b", r"[\"']fine[\"']"]
        + [rf"[\"']{name}[\"']" for name in sorted(ENGLISH - WORDS)]
        + [rf"\b{re.escape(name)}\b" for name in UNIQUE]
        + [rf"\b{name}Config\b|\bimport .*\b{name}\b" for name in CLASSES if not name.endswith("Config")]
    )
)


def code_of(path: Path) -> str:
    """The file without comments and docstrings: those may cite a paper."""
    source = path.read_text(encoding="utf-8")
    strings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT and not (token.type == tokenize.STRING and token.start[0] in strings):
            kept.append(token.string)
    return " ".join(kept)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_package_names_a_method(path: Path) -> None:
    found = [match[0] for match in PATTERN.finditer(code_of(path))]
    assert not found, f"{path.relative_to(ROOT)} names {', '.join(sorted(set(found)))}"


def test_the_pattern_finds_what_it_should() -> None:
    for text in ('name == "fine"', "FineConfig()", 'x["svd"]', "random_genes"):
        assert PATTERN.search(text), text
    for text in ("fine_dist.core.config", "he said", "what is outside", "fine-dist-watch"):
        assert not PATTERN.search(text), text
