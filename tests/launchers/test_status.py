"""`status`: the tasks of a fan-out, and single runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from fine_dist.core.config import Config
from fine_dist.core.errors import LaunchError
from fine_dist.engine.run_dir import RunDir, owner_of
from fine_dist.launchers.state_table import StateTable, Submissions
from fine_dist.launchers.status import read
from fine_dist.status import main


def test_status_names_what_failed_and_its_code_says_so(tmp_path, capsys):
    table = StateTable(tmp_path)
    table.add(["good", "bad", "waits"])
    table.start("bad")
    table.finish("bad", "failed", "loss is not finite [step 3]")
    table.finish("good", "done")
    Submissions(tmp_path).add({"12": ["waits"]})
    assert main([str(tmp_path)]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "bad failed 1" in said and "loss is not finite" in said and "3 tasks: 1 done, 1 failed, 1 queued" in said
    assert main([str(tmp_path), "--json"]) == 3
    rows = json.loads(capsys.readouterr().out)["tasks"]
    assert [(row["name"], row["state"]) for row in rows] == [("good", "done"), ("bad", "failed"), ("waits", "queued")]


def test_status_of_a_directory_without_tasks_says_what_to_give(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "nothing has run here (neither tasks/ nor config.yaml" in capsys.readouterr().err


class OneKey(Config):
    """A config."""

    steps: int = 10
    """Steps."""


def test_status_of_a_single_run_tells_its_owner_its_newest_numbers_and_its_end(tmp_path, capsys):
    code = (
        "import sys, time; from tests.launchers.test_status import OneKey, RunDir\n"
        "r = RunDir(sys.argv[1]).open('train', {}); print('open', flush=True); sys.stdin.readline()\n"
        "r.claim(OneKey()); print('ready', flush=True); time.sleep(60)"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    run.stdout.readline()
    assert main([str(tmp_path)]) == 0
    assert f"a run before its first step running owner pid {run.pid} on " in " ".join(capsys.readouterr().out.split())
    print(file=run.stdin, flush=True)
    run.stdout.readline()
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "held_out_loss": 0.5}\n{"step": 6, "loss": 0.25}\n{"step": 7, '
    )
    assert main([str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"train running owner pid {run.pid} on " in said and "loss 0.25" in said and "held_out_loss 0.5" in said
    run.kill()
    run.wait()
    assert owner_of(tmp_path) is None and read(tmp_path)[0]["state"] == "pending"
    with RunDir(tmp_path).open("train", {}) as mine:
        assert [owner_of(tmp_path), owner_of(tmp_path)] == [f"pid {os.getpid()} on {socket.gethostname()}"] * 2
        mine.finish(held_out_loss=0.125, steps=10)
    assert main([str(tmp_path), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["tasks"]
    assert (row["state"], row["owner"], row["done"]) == ("done", None, {"held_out_loss": 0.125, "steps": 10})


def test_a_submitted_run_that_has_not_begun_is_queued(tmp_path):
    Submissions(tmp_path).add({"31": ["condense"]})
    [row] = read(tmp_path)
    assert (row["name"], row["state"], row["job"]) == ("condense", "queued", "31")


def test_status_needs_neither_a_lock_of_its_own_nor_the_right_to_write(tmp_path):
    table = StateTable(tmp_path)
    table.add(["held", "killed"])
    table.start("killed")
    with table.claim(["held"]):
        table.start("held")
        for path in [*tmp_path.rglob("*"), tmp_path]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        code = "import os, sys, pathlib; from fine_dist.launchers.status import read; os.setuid(65534); "
        code += "print([(r['name'], r['state']) for r in read(pathlib.Path(sys.argv[1]))])"
        root = tmp_path
        while root != root.parent and root.name != "tmp":  # pytest's own folders are their owner's alone
            root.chmod(root.stat().st_mode | 0o055)
            root = root.parent
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout == "[('held', 'running'), ('killed', 'lost')]\n", done.stderr


def test_a_fan_out_that_was_refused_leaves_nothing_that_status_trips_over(tmp_path, capsys):
    run_dir = tmp_path / "family"
    with pytest.raises(LaunchError), StateTable(run_dir).driver("local fan-out"):
        raise LaunchError("refused by the preflight")
    assert not run_dir.exists()
    assert main([str(run_dir)]) == 2
    assert "nothing has run here" in capsys.readouterr().err


def test_a_reason_that_looks_like_markup_is_shown_as_it_is(tmp_path, capsys):
    table = StateTable(tmp_path)
    table.add(["a"])
    table.finish("a", "failed", "no such key [/x] in [red]")
    assert main([str(tmp_path)]) == 3
    assert "[/x]" in capsys.readouterr().out
