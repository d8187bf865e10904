"""Shards from afar: a real HTTP server on loopback that is slow, breaks off and answers 503; pipes; the cache."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch

from fine_dist.core.errors import DataError
from fine_dist.data.cache import Cache
from fine_dist.data.settings import DataConfig
from fine_dist.data.sources import copy
from tests.data.making import make, numbers, stream, take

COUNTS = (20, 30, 25, 15)


class Unreliable(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `server.mischief` maps part of a name to what goes wrong, and how often."""

    def do_GET(self):
        self.server.requests.append(self.path)
        for name, (kind, times) in self.server.mischief.items():
            if name in self.path and times > 0:
                self.server.mischief[name] = (kind, times - 1)
                return getattr(self, kind)()
        super().do_GET()

    def busy(self):
        self.send_error(503)

    def breaks_off(self):
        path = self.translate_path(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(os.path.getsize(path)))
        self.end_headers()
        with open(path, "rb") as source:
            self.wfile.write(source.read(5000))
        self.close_connection = True

    def ends_early_without_a_length(self):
        self.send_response(200)
        self.end_headers()
        with open(self.translate_path(self.path), "rb") as source:
            self.wfile.write(source.read(5000))
        self.close_connection = True

    def stalls(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(1000))
        self.wfile.flush()
        self.server.released.wait(20)
        self.close_connection = True

    def is_slow(self):
        path = self.translate_path(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(os.path.getsize(path)))
        self.end_headers()
        with open(path, "rb") as source:
            while piece := source.read(16384):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.03)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path):
    """(folder, URL, server) of shards behind an HTTP server."""
    folder = tmp_path / "shards"
    make(folder, COUNTS)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Unreliable, directory=str(folder)))
    server.mischief, server.requests, server.released = {}, [], threading.Event()
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}", server
    server.released.set()
    server.shutdown()
    server.server_close()


