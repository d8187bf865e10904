"""What real storage does: errors that pass, folders that stay, file systems without hard links."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from fine_dist.core import files, retry
from fine_dist.core.errors import EXIT_RESUME, EXIT_USER_ERROR, guard
from fine_dist.core.files import rename_new, write_atomic, write_new
from fine_dist.core.locks import is_locked
from fine_dist.core.retry import remove_tree


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EBUSY])
def test_an_error_that_passes_is_tried_again_and_one_that_does_not_ends_with_75(tmp_path, monkeypatch, number, capsys):
    replace, calls = os.replace, []

    def failing(source, target, times=2):
        calls.append(target)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    assert write_atomic(tmp_path / "a", "whole").read_text() == "whole" and len(calls) == 3
    calls.clear()
    monkeypatch.setattr(os, "replace", lambda source, target: failing(source, target, 99))
    assert guard(lambda: write_atomic(tmp_path / "a", "new") and 0) == EXIT_RESUME
    assert "the storage failed" in capsys.readouterr().err
    assert (tmp_path / "a").read_text() == "whole" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_no_error_that_passes(tmp_path, monkeypatch):
    calls = []

    def full(source, target):
        calls.append(target)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "x")
    assert len(calls) == 1


def test_a_folder_that_somebody_reads_stays_without_ending_the_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "old").mkdir()
    rmdir = os.rmdir

    def busy(path, *, dir_fd=None):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    monkeypatch.setattr(os, "rmdir", busy)
    assert not remove_tree(tmp_path / "old") and "left for the next time" in caplog.text
    monkeypatch.setattr(os, "rmdir", rmdir)
    assert remove_tree(tmp_path / "old") and remove_tree(tmp_path / "old") and not (tmp_path / "old").exists()


@pytest.mark.parametrize("number", files.NO_LINKS)
def test_where_there_are_no_hard_links_a_new_file_still_has_one_writer(tmp_path, monkeypatch, number):
    def link(source, target):
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    assert write_new(tmp_path / "a", "first").read_text() == "first"
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]
    (tmp_path / "draft").write_text("x")
    with pytest.raises(FileExistsError):
        rename_new(tmp_path / "draft", tmp_path / "a")


@pytest.mark.parametrize("posix", [False, True])
def test_a_lock_is_seen_by_looking_and_not_taken(tmp_path, posix):
    path = tmp_path / "lock"
    assert is_locked(path, posix=posix) is False
    code = (
        "import sys; from fine_dist.core.locks import try_lock; file = open(sys.argv[1], 'a+'); "
        "print(try_lock(file.fileno(), sys.argv[1], posix=sys.argv[2] == '1'), flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, path, str(int(posix))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        path.chmod(0o444)
        assert is_locked(path, posix=posix) is True
        holder.stdin.close()
    assert is_locked(path, posix=posix) is False


def test_a_file_where_a_folder_is_needed_is_said_with_its_path(tmp_path, capsys):
    (tmp_path / "runs").write_text("")
    assert guard(lambda: (tmp_path / "runs").mkdir()) == EXIT_USER_ERROR
    assert f"{tmp_path / 'runs'} (a folder is needed there" in capsys.readouterr().err
