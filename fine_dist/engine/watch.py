"""Dead ranks: every rank beats a heart that the others can see, so that none of them waits for a dead one forever.

A collective with a rank that was killed fails at once under gloo and hangs under NCCL; with a rank that is stopped or
cut off it hangs under both. So each rank has a thread that beats in a small store of rank 0's and looks at the other
hearts. When one stops, the lowest living rank says so in one message and all of them end.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

from fine_dist.core.errors import EXIT_USER_ERROR, FineDistError, ResumeLater, ToldElsewhere, TrainingError
from fine_dist.core.processes import seconds_in
from fine_dist.engine.dist import World, barrier, broadcast_object

log = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two beats."""
DEAD_AFTER_S = 60.0
"""A heart that has not beaten for so long is dead; FINE_DIST_DEAD_AFTER_S overrides it."""
PATIENCE_S = 5.0
"""Seconds that a rank's main thread has to end by itself, once the trouble is known."""


class Trouble(NamedTuple):
    """A rank that is gone. `told`: it ended with an error and says so itself."""

    rank: int
    what: str
    told: bool


class Watch:
    """A context around the training of several ranks. In a world of one it does nothing.

    What a broken connection raises leaves it as one `TrainingError` on the lowest living rank, which names the dead
    one; the other ranks raise `ToldElsewhere`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.dead_after_s = seconds_in(os.environ, "FINE_DIST_DEAD_AFTER_S", DEAD_AFTER_S)
        self._keys = [f"beat/{rank}" for rank in range(world.world_size)]
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._state = "beating"
        self._trouble: Trouble | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        if self.world.world_size == 1:
            return self
        from torch.distributed import TCPStore

        limit = timedelta(seconds=self.dead_after_s)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        mine = TCPStore(host, 0, None, True, limit, wait_for_workers=False) if self.world.is_main else None
        port = broadcast_object(mine.port if mine else 0, self.world)
        self._store = mine or TCPStore(host, port, None, False, limit)
        self._beat()
        barrier(self.world)  # every heart has beaten once before anyone looks
        self._thread = threading.Thread(target=self._run, name="fine-dist-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        if ended := error is None or isinstance(error, ResumeLater):
            barrier(self.world)  # rank 0 keeps the store: no one needs it any more when it goes
        self._stop.set()
        self._thread.join()  # a thread still inside the store when Python ends would take the process down with it
        if ended:
            return
        if isinstance(error, RuntimeError) and _is_lost_connection(error):
            self._explain(error)
        self._say("failed " + (str(error) or type(error).__name__).splitlines()[0])
        if self.world.is_main and isinstance(error, FineDistError) and not isinstance(error, ToldElsewhere):
            time.sleep(2 * BEAT_S)  # the others read that this rank tells, before its store goes

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._beat()
                self._trouble = self._look(self.dead_after_s)
            except RuntimeError:
                self._trouble = Trouble(0, "died, and its store with it", told=False)
            if self._trouble and not self._stop.wait(PATIENCE_S):
                self._end(self._trouble)

    def _beat(self) -> None:
        words = f"{time.time():.3f} {socket.gethostname()}, pid {os.getpid()}|{self._state}"
        self._store.set(self._keys[self.world.rank], words)

    def _look(self, dead_after_s: float) -> Trouble | None:
        """The first rank that failed, or whose heart has stood still for so long."""
        now = time.monotonic()
        for rank, beat in enumerate(self._store.multi_get(self._keys)):
            last, since = self._seen.get(rank, (b"", now))
            since = since if beat == last else now
            self._seen[rank] = (beat, since)
            where, _, state = beat.decode().partition(" ")[2].partition("|")
            if rank == self.world.rank:
                continue
            if state.startswith("failed"):
                return Trouble(rank, f"({where}) {state}", told=True)
            if now - since > dead_after_s:
                return Trouble(rank, f"({where}) has not been heard of for {now - since:.0f} s", told=False)
        return None

    def _end(self, trouble: Trouble) -> None:
        """End this process from the watching thread: the main one hangs in a collective that cannot finish."""
        if not trouble.told and self.world.rank == (1 if trouble.rank == 0 else 0):
            log.error(_message(trouble))
        os._exit(EXIT_USER_ERROR)

    # --- the main thread --------------------------------------------------------------------------------------------

    def _say(self, state: str) -> None:
        self._state = state
        with suppress(RuntimeError):  # the store may be gone with rank 0, and with it anyone to tell
            self._beat()

    def _explain(self, error: RuntimeError) -> None:
        """Raise what a broken connection means."""
        trouble = self._trouble or self._find()
        if trouble.told or self.world.rank != (1 if trouble.rank == 0 else 0):
            self._say("lost the others")
            raise ToldElsewhere(_message(trouble)) from error
        self._say("failed " + _message(trouble))
        raise TrainingError(_message(trouble)) from error

    def _find(self) -> Trouble:
        """Who is gone, looked for over a few beats after a connection broke."""
        until = time.monotonic() + 6 * BEAT_S
        self._seen.clear()
        while time.monotonic() < until:
            try:
                self._beat()
                trouble = self._look(2.5 * BEAT_S)
            except RuntimeError:
                return Trouble(0, "died, and its store with it", told=False)
            if trouble:
                if not trouble.told:
                    where = trouble.what.partition(" has not")[0]
                    return Trouble(trouble.rank, f"{where} died", told=False)
                return trouble
            time.sleep(BEAT_S / 4)
        return Trouble(0, "or another lost its connection", told=False)


def _message(trouble: Trouble) -> str:
    return (
        f"rank {trouble.rank} {trouble.what}; every rank stops. The last checkpoint is intact: the same command "
        "continues from it"
    )


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    words = ("onnection", "gloo", "NCCL", "Timed out waiting", "ocket", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
