"""Files that are whole or not there, locks and rows of metrics, and words between processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from fine_dist.core.files import (
    last_row,
    locked,
    read_rows,
    remove_drafts,
    sync_disk,
    try_lock,
    whole_folder,
    write_atomic,
)
from fine_dist.core.processes import derived_port, free_ports, rank_words
from launchers.torchrun import exit_code


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
        with whole_folder(tmp_path / "model") as draft:
            (draft / "tensors").write_text(text)
    with pytest.raises(ValueError, match="no"), whole_folder(tmp_path / "model") as draft:
        (draft / "tensors").write_text("three")
        raise ValueError("no")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "tensors").read_text() == "two"


def test_drafts_of_killed_writers_are_removed_and_those_of_living_ones_are_not(tmp_path):
    for name, age in ((".a.json.n1.7.1.tmp", 7200), (".b.json.n1.8.1.tmp", 0), ("kept.tmp", 7200)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert remove_drafts(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.json.n1.8.1.tmp", "kept.tmp"]


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
        "import sys, time; from fine_dist.core.files import try_lock\n"
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
    words = rank_words(3, 8, 1, 2, "n1", 29400)
    assert json.dumps(words) == json.dumps({
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2",
        "MASTER_ADDR": "n1", "MASTER_PORT": "29400",
    })  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "code"), [([75, 75], 75), ([75, -15], 75), ([75, 1], 1), ([-9, -15], 1), ([2, 2], 2), ([-15], 1)]
)
def test_torchrun_tells_a_stop_from_a_crash(codes, code):
    assert exit_code(codes) == code
