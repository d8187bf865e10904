"""Dead ranks: every rank beats a heart that the others can see, so that none of them waits for a dead one forever.

A collective with a rank that was killed fails at once under gloo and hangs under NCCL; with a rank that is stopped or
cut off it hangs under both. So each rank has a thread that beats in a small store of rank 0's and looks at the other
hearts. When one stops, the lowest living rank prints one message and all of them end.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

from fine_dist.engine.dist import World, barrier, broadcast_object
from fine_dist.errors import EXIT_USER_ERROR, FineDistError, ResumeLater, TrainingError

BEAT_S = 1.0
"""Seconds between two beats."""
DEAD_AFTER_S = 60.0
"""A heart that has not beaten for so long is dead; FINE_DIST_DEAD_AFTER_S overrides it."""


class Watch:
    """A context around the training of several ranks. In a world of one it does nothing.

    Errors that a broken connection raises leave it as one `TrainingError` on the lowest living rank, which names the
    dead one; the other ranks exit with the same code and print nothing.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.dead_after_s = float(os.environ.get("FINE_DIST_DEAD_AFTER_S", DEAD_AFTER_S))
        self._stop = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._state = "beating"
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self.world.world_size == 1:
            return self
        from torch.distributed import TCPStore

        options = {"wait_for_workers": False, "timeout": timedelta(seconds=self.dead_after_s)}
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = TCPStore(host, 0, None, True, **options) if self.world.is_main else None
        port = broadcast_object(store.port if store else 0, self.world)
        self._store = store or TCPStore(host, port, None, False, **options)
        self._names = f"on {socket.gethostname()}, pid {os.getpid()}"
        self._beat()
        barrier(self.world)  # every heart has beaten once before anyone looks
        self._thread = threading.Thread(target=self._run, name="fine-dist-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        if error is None or isinstance(error, ResumeLater):
            barrier(self.world)  # rank 0 keeps the store: it leaves last
            self._close("left")
            return
        if isinstance(error, RuntimeError) and _is_lost_connection(error):
            self._explain(error)
        self._close("failed: " + (str(error) or type(error).__name__).splitlines()[0])
        if self.world.is_main and isinstance(error, FineDistError):
            time.sleep(2 * BEAT_S)  # let the others read why before the store goes

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._beat()
                found = self._look()
            except RuntimeError:
                found = (0, "its store is gone")
            if found and not self._stop.wait(self._patience()):
                self._end(*found)

    def _patience(self) -> float:
        """Time for the main thread to fail by itself, with a better traceback than this thread's."""
        return 3.0 + self.world.rank * 0.2

    def _beat(self) -> None:
        self._store.set(f"beat/{self.world.rank}", f"{time.time()} {self._state} {self._names}")

    def _look(self) -> tuple[int, str] | None:
        """(rank, what happened) of the first rank that died or failed."""
        now = time.monotonic()
        keys = [f"beat/{rank}" for rank in range(self.world.world_size)]
        for rank, beat in enumerate(self._store.multi_get(keys)):
            last, since = self._seen.get(rank, (b"", now))
            self._seen[rank] = (beat, since if beat == last else now)
            _, state, name = beat.decode().split(" ", 2)
            if rank == self.world.rank or state == "left":
                continue
            if state.startswith("failed"):
                return rank, f"({name.partition('|')[0]}) {name.partition('|')[2] or 'failed'}"
            if beat == last and now - since > self.dead_after_s:
                return rank, f"({name}) has not been heard of for {now - since:.0f} s"
        return None

    def _close(self, state: str) -> None:
        self._stop.set()
        head, _, why = state.partition(": ")
        self._state = head
        if why:
            self._names += "|failed: " + why
        try:
            self._beat()
        except RuntimeError:
            return  # the store went with rank 0, and with it anyone to tell

    def _explain(self, error: RuntimeError) -> None:
        """Raise what the loss of a connection means, on one rank; end the others quietly."""
        dead = self._find_dead()
        others = [rank for rank, _ in dead]
        if self.world.rank != min(set(range(self.world.world_size)) - set(others)):
            self._close("failed: lost the others")
            sys.stderr.flush()
            raise SystemExit(EXIT_USER_ERROR) from error
        what = "; ".join(f"rank {rank} {why}" for rank, why in dead) or "a rank is gone, and none can be told"
        self._close("failed: " + what)
        raise TrainingError(_message(what)) from error

    def _find_dead(self) -> list[tuple[int, str]]:
        """Ranks whose heart stands still over a few beats, found after a connection broke."""
        try:
            keys = [f"beat/{rank}" for rank in range(self.world.world_size)]
            before = self._store.multi_get(keys)
            time.sleep(2.5 * BEAT_S)
            after = self._store.multi_get(keys)
        except RuntimeError:
            return [(0, "died")]
        dead = []
        for rank, (old, new) in enumerate(zip(before, after)):
            name = new.decode().split(" ", 2)[2]
            if rank != self.world.rank and old == new:
                where, _, why = name.partition("|")
                dead.append((rank, f"({where}) {why or 'died'}"))
        return dead

    def _end(self, rank: int, why: str) -> None:
        """End this process from the watching thread: the main one hangs in a collective that cannot finish."""
        if self.world.rank == (1 if rank == 0 else 0):
            print("error: " + _message(f"rank {rank} {why}"), file=sys.stderr, flush=True)
        os._exit(EXIT_USER_ERROR)


def _message(what: str) -> str:
    return f"{what}; every rank stops. The last checkpoint is intact: the same command continues from it"


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = (
        "Connection closed by peer",
        "Connection reset",
        "gloo",
        "NCCL",
        "Timed out waiting",
        "Socket",
        "Broken pipe",
    )
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
