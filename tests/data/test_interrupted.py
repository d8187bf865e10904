"""Encodings that several processes share, that are killed and continued, and what they say meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from fine_dist.core.errors import DataError
from fine_dist.core.temp_files import open_temp_file, remove_stale_temp_files
from fine_dist.data import image_decoding
from fine_dist.data.codecs import Identity
from fine_dist.data.encode_locks import EncodeJob
from fine_dist.data.encoder import EncodeProgress, encode
from fine_dist.data.image_decoding import center_crop
from fine_dist.data.images import FolderImages
from fine_dist.encode import EncodeConfig, run
from tests.data.picturing import config, hashes

ROOT = Path(__file__).resolve().parents[2]


# --- progress, leftovers -------------------------------------------------------------------------------------------


def test_a_terminal_sees_a_bar_with_rate_and_time_left(folder, tmp_path):
    mine, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    argv = ["--source", folder, "--out", tmp_path, "--image-size", "32", "--shard-samples", "4", "--batch", "2"]
    command = [sys.executable, "-m", "fine_dist.encode", *map(str, argv), "--launcher", "here"]
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: all is read, and nobody is at the other end
        while piece := os.read(mine, 1 << 16):
            seen += piece
    os.close(mine)
    assert done.returncode == 0, seen
    assert re.search(rb"25/25 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+ images/s\]", seen), seen


def test_a_log_gets_a_line_with_rate_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fine_dist.data.encoder.EVERY_S", 0.0)
    bar = EncodeProgress(tmp_path, 100, 10)
    bar.show(2, 0)  # what others had done before
    assert bar.line(30, 2.0) == f"encode: {tmp_path}: 30 of 100 images, 5/s, 00:14 left"
    time.sleep(0.01)
    bar.show(3, 5)
    assert "35 of 100 images" in capsys.readouterr().out
    bar.close()


def test_drafts_of_killed_writers_go_and_those_of_living_ones_stay(folder, tmp_path):
    out = tmp_path / "train"
    out.mkdir()
    code = "import sys, time; from pathlib import Path; from fine_dist.core.files import open_temp_file; "
    code += "kept = [open_temp_file(Path(path)) for path in sys.argv[1:]]; print('ready', flush=True); time.sleep(60)"
    # the draft of a manifest, of a shard beyond those of this encoding, and of a mark
    paths = [out / name for name in ("manifest.json", "latents-000099.tar", ".latents-000000.tar.json")]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    assert len(list(out.glob(".*.part"))) == 3
    (out / ".latents-000000.tar.lock").touch()  # of one killed between a unit's end and its release
    with open_temp_file(out / "other.json") as living:
        run(config(folder, tmp_path))
        assert [path.name for path in out.glob(".*.part")] == [Path(living.name).name]
    assert remove_stale_temp_files(out) == 1
    assert not list(out.glob(".*"))


def test_ctrl_c_promises_what_is_true(tmp_path):
    argv = ["--source", "pipe:exec sleep 60", "--out", str(tmp_path), "--launcher", "here"]
    command = [sys.executable, "-m", "fine_dist.encode", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "train" / ".latents-000000.tar.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that the command started
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert f"interrupted; the finished shards are in {tmp_path}; run the same command to resume" in said


# --- many processes, interruptions ---------------------------------------------------------------------------------


def encode_slowly(settings: EncodeConfig, pause_s: float) -> None:
    """Run in a process of its own."""

    def slowly(image, size, background):
        time.sleep(pause_s)
        return center_crop(image, size, background)

    image_decoding.center_crop = slowly
    run(settings)


@pytest.mark.distributed
def test_processes_share_the_shards_and_one_that_is_killed_costs_nothing(folder, tmp_path):
    run(config(folder, tmp_path / "alone", shard_samples=4, batch=2))
    shared = config(folder, tmp_path / "shared", shard_samples=4, batch=2, workers=1)
    out = tmp_path / "shared" / "train"
    context = multiprocessing.get_context("fork")
    victim = context.Process(target=encode_slowly, args=(shared, 0.3))
    victim.start()
    deadline = time.monotonic() + 60
    while not list(out.glob(".latents-*.part")) and time.monotonic() < deadline:
        time.sleep(0.005)
    others = [context.Process(target=encode_slowly, args=(shared, 0.02)) for _ in range(2)]
    for process in others:
        process.start()
    while len(list(out.glob("latents-*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    for process in (victim, *others):
        process.join(60)
    assert [process.exitcode for process in (victim, *others)] == [-signal.SIGKILL, 0, 0]
    expected, made = hashes(tmp_path / "alone" / "train"), hashes(out)
    assert sorted(made) == sorted(expected)  # no locks, marks or parts are left
    tars = [name for name in expected if name.endswith(".tar")]
    assert len(tars) == 7 and all(made[name] == expected[name] for name in tars)


def test_an_interrupted_encoding_continues_and_a_finished_one_does_nothing(folder, tmp_path, monkeypatch, capsys):
    expected = hashes(run(config(folder, tmp_path / "whole")) / "train")
    out, read = tmp_path / "out", []

    def interrupted(image, size, background):
        read.append(1)
        if len(read) > 14:
            raise KeyboardInterrupt
        return center_crop(image, size, background)

    monkeypatch.setattr("fine_dist.data.image_decoding.center_crop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config(folder, out, workers=1))
    names = [path.name for path in (out / "train").iterdir()]
    assert "latents-000000.tar" in names and "latents-000003.tar" not in names
    assert "manifest.json" not in names and not any(name.endswith(".part") for name in names)
    first = (out / "train" / "latents-000000.tar").stat().st_mtime_ns
    monkeypatch.setattr("fine_dist.data.image_decoding.center_crop", center_crop)
    assert hashes(run(config(folder, out)) / "train") == expected
    assert (out / "train" / "latents-000000.tar").stat().st_mtime_ns == first
    times = {path.name: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    capsys.readouterr()
    run(config(folder, out))
    assert "is complete: 25 samples in 4 shards" in capsys.readouterr().out
    assert times == {path.name: path.stat().st_mtime_ns for path in (out / "train").iterdir()}


def test_a_latent_that_cannot_be_stored_ends_the_encoding_and_leaves_no_shard(folder, tmp_path):
    class Overflowing(Identity):
        def encode(self, images):
            return images * 1e6, None  # beyond float16

    source = FolderImages(str(folder), image_size=8, per_unit=30, seed=0)
    with pytest.raises(DataError, match="000000-000000: the latent has NaN or Inf as float16"):
        encode(source, Overflowing(), EncodeJob(folder=tmp_path, settings={}, batch=8))
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".tar", ".part"))]


def test_a_folder_is_never_filled_with_two_kinds_of_latents(folder, tmp_path):
    run(config(folder, tmp_path))
    with pytest.raises(DataError, match=r"made with other settings: flips \(flips was False, now True\)"):
        run(config(folder, tmp_path, flips=True))