FAST = {"timeout_s": 0.5, "retries": 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_gives_what_the_folder_gives(served, workers):
    folder, url, _ = served
    expected = numbers(take(stream(folder), 20))
    assert torch.equal(numbers(take(stream(url, workers=workers), 20)), expected)
    halves = [numbers(take(stream(f"{url}/manifest.json", rank=r, world_size=2), 20)) for r in range(2)]
    assert torch.equal(torch.cat(halves, dim=1), expected)


@pytest.mark.parametrize("kind", ["breaks_off", "ends_early_without_a_length", "stalls", "is_slow", "busy"])
def test_a_server_in_trouble_costs_time_and_no_sample(served, kind):
    folder, url, server = served
    # curl itself waits 2 s after a 503, in which no byte comes
    settings = {**FAST, "timeout_s": 4} if kind == "busy" else FAST
    server.mischief = {"000002": (kind, 1 if kind == "busy" else 2), "manifest": (kind, 0 if kind == "busy" else 1)}
    expected = numbers(take(stream(folder), 9))
    assert torch.equal(numbers(take(stream(url, **settings), 9)), expected)


def test_a_server_that_stays_in_trouble_is_named_with_what_it_did(served):
    _, url, server = served
    server.mischief = {"000001": ("breaks_off", 1000)}
    with pytest.raises(DataError, match=rf"{url}/latents-000001.tar: cannot be read after 2 attempts: .*exit 18"):
        take(stream(url, retries=1), 9)
    server.mischief = {"000001": ("stalls", 1000)}
    with pytest.raises(DataError, match=r"after 1 attempts: no byte for 0\.5 s \(data\.retries and data\.timeout_s"):
        take(stream(url, retries=0, timeout_s=0.5), 9)


def test_a_shard_that_the_server_does_not_have_is_damage_and_not_trouble(served):
    folder, url, _ = served
    (folder / "latents-000001.tar").unlink()
    with pytest.raises(DataError, match=r"latents-000001\.tar: the manifest lists this shard, but it is absent"):
        take(stream(url), 9)
    started = time.perf_counter()
    source = stream(url, max_bad_fraction=0.5)
    assert not set(numbers(take(source, 20)).flatten().tolist()) & set(range(20, 50)) and source.bad == 30
    assert time.perf_counter() - started < 3  # absence is not tried again


def test_a_wrong_hash_from_a_server_is_fetched_again_and_then_an_error(served):
    folder, url, _ = served
    path = folder / "latents-000003.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="after 3 attempts: its sha256 is not the manifest's"):
        take(stream(url, verify="sha256", retries=2), 9)


def test_a_pipe_is_a_source(tmp_path):
    make(tmp_path, COUNTS)
    expected = numbers(take(stream(tmp_path), 9))
    assert torch.equal(numbers(take(stream(f"pipe:cat {tmp_path}"), 9)), expected)
    some = numbers(take(stream(f"pipe:cat {tmp_path}/latents-{{000000..000001}}.tar"), 9))
    assert some.max() < 50
    with pytest.raises(DataError, match="exit 1"):
        stream(f"pipe:cat {tmp_path}/absent", retries=0)


def test_s3_goes_through_the_aws_command(tmp_path, monkeypatch):
    make(tmp_path / "bucket", COUNTS)
    tool = tmp_path / "bin" / "aws"
    tool.parent.mkdir()
    # stands in for the real client: `aws s3 cp --only-show-errors s3://NAME -`
    tool.write_text(f'#!/bin/sh\n[ "$1 $2" = "s3 cp" ] && exec cat "{tmp_path}/${{4#s3://}}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    expected = numbers(take(stream(tmp_path / "bucket"), 9))
    assert torch.equal(numbers(take(stream("s3://bucket"), 9)), expected)


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(DataError, match=r"no opener for 'ftpx'; legal: .*https.*s3"):
        stream("ftpx://host/shards")


def test_temporary_files_are_gone_when_the_stream_is(served, tmp_path, monkeypatch):
    _, url, _ = served
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    source = stream(url)
    assert next(source.batches()).step == 0
    assert list((tmp_path / "spool").iterdir()) == []  # they have no name even while they are read
    before = len(os.listdir("/proc/self/fd"))
    source.close()
    assert len(os.listdir("/proc/self/fd")) < before


# --- the cache -----------------------------------------------------------------------------------------------------


def test_a_cached_shard_is_fetched_once_for_many_streams_and_epochs(served, tmp_path):
    folder, url, server = served
    cache = str(tmp_path / "cache")
    expected = numbers(take(stream(folder), 30))
    for _ in range(3):
        assert torch.equal(numbers(take(stream(url, cache_dir=cache, workers=1), 30)), expected)
    fetched = Counter(path for path in server.requests if path.endswith(".tar"))
    assert len(fetched) == 4 and set(fetched.values()) == {1}


def test_a_cache_too_small_for_the_shards_stays_within_its_cap_and_loses_nothing(served, tmp_path):
    folder, url, _ = served
    cache, cap = tmp_path / "cache", 150_000
    expected = numbers(take(stream(folder), 30))
    source = stream(url, cache_dir=str(cache), cache_bytes=cap)
    batches = source.batches()
    for step in range(30):
        assert torch.equal(numbers([next(batches)])[0], expected[step])
        assert sum(path.stat().st_size for path in cache.iterdir()) <= cap
    source.close()
    assert any(cache.glob("*.tar"))


def test_a_half_file_in_the_cache_is_never_read(served, tmp_path):
    folder, url, _ = served
    cache = tmp_path / "cache"
    take(stream(url, cache_dir=str(cache)), 9)
    victim = sorted(cache.glob("*.tar"))[0]
    os.truncate(victim, 3000)
    shutil.copy(victim, f"{victim}.part")  # what a killed process leaves
    assert torch.equal(numbers(take(stream(url, cache_dir=str(cache)), 9)), numbers(take(stream(folder), 9)))
    assert not list(cache.glob("*.part")) and victim.stat().st_size > 3000


def fetch_all(cache_dir: str, url: str, names: list[str], out) -> None:
    cache, fetched = Cache(cache_dir, 120_000), 0
    for name in names:

        def fetch(part, name=name):
            nonlocal fetched
            fetched += 1
            copy(f"{url}/{name}", part, DataConfig())

        size = 20_000
        fd = cache.open(name, size, fetch)
        if fd is not None:
            with os.fdopen(fd, "rb") as stream:
                content = stream.read()
            assert content == name.encode() * (size // len(name)), f"{name} is not whole"
    out.put(fetched)


def test_several_processes_share_a_cache_and_never_see_half_a_file(tmp_path, served):
    folder, url, server = served
    names = [f"file-{i:05d}" for i in range(8)]
    for name in names:
        (folder / name).write_bytes(name.encode() * (20_000 // len(name)))
    server.mischief = {"file": ("is_slow", 100)}
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = [
        context.Process(target=fetch_all, args=(str(tmp_path / "cache"), url, names[k:] + names[:k], out))
        for k in (0, 0, 3)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        total = 0
        for path in (tmp_path / "cache").glob("*"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
        assert total <= 140_000  # the cap, and one file that was renamed between the two readings
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_server_without_the_folder_and_a_hub_without_a_network_are_one_line(served, capsys, monkeypatch):
    """HTTP 404 for the manifest, a port where nobody listens, and a hub that cannot be reached."""
    from fine_dist.train import main

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for url, words in (
        (f"{served[1]}/none", "the server says that it is not there"),
        ("http://127.0.0.1:9/x", "the host refuses the connection"),
        ("hf://datasets/nobody/none", "cannot be read after 1 attempts"),
    ):
        argv = ["--arch", "DiT-S/2", "--data.shards", url, "--data.retries", "0", "--launcher", "here"]
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said and said.count("\n") == 1, said
