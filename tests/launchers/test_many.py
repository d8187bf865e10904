"""The files of a family of thousands of targets: few syncs, nothing read twice, nothing that grows with its square."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import pytest

from benchmarks import large_families
from fine_dist.core.config import dump_yaml
from fine_dist.core.errors import RunDirError
from fine_dist.core.files import write_all
from fine_dist.family.config import InitConfig
from fine_dist.family.packing import PackConfig, Shape, plan
from fine_dist.launchers.state_table import StateTable
from fine_dist.model.arch import Arch

NAMES = [f"t{i}" for i in range(300)]


def test_a_pack_starts_with_one_sync_and_every_end_of_a_target_has_its_own(tmp_path):
    table = StateTable(tmp_path)
    with large_families.slow_disk(0.0) as syncs:
        table.add(NAMES)
        added = syncs[0]
        table.start_all(NAMES[:64], job="slurm 7_1")
        started = syncs[0] - added
        table.finish("t0", "done")
        ended = syncs[0] - added - started
        table.finish_all(NAMES[1:64], "pending", "stopped")
        stopped = syncs[0] - added - started - ended
    assert (added, started, ended, stopped) == (1, 1, 1, 1)
    rows = StateTable(tmp_path).rows()
    assert [row.name for row in rows] == NAMES
    assert rows[0].state == "done" and rows[0].attempts == 1 and rows[0].job == "slurm 7_1"
    assert {(row.state, row.reason, row.attempts) for row in rows[1:64]} == {("pending", "stopped", 1)}
    assert {(row.state, row.attempts) for row in rows[64:]} == {("pending", 0)}
    assert table.started() == set(NAMES[:64])


def test_many_files_replaced_together_leave_no_draft_and_are_each_whole(tmp_path):
    (tmp_path / "a3").write_text("before")
    write_all({tmp_path / f"a{i}": f"now {i}" for i in range(600)})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {f"a{i}": f"now {i}" for i in range(600)}


def test_a_power_cut_before_the_sync_leaves_every_row_as_it_was(tmp_path, monkeypatch):
    table = StateTable(tmp_path)
    table.add(NAMES)
    table.start_all(NAMES[:3])

    def cut(folder):
        raise OSError("the power is gone")

    monkeypatch.setattr("fine_dist.core.files.sync_disk", cut)
    with pytest.raises(OSError, match="the power is gone"):
        table.finish_all(NAMES[:3], "done")
    assert {row.state for row in StateTable(tmp_path).rows()[:3]} == {"running"}


def test_more_tasks_than_open_files_are_claimed_where_the_hard_limit_allows_it_and_else_an_error_says_so(tmp_path):
    code = (
        "import resource, sys; from fine_dist.launchers.state_table import StateTable; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2]))); "
        "claim = StateTable(sys.argv[1]).claim([f't{i}' for i in range(200)]); print('held', claim is not None)"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 1024

    def claimed(hard: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, str(tmp_path), str(hard)], capture_output=True, text=True)

    assert claimed(1024).stdout == "held True\n"
    failed = claimed(100)
    assert RunDirError.__name__ in failed.stderr and "limit here is 100" in failed.stderr
    assert "ulimit -Hn" in failed.stderr


def test_the_yaml_of_a_task_is_the_same_whether_or_not_its_parts_are_known():
    config = InitConfig(seeds=tuple(range(50)), variants={"sigma": ("linear", "random")})
    known: dict = {}
    for only in ((), ("L4-s0",), ("L4-s1", "L6-s1")):
        task = config.model_copy(update={"only": only})
        assert dump_yaml(task, known) == dump_yaml(task)
        assert f"- {only[-1]}" in dump_yaml(task, known) if only else "only: []" in dump_yaml(task, known)


def shapes(count: int) -> list[Shape]:
    arch = Arch(hidden_size=64, num_layers=8, num_heads=4, patch_size=2, in_channels=1, input_size=8, num_classes=10)
    deep = [arch.with_depth(1 + i) for i in range(8)]
    return [Shape(f"j{i}", deep[i % 8], "ab"[i % 3 == 0], 10 + i % 2, 1000) for i in range(count)]


def dealt(jobs: list[Shape], most: int, workers: int) -> set[tuple[str, ...]]:
    """The planner's rule as it is said: longest first, each to the open pack with the least to do."""
    work = {job.name: job.arch.num_layers * job.steps for job in jobs}
    total, packs = sum(work.values()), set()
    for name in {job.group for job in jobs}:
        group = sorted((j for j in jobs if j.group == name), key=lambda j: (-work[j.name], j.name))
        share = round(workers * sum(work[j.name] for j in group) / total)
        made: list[list[Shape]] = [[] for _ in range(max(-(-len(group) // most), share, 1))]
        for job in group:
            min((h for h in made if len(h) < most), key=lambda h: sum(work[j.name] for j in h)).append(job)
        packs |= {tuple(j.name for j in sorted(h, key=lambda j: (-j.arch.num_layers, j.name))) for h in made if h}
    return packs


@pytest.mark.parametrize(("count", "most", "workers"), [(40, 7, 3), (100, 64, 9), (97, 5, 2)])
def test_packs_are_dealt_by_the_rule(count, most, workers):
    packs = plan(shapes(count), PackConfig(max_jobs=most), workers=workers, batch=4, memory=2**30, cpu=False)
    assert {pack.jobs for pack in packs} == dealt(shapes(count), most, workers)


def test_planning_four_times_the_targets_takes_about_four_times_as_long():
    def seconds(count: int) -> float:
        jobs, best = shapes(count), 9e9
        for _ in range(3):  # processor time, the best of three: others may hold the cores
            begun = time.process_time()
            plan(jobs, PackConfig(), workers=64, batch=4, memory=2**30, cpu=False)
            best = min(best, time.process_time() - begun)
        return best

    # a planner that compares every target with every other takes sixteen times as long
    assert seconds(8000) < 8 * seconds(2000)


@pytest.mark.slow
def test_ten_thousand_targets_are_planned_listed_followed_and_kept_within_their_bars():
    missed = [
        f"{row.measure}: {row.value:.3g} {row.unit}"
        for row in large_families.state_tables(10_000, True)
        if row.passed is False
    ]
    assert not missed, missed
