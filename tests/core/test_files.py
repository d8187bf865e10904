"""Files that are whole or not there, locks and rows of metrics, and words between processes."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time

import pytest

from fine_dist.core.errors import NotAFile
from fine_dist.core.files import atomic_file, atomic_folder, sha256_of, sync_disk, umask, write_atomic
from fine_dist.core.locks import locked, try_lock
from fine_dist.core.processes import derived_port, free_ports, rank_environment
from fine_dist.core.regular_files import check_regular, last_row, open_regular, read_bytes, read_rows, read_text
from fine_dist.core.temp_files import remove_stale_temp_files
from fine_dist.launchers.torchrun import exit_code


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_draft(tmp_path):
    path = write_atomic(tmp_path / "deep" / "a.json", "old")
    with pytest.raises(TypeError):
        write_atomic(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.json"]
    write_atomic(path, b"new", durable=False)
    sync_disk(tmp_path)
    assert path.read_text() == "new"


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "model") as draft:
            (draft / "tensors").write_text(text)
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "model") as draft:
        (draft / "tensors").write_text("three")
        raise ValueError("no")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tensors").read_text() == "two"


def test_drafts_of_killed_writers_are_removed_and_those_of_living_ones_are_not(tmp_path):
    for name, age in ((".a.json.n1.7.1.tmp", 7200), (".b.json.n1.8.1.tmp", 0), ("kept.tmp", 7200)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert remove_stale_temp_files(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.json.n1.8.1.tmp", "kept.tmp"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_what_a_library_writes_has_the_mode_that_the_umask_gives(tmp_path, mask, mode):
    import torch
    from safetensors.torch import save_file

    before = os.umask(mask)
    try:
        assert umask() == mask
        with atomic_folder(tmp_path / "model") as draft:
            save_file({"a": torch.zeros(1)}, draft / "a.safetensors")
        with atomic_file(tmp_path / "b.safetensors") as draft:
            save_file({"a": torch.zeros(1)}, draft)
        write_atomic(tmp_path / "c.json", "{}")
    finally:
        os.umask(before)
    for name in ("model/a.safetensors", "b.safetensors", "c.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, what in ((tmp_path / "pipe", "named pipe"), (tmp_path / "socket", "socket"), ("/dev/zero", "device")):
            for read in (check_regular, open_regular, read_bytes, read_text, sha256_of, read_rows, last_row):
                with pytest.raises(NotAFile, match=what):
                    read(path)
    (tmp_path / "file").write_text("é")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "é" and read_bytes(tmp_path / "file", 1) == b"\xc3"
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing")
    check_regular(tmp_path / "nothing")


def test_a_row_without_a_step_is_no_row(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('[1]\n{"loss": 1}\n{"step": "2"}\n{"step": -1}\n{"step": true}\n' + "[" * 9999 + '\n{"step": 4}\n')
    assert read_rows(log) == [{"step": 4}] and last_row(log) == {"step": 4}


def test_a_line_that_is_being_written_is_no_row(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert read_rows(log) == [] and last_row(log) is None
    log.write_text('{"step": 1, "held_out_loss": 2}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert [row["step"] for row in read_rows(log)] == [1, 2]
    assert last_row(log) == {"step": 2, "loss": 0.5} and last_row(log, "held_out_loss")["step"] == 1
    assert last_row(log, "no such key") is None


@pytest.mark.parametrize("posix", [False, True])
def test_a_lock_excludes_other_processes_and_goes_with_its_holder(tmp_path, posix):
    path = tmp_path / "lock"
    path.touch()
    code = (
        "import sys, time; from fine_dist.core.locks import try_lock\n"
        f"f = open(sys.argv[1], 'r+'); print(try_lock(f.fileno(), 'x', posix={posix}), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    with open(path, "r+") as file:
        assert not try_lock(file.fileno(), path, posix=posix)
        holder.kill()
        holder.wait()
        assert try_lock(file.fileno(), path, posix=posix)
    with locked(path):
        pass


def test_ports_are_different_when_free_and_alike_when_derived():
    assert len(set(free_ports(5))) == 5
    assert derived_port(123, 4) == derived_port(123, 4) == 20000 + (123 * 131 + 4 * 17) % 10000
    assert derived_port(123, 4) != derived_port(123, 5)


def test_a_rank_is_told_in_torchruns_words():
    words = rank_environment(3, 8, 1, 2, "n1", 29400)
    assert json.dumps(words) == json.dumps({
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
        "MASTER_ADDR": "n1", "MASTER_PORT": "29400",
    })  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "code"), [([75, 75], 75), ([75, -15], 75), ([75, 1], 1), ([-9, -15], 1), ([2, 2], 2), ([-15], 1)]
)
def test_torchrun_tells_a_stop_from_a_crash(codes, code):
    assert exit_code(codes) == code
