"""Shared by the fuzz tests: strategies for damaged input, and the rule that a command answers in one message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fine_dist.core.errors import guard

TIMES = int(os.environ.get("FINE_DIST_FUZZ", "1"))
"""How many times as many examples are tried as the suite tries."""
COUNTS = os.environ.get("FINE_DIST_FUZZ_COUNTS")
"""A file that gets a line for every command or reader that was asked: the test's name."""
HANGS_S = 60
"""An answer that takes longer is none."""


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


class Trap:
    """Unpickled, or built by a YAML tag, it would leave a mark where the process stands."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


class Hangs(BaseException):
    """Raised by an alarm; no `except Exception` may swallow it."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """The block may take so long: a reader that waits for a pipe would wait for ever."""

    def ring(number: int, frame: object) -> None:
        raise Hangs(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answered(body: Callable[[], Any], codes: tuple[int, ...] = (0, 2)) -> str:
    """Run as a command does; what it says. It ends well or with exit code 2, and whatever else it raises fails."""
    if COUNTS:
        with open(COUNTS, "a") as counts:
            counts.write(os.environ["PYTEST_CURRENT_TEST"].partition(" ")[0].rpartition("::")[2] + "\n")
    out, err = io.StringIO(), io.StringIO()
    with within(HANGS_S), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = guard(body)
        except SystemExit as ended:
            code = int(ended.code or 0)
    said = err.getvalue()
    assert code in codes and "Traceback" not in said, said
    assert code != 2 or re.search(r"^(\[rank \d+\] )?error: ", said, re.M), said
    return said


# --- pieces --------------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, "", "fine", "DiT-B/2", "../x", "nan", "a\0b", "\ud7ff"]),
    st.text(max_size=12),
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all nodes of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A JSON tree with one or two of its nodes replaced or gone."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(places(tree)))
        if not place:
            return draw(trees)
        holder = tree
        for key in place[:-1]:
            holder = holder[key]
        if draw(st.booleans()):
            holder[place[-1]] = draw(trees)
        else:
            del holder[place[-1]]
    return tree


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """Bytes with some of them overwritten, cut out, doubled, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        new = draw(st.binary(min_size=1, max_size=12) | st.sampled_from([b"\0" * 512, b"\xff" * 12, b"7777777777"]))
        how = draw(st.sampled_from(["over", "in", "out", "off"]))
        if how == "over":
            data[at : at + len(new)] = new
        elif how == "in":
            data[at:at] = new
        elif how == "out":
            del data[at : at + len(new) * 40]
        elif draw(st.integers(0, 3)) == 0:
            del data[at:]
    return bytes(data)
