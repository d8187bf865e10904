"""The packages that show results know methods by their data alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fine_dist.methods import METHODS

ROOT = Path(__file__).resolve().parents[3] / "fine_dist"
PLAIN_WORDS = {"front", "kind", "pruned", "scratch", "share", "svd", "wave"}
"""Names of methods that are also words of English or of a library."""
SETTINGS = {"scratch"}
"""Names of methods that are also the value of a setting (`shell: scratch`)."""
NAMES = set(METHODS) | {"fine", "kind", "tleg", "svd", "sws", "wave", "snnet", "mimetic", "ligo", "lora", "difffit"}


def words_of(path: Path) -> tuple[set[str], set[str]]:
    """(whole strings, identifiers and words inside strings) of a file; the package's own name excepted."""
    strings: set[str] = set()
    words: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # a docstring may give an example
    documentation = {
        id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if id(node) in documentation:
            continue
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            words.add(node.name)
        elif isinstance(node, (ast.arg, ast.keyword)):
            words.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
            words |= set(re.findall(r"[A-Za-z_]+", node.value.replace("fine_dist", " ").replace("fine-dist", " ")))
    return {text.lower() for text in strings}, {word.lower() for word in words}


@pytest.mark.parametrize("path", sorted((ROOT / "study").rglob("*.py")), ids=str)
def test_no_method_is_named_in_the_rooms_that_plan_and_show(path):
    strings, words = words_of(path)
    assert not strings & (NAMES - SETTINGS)
    assert not words & (NAMES - PLAIN_WORDS)


@pytest.mark.parametrize("path", sorted((ROOT / "study" / "report").glob("*.py")), ids=lambda p: p.name)
def test_the_report_knows_no_parameter_by_its_name(path):
    assert "sigma" not in path.read_text(encoding="utf-8").lower()
