"""JSON files that are read: each has a schema beside the one who writes it, so that an altered file is one sentence.

    class Done(Record):
        steps: int
        '''Updates that the run made.'''

    done = read_record(Done, path, RunDirError, "delete it: the run then goes on from its last checkpoint")

A file that is not there is a `FileNotFoundError`, as for `open`; anything else that is wrong is the error asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fine_dist.core.config import shown
from fine_dist.core.errors import FineDistError
from fine_dist.core.files import read_bytes

MAX_JSON_BYTES = 256 * 2**20
"""The largest of ours, the rows of a fan-out of a million tasks, is smaller."""
R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """What a JSON file holds. Keys beyond those of the schema are kept: a later version may write more."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)


def read_json(path: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        error: What is raised when the file is no regular file, too large, not UTF-8, or not JSON.
        remedy: The end of the message: what a user can do.

    Raises:
        FileNotFoundError: There is no such file.
    """
    try:
        content = read_bytes(path, MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as wrong:
        raise error(f"{path}: {wrong.strerror}; {remedy}") from None
    if len(content) > MAX_JSON_BYTES:
        raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: it is none of ours; {remedy}")
    return parse_json(content, path, error, remedy)


def parse_json(content: str | bytes, where: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """The value of a JSON text. `error` when it is none, as in `read_json`."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except (ValueError, RecursionError) as wrong:
        why = str(wrong).partition("\n")[0][:200]
        raise error(f"{where} is damaged: {why}; {remedy}") from None


def read_record(kind: type[R], path: str | Path, error: type[FineDistError], remedy: str) -> R:
    """The record in a JSON file; arguments and errors as in `read_json`, and `error` for a wrong or missing key."""
    record: R = as_record(kind, read_json(path, error, remedy), path, error, remedy)
    return record


def as_record(kind: Any, value: Any, where: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """A JSON value as a `kind`, which may be any type that pydantic checks. `error` names the first wrong key."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as wrong:
        first = wrong.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "missing" else f" (got {shown(first['input'])})"
        raise error(
            f"{where} is damaged: {f'{key}: ' if key else ''}{said[0].lower()}{said[1:]}{got}; {remedy}"
        ) from None
    except RecursionError:
        raise error(f"{where} is damaged: values lie too deep inside each other; {remedy}") from None
