"""Reading JSON files against a schema, so that a damaged or edited file gives an error message of one sentence.

    class Done(Record):
        steps: int
        '''Updates that the run made.'''

    done = read_record(Done, path, RunDirError, "delete it: the run then goes on from its last checkpoint")

A missing file raises `FileNotFoundError`, as `open` does; everything else raises the given error class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fine_dist.core.config import shown
from fine_dist.core.errors import FineDistError, NotAFile
from fine_dist.core.regular_files import read_bytes
from fine_dist.core.retry import retry

MAX_JSON_BYTES = 256 * 2**20
"""Maximum size of a JSON file that is read; the rows of a fan-out of a million tasks are smaller."""
R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Base class of the schemas of JSON files. Unknown keys are kept, because a later version may write more."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)


def read_json(path: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        error: Class that is raised when the file is not a regular file, too large, not UTF-8, or not JSON.
        remedy: End of the message, which says what a user can do.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read: the right to do so is missing, or the storage fails.
    """
    try:
        # A limit, because a file that is none of ours may be as large as the disk.
        content = retry(lambda: read_bytes(path, MAX_JSON_BYTES + 1))
    except OSError as wrong:
        # What may not be read, or not now, is not damaged, and its remedy is often to delete it.
        if not isinstance(wrong, (NotAFile, IsADirectoryError, NotADirectoryError)):
            raise
        raise error(f"{path}: {wrong.strerror}; {remedy}") from None
    if len(content) > MAX_JSON_BYTES:
        raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: fine_dist writes none so large; {remedy}")
    return parse_json(content, path, error, remedy)


def parse_json(content: str | bytes, where: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """The value of a JSON text; `error` and `remedy` as in `read_json`."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except (ValueError, RecursionError) as wrong:
        why = str(wrong).partition("\n")[0][:200]
        raise error(f"{where} is damaged: {why}; {remedy}") from None


def read_record(kind: type[R], path: str | Path, error: type[FineDistError], remedy: str) -> R:
    """A JSON file as a record of class `kind`; errors as in `read_json`, and `error` for a wrong or missing key."""
    record: R = as_record(kind, read_json(path, error, remedy), path, error, remedy)
    return record


def as_record(kind: Any, value: Any, where: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """A JSON value as a `kind`, which may be any type that pydantic checks; raises `error` with the first wrong key."""
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
