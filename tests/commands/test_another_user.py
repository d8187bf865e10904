"""Looking needs neither a lock nor the right to write: runs of another user, and runs on a read-only mount."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fine_dist.__main__ import main as fine_dist
from fine_dist.engine.run_dir import RunDir
from fine_dist.launchers.state_table import StateTable
from tests.commands.conftest import ARCH, FAST, command, data

ROOT = Path(__file__).resolve().parents[2]
ENGINE = FAST[: FAST.index("--sampler.steps")]
LOOKING = """
import json, os, sys
from pathlib import Path
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from fine_dist.__main__ import main
from fine_dist import condense, evaluate, init, sample, status, train
from fine_dist.evaluation import evaluator
from fine_dist.family import members, summary, train_family
from fine_dist.sampling import drawing
from fine_dist.stages import checking
uid, commands = json.loads(sys.argv[1])
if uid is not None:
    os.setgroups([]), os.setgid(uid), os.setuid(uid)
for words in commands:
    print("code", main(words), " ".join(words), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def theirs(trained, digit_shards):
    """Finished runs, outside of pytest's folders, which are their owner's alone."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make_runs(root, trained, digit_shards)
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
        yield root


def make_runs(root: Path, trained: Path, digit_shards: Path) -> None:
    """A run of every kind."""
    shutil.copytree(digit_shards, root / "data")
    shutil.copytree(trained, root / "t")
    shards, run = data(root / "data"), ["--run-dir", str(root / "i")]
    assert command(["condense", *ARCH, *FAST, *shards, "--run-dir", str(root / "c")]) == 0
    assert command(["init", *ENGINE, *shards, "--parent", str(root / "c"), "--depths", "2", "--seeds", "0", *run]) == 0
    samples = ["--classes", "1", "--sampler.steps", "2", "--run-dir", str(root / "s")]
    assert command(["sample", "--model", str(root / "c"), *samples]) == 0


def looks(root: Path, mine: Path) -> list[list[str]]:
    """Every command that only reads runs, or reads them and writes elsewhere."""
    shards, here = data(root / "data"), ["--launcher", "here"]
    family = ["init", *ENGINE, *shards, "--parent", str(root / "c"), "--depths", "2", "--seeds", "0"]
    samples = ["sample", "--classes", "1", "--sampler.steps", "2", *here]
    return [
        *(["status", str(root / name), "--json"] for name in "cit"), ["init", "--list", str(root / "i")],
        [*samples, "--model", str(root / "c"), "--run-dir", str(mine / "one")],
        [*samples, "--model", str(root / "i"), "--run-dir", str(mine / "all")],
        [*samples, "--model", str(root / "c"), "--run-dir", str(root / "s")],  # drawn before: there is nothing to write
        ["evaluate", "--models", str(root / "i"), "--run-dir", str(mine / "e"), *shards, *here],
        ["condense", *ARCH, *FAST, *shards, "--run-dir", str(root / "c"), "--dry-run"],
        [*family, "--run-dir", str(root / "i"), "--dry-run"],
        [*family, "--run-dir", str(root / "i"), "--dry-run", "--launcher", "local"],
        ["train", *ARCH, *FAST, *shards, "--run-dir", str(root / "t"), "--dry-run"],
    ]  # fmt: skip


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("how", ["another user", "read-only mount"])
def test_looking_at_runs_that_one_may_not_write_to(theirs, tmp_path, how):
    mine = theirs.with_name(f"{theirs.name}-{how[:4]}")
    mine.mkdir()
    uid = 65534 if how == "another user" else None
    os.chown(mine, uid or 0, uid or 0)
    mount = f"mount --bind {theirs} {theirs} && mount -o remount,ro,bind {theirs} && " if uid is None else ""
    unshare = ["unshare", "-m"] if mount else []
    if mount and subprocess.run([*unshare, "bash", "-c", f"{mount}true"], capture_output=True).returncode:
        pytest.skip("this machine lets no one mount")
    # what runs is locked, and looked at all the same
    with RunDir(theirs / "c") as run, StateTable(theirs / "i").claim(["L2-s0-lr0.01"]):
        run._take_lock()
        before = sorted((str(p), p.stat().st_mtime_ns) for p in theirs.rglob("*"))
        words = json.dumps([uid, looks(theirs, mine)])
        done = subprocess.run(
            [*unshare, "bash", "-c", f'{mount}exec "$0" -c "$1" "$2"', sys.executable, LOOKING, words],
            capture_output=True, text=True, cwd=mine,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(mine)},
        )  # fmt: skip
        after = sorted((str(p), p.stat().st_mtime_ns) for p in theirs.rglob("*"))
    shutil.rmtree(mine)
    codes = [line for line in done.stderr.splitlines() if line.startswith("code ")]
    assert [line for line in codes if not line.startswith("code 0 ")] == [], done.stderr
    assert len(codes) == len(looks(theirs, mine)), done.stderr
    assert after == before


def test_an_evaluation_that_could_not_be_written_is_refused_before_it_measures(trained, digit_shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["evaluate", "--models", str(trained), "--run-dir", str(tmp_path / "file" / "e"), *data(digit_shards)]
    assert command(argv) == 2
    said = capsys.readouterr()
    assert "Not a directory" in said.err and "held-out" not in said.out


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to a group that it is not in")
def test_all_that_is_written_in_a_groups_folder_is_the_groups(digit_shards, tmp_path):
    group = tmp_path / "group"
    group.mkdir()
    os.chown(group, -1, 65534)
    group.chmod(0o2775)
    before = os.umask(0o002)
    try:
        shards, parent = data(digit_shards), ["--parent", str(group / "c")]
        family = ["init", *ENGINE, *shards, *parent, "--depths", "2", "--run-dir", str(group / "i")]
        assert command(["condense", *ARCH, *FAST, *shards, "--run-dir", str(group / "c")]) == 0
        assert command([*family, "--engine.time-limit-min", "0.00001"]) == 75  # leaves the state of a pack
        assert command([*family, "--engine.backend", "fsdp2", "--run-dir", str(group / "i2")]) == 0
        for to, name in (("diffusers", "x"), ("dit", "x.pt"), ("fine_dist", "y")):
            assert command(["export", "--model", str(group / "c"), "--to", to, "--out", str(group / name)]) == 0
        assert fine_dist(["init-project", str(group / "project")]) == 0
    finally:
        os.umask(before)
    made = [path for path in group.rglob("*") if not path.is_symlink()]
    assert {"learngene", "step_00000004", "packs", "x", "x.pt", "condense.sh"} <= {path.name for path in made}
    assert [path for path in made if path.stat().st_gid != 65534] == []
    assert [path for path in made if path.is_dir() and path.stat().st_mode & 0o7777 != 0o2775] == []
    assert [path for path in made if path.is_file() and path.stat().st_mode & 0o666 != 0o664] == []
