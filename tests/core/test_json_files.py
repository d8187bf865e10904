"""JSON files: what a file of ours holds has a schema, and an altered one is one sentence with its key and a remedy."""

from __future__ import annotations

import errno
import os

import pytest
from pydantic import Field

from fine_dist.core import json_files, retry
from fine_dist.core.errors import DataError, RunDirError, guard
from fine_dist.core.json_files import MAX_JSON_BYTES, Record, as_record, read_json, read_record


class Toy(Record):
    """A file."""

    step: int = Field(ge=0)
    """A number."""
    names: dict[str, list[str]]
    """Texts."""


def test_a_sound_file_is_read_with_the_keys_of_a_later_version(tmp_path):
    (tmp_path / "a.json").write_text('{"step": 3, "names": {"a": ["b"]}, "later": [1]}')
    found = read_record(Toy, tmp_path / "a.json", DataError, "make it again")
    assert (found.step, found.names) == (3, {"a": ["b"]}) and found.model_dump()["later"] == [1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}", "step: field required"),
        (b"[]", "valid dictionary"),
        (b'{"step": -1, "names": {}}', "step: input should be greater than or equal to 0 (got -1)"),
        (b'{"step": 1, "names": {"a": "b"}}', "names.a: input should be a valid list (got 'b')"),
        (b'{"step": 1.5, "names": {}}', "step: input should be a valid integer"),
        (b'{"step": 1, ', "Expecting"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"9" * 5000, "digits"),
        (b"", "Expecting value"),
    ],
)
def test_an_altered_file_is_one_sentence_with_its_key_and_the_remedy(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_record(Toy, path, DataError, "make it again")
    said = str(caught.value)
    assert said.startswith(str(path)) and said.endswith("; make it again") and "\n" not in said
    assert words in said, said


def test_what_is_no_regular_file_or_too_large_is_refused_and_what_is_not_there_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    for name, words in (("pipe", "is a named pipe"), ("large", "is larger than 256 MiB"), (".", "Is a directory")):
        with pytest.raises(DataError, match=words):
            read_json(tmp_path / name, DataError, "make it again")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing", DataError, "make it again")


def test_values_inside_another_file_are_checked_alike():
    assert as_record(dict[str, int], {"a": 1}, "here", DataError, "again") == {"a": 1}
    with pytest.raises(DataError, match=r"here is damaged: a: .*integer.* \(got 'x'\); again"):
        as_record(dict[str, int], {"a": "x"}, "here", DataError, "again")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ENOTCONN])
def test_what_cannot_be_read_is_not_called_damaged_nor_to_be_deleted(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0, 0.0))

    def failing(path, most):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(json_files, "read_bytes", failing)
    code = guard(lambda: read_json(tmp_path / "DONE.json", RunDirError, "delete it"))
    said = capsys.readouterr().err
    assert code == (2 if number == errno.EACCES else 75) and os.strerror(number) in said and "delete" not in said
