"""Reading JSON files against a schema, so that a damaged or edited file gives an error message of one sentence.

    class Done(Record):
        steps: int
        '''Updates that the run made.'''

    done = read_record(Done, path, RunDirError, "delete it: the run then goes on from its last checkpoint")

A missing file raises `FileNotFoundError`, as `open` does; every other fault raises the given error class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fine_dist.core.config import short_repr
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
        error: Class to raise when the file is not a regular file, is too large, or is not JSON in UTF-8.
        remedy: End of the message: what a user can do.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read, for lack of permission or because the storage fails.
    """
    try:
        # The size is limited, because a file that fine_dist did not write may be as large as the disk.
        content = retry(lambda: read_bytes(path, MAX_JSON_BYTES + 1))
    except OSError as cause:
        # A file without read permission, or on failing storage, is not damaged,
        # and the remedy for a damaged file is often to delete it.
        if not isinstance(cause, (NotAFile, IsADirectoryError, NotADirectoryError)):
            raise
        raise error(f"{path}: {cause.strerror}; {remedy}") from None
    if len(content) > MAX_JSON_BYTES:
        raise error(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: fine_dist writes none so large; {remedy}")
    return parse_json(content, path, error, remedy)


def parse_json(content: str | bytes, where: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """The value of a JSON text; `error` and `remedy` as in `read_json`."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except (ValueError, RecursionError) as cause:
        reason = str(cause).partition("\n")[0][:200]
        raise error(f"{where} is damaged: {reason}; {remedy}") from None


def read_record(kind: type[R], path: str | Path, error: type[FineDistError], remedy: str) -> R:
    """A JSON file as a record of class `kind`; errors as in `read_json`, and `error` for a wrong or missing key."""
    record: R = as_record(kind, read_json(path, error, remedy), path, error, remedy)
    return record


def as_record(kind: Any, value: Any, where: str | Path, error: type[FineDistError], remedy: str) -> Any:
    """A JSON value as an instance of `kind`, any type that pydantic validates; `error` names the first wrong key."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as cause:
        first = cause.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "missing" else f" (got {short_repr(first['input'])})"
        raise error(
            f"{where} is damaged: {f'{key}: ' if key else ''}{message[0].lower()}{message[1:]}{got}; {remedy}"
        ) from None
    except RecursionError:
        raise error(f"{where} is damaged: its values are nested too deeply; {remedy}") from None
