"""`status`: the tasks of a fan-out, and single runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from fine_dist.core.config import Config
from fine_dist.engine.run_dir import RunDir, owner_of
from fine_dist.status import main
from launchers.state_table import StateTable, Submissions
from launchers.status import read


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
