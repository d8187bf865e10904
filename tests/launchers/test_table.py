"""Job specs, grids and the state table."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from fine_dist.core.errors import ConfigError, LaunchError, RunDirError
from fine_dist.core.grid import GridAxis, expand
from fine_dist.launchers.spec import JobSpec
from fine_dist.launchers.state_table import StateTable, Submissions
from fine_dist.launchers.status import read


def spec(**fields) -> JobSpec:
    return JobSpec(**{"name": "a", "module": "m", "config": "c.yaml", "run_dir": "/r", "cwd": "/", **fields})


def test_a_job_read_from_its_file_is_the_job_that_was_written(tmp_path):
    job = spec(nodes=2, processes_per_node=3, env={"A": "1"}, extras={"slurm": {"qos": "high"}}, tasks=("x", "y"))
    assert JobSpec.load(job.save(tmp_path / "job.json")) == job
    assert job.world_size == 6 and job.rows == ("x", "y") and spec().rows == ("a",)


def test_a_damaged_missing_or_misspelt_job_file_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"no\.json.*shared by all nodes"):
        JobSpec.load(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(LaunchError, match=r"bad\.json is damaged: .*; submit again"):
        JobSpec.load(tmp_path / "bad.json")
    (tmp_path / "odd.json").write_text(json.dumps({**json.loads(spec().model_dump_json()), "node": 2}))
    with pytest.raises(ConfigError, match=r"node: unknown key.*did you mean 'nodes'"):
        JobSpec.load(tmp_path / "odd.json")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 121])
def test_a_name_that_cannot_be_a_file_name_is_refused(name):
    with pytest.raises(ValueError, match="task name"):
        spec(name=name)


def test_a_grid_gives_every_combination_named_by_its_labels():
    axes = [
        GridAxis("depths", (4, 6), lambda depth: f"L{depth}"),
        GridAxis("data", ("only",), lambda name: ""),
        GridAxis("seeds", (0, 1), lambda seed: f"s{seed}"),
    ]
    points = expand(axes)
    assert [p.name for p in points] == ["L4-s0", "L4-s1", "L6-s0", "L6-s1"]
    assert points[2].values == (6, "only", 0)


def test_an_empty_or_repeating_grid_is_refused():
    with pytest.raises(ConfigError, match="seed: an empty list"):
        expand([GridAxis("seed", [], str)])
    with pytest.raises(ConfigError, match="seed: 1 is listed twice"):
        expand([GridAxis("seed", [1, 2, 1], str)])
    with pytest.raises(ConfigError, match="one name"):
        expand([GridAxis("lr", [1e-2, 1.0000000001e-2], lambda lr: f"{lr:g}")])


def test_rows_keep_their_order_and_what_was_done_before(tmp_path):
    table = StateTable(tmp_path)
    table.add(["b", "a"])
    table.start("a", job="slurm 7_1")
    table.finish("a", "done")
    table.add(["b", "a", "c"])
    assert [(row.name, row.state, row.attempts) for row in table.rows()] == [
        ("b", "pending", 0), ("a", "done", 1), ("c", "pending", 0),
    ]  # fmt: skip
    assert table.get("a").job == "slurm 7_1" and table.get("a").seconds >= 0 and table.get("zzz") is None


def test_a_damaged_row_is_named_with_the_remedy(tmp_path):
    StateTable(tmp_path).add(["a"])
    (tmp_path / "tasks" / "a.json").write_text("{")
    with pytest.raises(RunDirError, match=r"a\.json is damaged: .*; delete it"):
        StateTable(tmp_path).rows()


def test_of_many_processes_that_want_a_task_exactly_one_gets_it(tmp_path):
    StateTable(tmp_path).add(["a"])
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert sum(pool.map(_claim_and_hold, [str(tmp_path)] * 4)) == 1


def _claim_and_hold(folder: str) -> bool:
    claim = StateTable(folder).claim(["a"], wait_s=0.3)
    time.sleep(1.0)
    return claim is not None


def test_writers_of_many_processes_lose_no_row(tmp_path):
    names = [f"t{i}" for i in range(40)]
    StateTable(tmp_path).add(names)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(_finish_all, [(str(tmp_path), names[i::4]) for i in range(4)])
    assert [row.state for row in StateTable(tmp_path).rows()] == ["done"] * 40
    assert not [p for p in (tmp_path / "tasks").rglob("*") if p.is_file() and p.suffix not in (".json", ".lock")]


def _finish_all(args) -> None:
    table = StateTable(args[0])
    for name in args[1]:
        table.start(name)
        table.finish(name, "done")


def test_a_task_whose_process_was_killed_is_lost_at_once_and_may_be_claimed(tmp_path):
    table = StateTable(tmp_path)
    table.add(["a"])
    code = (
        "import sys, time; from fine_dist.launchers.state_table import StateTable\n"
        "t = StateTable(sys.argv[1]); c = t.claim(['a'])\n"
        "t.start('a'); print('ready', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert table.claim(["a"], wait_s=0.1) is None and not table.lost(table.get("a"))
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert table.lost(table.get("a"))
    assert read(tmp_path)[0]["state"] == "lost"
    with table.claim(["a"]):
        table.start("a")
        assert table.get("a").attempts == 2


def test_a_second_driver_is_refused_and_told_of_the_first(tmp_path):
    table = StateTable(tmp_path)
    second = StateTable(tmp_path).driver("ray fan-out")
    with table.driver("local fan-out"), pytest.raises(RunDirError, match=f"local fan-out, process {os.getpid()}"):
        second.__enter__()
    with table.driver("afterwards"):
        pass


def test_submissions_are_remembered_by_the_schedulers_names(tmp_path):
    Submissions(tmp_path).add({"12_0": ["a"], "12_1": ["b", "c"]})
    Submissions(tmp_path).add({"13": ["d"]})
    assert Submissions(tmp_path).all() == {"12_0": ["a"], "12_1": ["b", "c"], "13": ["d"]}


def test_thousands_of_rows_are_added_and_listed_at_once(tmp_path):
    names = [f"target{i}" for i in range(5000)]
    # processor time: a disk that is busy with other work has nothing to do with the number of rows
    begun = time.process_time()
    StateTable(tmp_path).add(names, {name: f"/runs/{name}" for name in names})
    added = time.process_time() - begun
    table = StateTable(tmp_path)
    table.add([*names, *(f"more{i}" for i in range(5000))])
    table.finish("more7", "done")
    begun = time.process_time()
    rows = table.rows()
    listed = time.process_time() - begun
    assert len(rows) == 10000 and rows[4999].run_dir == "/runs/target4999" and rows[5007].state == "done"
    assert added < 1 and listed < 1, f"5,000 rows added in {added:.2f} s, 10,000 listed in {listed:.2f} s"


def test_a_damaged_list_of_tasks_is_named_and_the_same_command_mends_it(tmp_path):
    StateTable(tmp_path).add(["a", "b"])
    [path] = (tmp_path / "tasks" / ".added").iterdir()
    path.write_text("[[")
    with pytest.raises(RunDirError, match=r"damaged: .*; delete it, and the same command adds its tasks again"):
        StateTable(tmp_path).rows()
    path.unlink()
    StateTable(tmp_path).add(["a", "b"])
    assert [row.name for row in StateTable(tmp_path).rows()] == ["a", "b"]
