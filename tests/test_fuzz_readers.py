"""Every file of ours that is read, altered or replaced by what is no file; junk environments; broken output.

The same rules as tests/test_fuzz.py: an answer in words, never a traceback and never a hang. The whole of a run
directory, a family, images, scores and a job is fuzzed by the commands that read them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fine_dist.__main__ import main as fine_dist
from fine_dist.launchers.worker import run_job
from tests.commands.conftest import ARCH, FAST, data
from tests.fuzzing import answered, changed, damaged, fuzz, nothing_is_executed  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = (0, 2, 3)
"""Exit codes of an answer: done, refused, some tasks failed."""


@pytest.fixture(scope="module")
def place(digit_shards, tmp_path_factory):
    """A condense run, a family of one target, images and scores of it: one of every file that we write."""
    root = tmp_path_factory.mktemp("everything")
    shards = data(digit_shards)
    for argv in (
        ["condense", *ARCH, *FAST, *shards, "--run-dir", str(root / "c")],
        ["init", *FAST, *shards, "--parent", str(root / "c"), "--depths", "2", "--run-dir", str(root / "i")],
        ["sample", "--model", str(root / "c"), "--run-dir", str(root / "s"), "--classes", "1", "--sampler.steps", "2"],
        ["evaluate", "--models", str(root / "c"), "--run-dir", str(root / "e"), *shards],
    ):
        assert fine_dist([*usable(argv), "--launcher", "here"]) == 0, argv
    return root


def usable(argv: list[str]) -> list[str]:
    """Flags that the command has: those of `FAST` are made for stages that draw pictures."""
    pairs = list(zip(argv[1::2], argv[2::2]))
    return argv if argv[0] != "init" else ["init", *(word for p in pairs if "sampler" not in p[0] for word in p)]


def files_of(place: Path) -> list[str]:
    """Every small file that is read again: JSON, rows, YAML, and what has no ending."""
    found = [p for p in place.rglob("*") if p.is_file() and p.stat().st_size < 2**20]
    return sorted(str(p.relative_to(place)) for p in found if "tfevents" not in p.name and not p.name.endswith(".png"))


def readers(root: Path, shards: Path) -> dict[str, list[list[str]]]:
    """Commands that read a run directory, by its folder."""
    c, i, s, e = (str(root / name) for name in "cise")
    here = ["--launcher", "here"]
    init = ["init", *FAST, *data(shards), "--parent", c, "--depths", "2", "--run-dir", i]
    return {
        "c": [
            ["status", c], ["status", c, "--json"], ["export", "--model", c, "--out", str(root / "out")],
            ["condense", *ARCH, *FAST, *data(shards), "--run-dir", c, *here],
        ],
        "i": [["status", i], ["init", "--list", i], [*usable(init), *here]],
        "s": [["sample", "--model", c, "--run-dir", s, "--classes", "1", "--sampler.steps", "2", *here]],
        "e": [["evaluate", "--models", c, "--run-dir", e, *data(shards), *here]],
    }  # fmt: skip


def ask(root: Path, shards: Path, name: str) -> None:
    """Have every command that reads this file answer."""
    for argv in readers(root, shards)[name[0]]:
        answered(lambda argv=argv: fine_dist(argv), ANSWERS)
        shutil.rmtree(root / "out", ignore_errors=True)


def alter(draw, path: Path) -> None:
    """Change what a JSON file says, or any bytes of any file."""
    content = path.read_bytes()
    try:
        tree = json.loads(content)
    except ValueError:
        tree = None
    if tree is not None and draw(st.integers(0, 3)):
        path.write_text(json.dumps(draw(changed(tree))))
    else:
        path.write_bytes(draw(damaged(content)))


@fuzz(12)
@given(st.data())
def test_any_change_to_any_file_of_ours_is_answered_in_words(place, digit_shards, data):
    copy = Path("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)
    name = data.draw(st.sampled_from([n for n in files_of(place) if not n.endswith((".safetensors", ".npy"))]))
    alter(data.draw, copy / name)
    ask(copy, digit_shards, name)


WORDS = (
    "c/environment.json", "c/config.yaml", "c/metrics.jsonl", "c/DONE.json", "c/identity.json", "e/evaluate.json",
    "s/samples.json", "c/learngene/manifest.json", "i/config.yaml",
)  # fmt: skip


@pytest.mark.parametrize("name", WORDS)
def test_what_is_no_file_in_the_place_of_one_of_ours_is_refused_at_once(place, digit_shards, name, tmp_path):
    """A named pipe without a writer: whoever opens it waits for ever."""
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    if not (copy / name).exists():
        pytest.skip(f"this run has no {name}")
    (copy / name).unlink()
    os.mkfifo(copy / name)
    ask(copy, digit_shards, name)


MARKUP = b"[/x] [bold] \xff\x00 [/]"


@pytest.mark.parametrize("name", ["c/config.yaml", "c/metrics.jsonl", "c/DONE.json", "c/environment.json"])
def test_a_terminals_markup_and_binary_in_a_run_directory_break_no_table(place, digit_shards, name, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    (copy / name).write_bytes(MARKUP)
    ask(copy, digit_shards, name)


def test_a_checkpoints_folder_that_is_a_file_is_one_line(place, digit_shards, tmp_path):
    shutil.copytree(place, tmp_path / "copy")
    run = tmp_path / "copy" / "c"
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")
    argv = ["condense", *ARCH, *FAST, *data(digit_shards), "--steps", "6", "--run-dir", str(run), "--launcher", "here"]
    assert "checkpoints" in answered(lambda: fine_dist(argv))


# --- files that are named by flags ----------------------------------------------------------------------------------

INPUTS = [
    ["condense", "--config", "@"], ["condense", "--ancestor", "@", "--steps", "1"],
    ["condense", "--data.shards", "@"], ["condense", "--data.shards", "@/train"],
    ["condense", "--engine.backend", "deepspeed", "--engine.deepspeed.extra", "@"],
    ["train", "--parent", "@"], ["train", "--parent", "@.pt"], ["init", "--parent", "@.safetensors"],
    ["init", "--list", "@"], ["sample", "--model", "@"], ["sample", "--model", "@.pt"],
    ["export", "--model", "@.safetensors", "--out", "o"], ["encode", "--source", "@", "--out", "o"],
    ["encode", "--source", "@.tar", "--out", "o"], ["encode", "--source", "idx:@", "--out", "o"],
    ["encode", "--inspect", "@"], ["encode", "--verify", "@"], ["encode", "--index", "@"],
    ["evaluate", "--models", "@.npz", "--metrics", "fid", "--reference", "@.npz", "--features.inception", "@.pth"],
    ["evaluate", "--models", "@", "--data.held-out", "@"], ["creative", "--concepts", "@", "--encoders", "tiny"],
    ["creative", "--pairs", "@", "--encoders", "tiny"], ["creative", "--evaluate", "@"],
    ["status", "@"], ["plan", "--stage", "condense", "--config", "@"], ["study", "--config", "@"],
    ["plan", "--stage", "condense", "--arch", "DiT-S/2", "--scale", "2", "--parts", "@"],
]  # fmt: skip


@pytest.mark.parametrize("argv", INPUTS, ids=" ".join)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_flag_that_names_no_regular_file_is_refused_at_once(argv, kind, tmp_path, digit_shards):
    name = tmp_path / "thing"
    endings = ["", ".pt", ".pth", ".tar", ".npz", ".safetensors"]
    for ending in endings:
        path = f"{name}{ending}"
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            Path(path).symlink_to("/dev/zero")
        else:
            socket.socket(socket.AF_UNIX).bind(path)
    words = [word.replace("@", str(name)) for word in argv]
    if argv[0] not in ("export", "status", "plan", "study"):
        words += ["--launcher", "here"]
    if argv[0] in ("condense", "train", "init") and "--data.shards" not in words and "--list" not in words:
        words += [*data(digit_shards), "--run-dir", str(tmp_path / "run")]
    said = answered(lambda: fine_dist(words))
    assert said.startswith("error: "), said


@pytest.mark.parametrize(
    "content", [b"a," + b"x" * 200_000 + b"\n", b"\xff\xfe\x00", b"\x00" * 100, b"a,b,c\n" * 9, b""]
)
def test_a_table_of_pairs_that_is_none_is_one_line(content, tmp_path):
    (tmp_path / "pairs.csv").write_bytes(content)
    for flag in ("--pairs", "--concepts"):
        words = ["creative", flag, str(tmp_path / "pairs.csv"), "--encoders", "tiny", "--dry-run"]
        answered(lambda words=words: fine_dist(words))
        answered(lambda words=words: fine_dist([*words[:-1], "--steps", "1", "--launcher", "here"]))


@fuzz(25)
@given(st.data())
def test_any_job_file_is_run_or_refused_in_words(data):
    config = Path("c.yaml")
    config.write_text("steps: 1\n")
    sound = {
        "name": "x", "module": "fine_dist.export", "config": str(config.absolute()), "run_dir": ".", "cwd": ".",
        "env": {"A": "b"}, "nodes": 1, "extras": {"slurm": {"qos": "x"}},
    }  # fmt: skip
    path = Path("job.json")
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(changed(sound))))
    else:
        path.write_bytes(data.draw(damaged(json.dumps(sound).encode("latin-1"))))
    where = os.getcwd()
    try:
        answered(lambda: run_job("job.json"), (0, 1, 2))
    finally:
        os.chdir(where)


# --- environments and streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_JOB_ID", "FINE_DIST_DEAD_AFTER_S",
    "FINE_DIST_COLLECTIVE_TIMEOUT_S", "FINE_DIST_LOG_LEVEL", "FINE_DIST_SITE", "COLUMNS",
])  # fmt: skip
@pytest.mark.parametrize("value", ["x", "-1", "", "1e99", "٣"])
def test_junk_in_the_environment_is_one_line_or_ignored(variable, value, monkeypatch, tmp_path, digit_shards):
    monkeypatch.setenv(variable, value)
    if variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv({"RANK": "WORLD_SIZE", "WORLD_SIZE": "RANK"}[variable], "1" if variable == "RANK" else "0")
    answered(lambda: fine_dist(["condense", *ARCH, "--dry-run", *data(digit_shards), "--run-dir", str(tmp_path / "r")]))
    answered(lambda: fine_dist(["status", str(tmp_path)]))


@pytest.mark.parametrize(
    ("command", "end"),
    [
        *(("condense --help-all", end) for end in (">&-", "2>&-", "<&-", ">&- 2>&-", ">/dev/full", "2>/dev/full")),
        *(("condense --arch DiT-S/2 --dry-run", end) for end in (">&- 2>&- <&-", ">/dev/full 2>/dev/full")),
        ("status nowhere", "2>&-"),
        ("status nowhere", ">/dev/full 2>/dev/full"),
    ],
)
def test_output_that_is_closed_or_full_ends_with_a_code_and_no_traceback(command, end):
    script = f'"$0" -m fine_dist {command} {end}'
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, text=True, env=env)
    refused = command == "status nowhere" or ">/dev/full" in end.replace("2>/dev/full", "")
    assert done.returncode == (2 if refused else 0)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr


@pytest.mark.parametrize("words", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX", "LANG": ""}, {"PYTHONIOENCODING": "ascii"}])
def test_names_in_unicode_are_no_trouble_to_a_terminal_of_ascii(words, tmp_path, digit_shards):
    run = tmp_path / "größe-日本"
    for argv in (["condense", *ARCH, *data(digit_shards), "--dry-run"], ["status"]):
        at = ["--run-dir", str(run)] if argv[0] == "condense" else [str(run)]
        done = subprocess.run(
            [sys.executable, "-m", "fine_dist", *argv, *at],
            capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), **words}, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == (2 if argv[0] == "status" else 0), done.stderr
        assert b"Traceback" not in done.stderr, done.stderr


def test_a_limit_on_the_size_of_files_is_one_line_and_the_same_command_continues(tmp_path, digit_shards):
    argv = [sys.executable, "-m", "fine_dist", "condense", *ARCH, *FAST, *data(digit_shards), "--launcher", "here"]
    argv += ["--run-dir", str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = " ".join(argv)
    done = subprocess.run(["bash", "-c", f"ulimit -f 16; exec {words}"], capture_output=True, text=True, env=env)
    assert done.returncode in (2, 75) and "Traceback" not in done.stderr, done.stderr
    assert "ulimit -f" in done.stderr or "limit" in done.stderr.lower()
    assert subprocess.run(argv, capture_output=True, env=env).returncode == 0
