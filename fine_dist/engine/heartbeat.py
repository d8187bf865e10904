"""Detects ranks that have died or hang, so that no rank waits for them forever.

A collective with a killed rank fails at once under gloo and hangs under NCCL; with a rank that is suspended or cut off
from the network it hangs under both. Every rank therefore runs a thread that writes a heartbeat to a small store on
rank 0. Rank 0's thread reads the heartbeats of all ranks; the other threads read rank 0's heartbeat and the failure
that rank 0 may have found. With 512 ranks the store gets some 1,500 short requests per second, instead of 512 x 512.

When a rank is lost, the lowest remaining rank reports it in one message, and all ranks end.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple

import torch.distributed
from torch.distributed import TCPStore

from fine_dist.core.errors import EXIT_USER_ERROR, FineDistError, ReportedElsewhere, ResumeLater, TrainingError
from fine_dist.core.processes import seconds_from_env
from fine_dist.engine.dist import barrier, broadcast_object
from fine_dist.engine.world import World

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""Seconds between two heartbeats of a rank."""
DEAD_AFTER_S = 60.0
"""Seconds without a heartbeat after which a rank counts as dead. The variable FINE_DIST_DEAD_AFTER_S overrides it."""
GRACE_S = 5.0
"""Seconds that a rank's main thread gets to end by itself after a failure is known."""
FAILURE_KEY = "failure"


class RankFailure(NamedTuple):
    """A rank that has died, hangs or has failed."""

    rank: int
    what: str
    reported: bool
    """Whether that rank ended with an error, which it reports itself."""

    @property
    def reporter(self) -> int:
        """The rank that reports the failure otherwise: the lowest remaining rank."""
        return 1 if self.rank == 0 else 0

    @property
    def message(self) -> str:
        return (
            f"rank {self.rank} {self.what}; every rank stops. The last checkpoint is intact: the same command "
            "continues from it"
        )


STORE_LOST = RankFailure(0, "died, and its store with it", reported=False)


class Heartbeat:
    """A context around training on several ranks. With a world size of 1 it does nothing.

    A lost connection inside it becomes one `TrainingError` on the lowest remaining rank, which names the dead rank, and
    `ReportedElsewhere` on all other ranks.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.dead_after_s = seconds_from_env(os.environ, "FINE_DIST_DEAD_AFTER_S", DEAD_AFTER_S)
        self._keys = [f"heartbeat/{rank}" for rank in range(world.world_size)]
        self._watched = range(world.world_size) if world.is_main else range(1)
        self._last_change: dict[int, tuple[bytes, float]] = {}
        self._state = "alive"
        self._failure: RankFailure | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        if self.world.world_size == 1:
            return self
        limit = timedelta(seconds=self.dead_after_s)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        # Not the process group's store, which a thread that waits for a key may block and which belongs to the
        # launcher. Port 0 lets the system choose a free port, which is then broadcast.
        server = TCPStore(host, 0, None, True, limit, wait_for_workers=False) if self.world.is_main else None
        port = broadcast_object(server.port if server else 0, self.world)
        self._store = server or TCPStore(host, port, None, False, limit)
        if self.world.is_main:
            self._store.set(FAILURE_KEY, "")
        self._beat()
        barrier(self.world)  # every rank has written a heartbeat before any thread reads them
        self._thread = threading.Thread(target=self._run, name="fine-dist-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread is None:
            return
        if ended := error is None or isinstance(error, ResumeLater):
            barrier(self.world)  # rank 0 hosts the store, so it must be the last to leave
        # The thread ends before the error is explained below, so that only the main thread uses the store.
        self._stop.set()
        self._thread.join()  # a thread that is inside the store when Python ends would abort the process
        if ended:
            return
        if isinstance(error, RuntimeError) and _is_lost_connection(error):
            self._explain(error)
        self._publish("failed " + (str(error) or type(error).__name__).splitlines()[0])
        if self.world.is_main and isinstance(error, FineDistError) and not isinstance(error, ReportedElsewhere):
            time.sleep(2 * INTERVAL_S)  # the other ranks need time to read this state before the store closes

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self._beat()
                self._failure = self._find_failure(self._watched, self.dead_after_s)
            except RuntimeError:  # what a TCPStore raises when its server is gone, or does not answer in time
                self._failure = STORE_LOST
            # The main thread gets a few seconds to fail by itself, which gives a traceback
            # and closes files. Ending the process from this thread does neither.
            if self._failure and not self._stop.wait(GRACE_S):
                self._end_process(self._failure)

    def _beat(self) -> None:
        origin = f"{socket.gethostname()}, pid {os.getpid()}"
        # The time only makes successive heartbeats differ. It is never compared with another machine's
        # clock: a reader measures with its own clock how long the text has not changed.
        self._store.set(self._keys[self.world.rank], f"{time.time():.3f} {origin}|{self._state}")

    def _find_failure(self, ranks: range, dead_after_s: float) -> RankFailure | None:
        """The first of `ranks` that failed or sent no heartbeat for `dead_after_s`, or the failure that rank 0 has
        found."""
        now = time.monotonic()
        # One request for all keys: with hundreds of ranks, single requests would take longer than the interval.
        values = self._store.multi_get([FAILURE_KEY, *(self._keys[rank] for rank in ranks)])
        failure: RankFailure | None = None
        if values[0]:
            failure = RankFailure(*json.loads(values[0]))
            # A rank that was suspended and resumes may read that it was declared dead; it continues until the others
            # end.
            if failure.rank != self.world.rank:
                return failure
            failure = None
        for rank, beat in zip(ranks, values[1:]):
            before, since = self._last_change.get(rank, (b"", now))
            since = since if beat == before else now
            # The clock starts at the first read, so that a thread which starts
            # late or was itself suspended reports no rank at once.
            self._last_change[rank] = (beat, since)
            origin, _, state = beat.decode().partition(" ")[2].partition("|")
            if rank == self.world.rank:
                continue
            if state.startswith("failed"):
                failure = RankFailure(rank, f"({origin}) {state}", reported=True)
            elif now - since > dead_after_s:
                failure = RankFailure(rank, f"({origin}) has not been heard of for {now - since:.0f} s", reported=False)
            if failure is not None:
                if self.world.is_main:
                    self._store.set(FAILURE_KEY, json.dumps(failure))
                return failure
        return None

    def _end_process(self, failure: RankFailure) -> None:
        """End this process from the heartbeat thread, because the main thread hangs in a collective."""
        if not failure.reported and self.world.rank == failure.reporter:
            log.error(failure.message)
        # `sys.exit` would end only this thread, and an interpreter that shuts down
        # waits for the main thread, which never returns from the collective.
        os._exit(EXIT_USER_ERROR)

    # --- the main thread --------------------------------------------------------------------------------------------

    def _publish(self, state: str) -> None:
        self._state = state
        # The store may have ended with rank 0, and a failure to write must not hide the error that is being reported.
        with suppress(RuntimeError):
            self._beat()

    def _explain(self, error: RuntimeError) -> None:
        """Replace the error of a lost connection by one that names the failed rank."""
        failure = self._failure or self._search()
        if failure.reported or self.world.rank != failure.reporter:
            self._publish("lost the others")
            raise ReportedElsewhere(failure.message) from error
        self._publish("failed " + failure.message)
        raise TrainingError(failure.message) from error

    def _search(self) -> RankFailure:
        """Find the failed rank by watching all heartbeats for a few intervals after a connection was lost."""
        until = time.monotonic() + 6 * INTERVAL_S
        # Times are measured from now on, so that a rank whose
        # heartbeats were slow before is not reported.
        self._last_change.clear()
        while time.monotonic() < until:
            try:
                self._beat()
                failure = self._find_failure(range(self.world.world_size), 2.5 * INTERVAL_S)
            except RuntimeError:
                return STORE_LOST
            if failure:
                if failure.reported:
                    return failure
                origin = failure.what.partition(" has not")[0]
                return RankFailure(failure.rank, f"{origin} died", reported=False)
            time.sleep(INTERVAL_S / 4)
        # All ranks still send heartbeats: a network interface or a switch has dropped one connection.
        return RankFailure(0, "or another rank lost its connection", reported=False)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether the error means that another rank is unreachable: gloo raises plain RuntimeErrors with these texts."""
    parts = ("onnection", "gloo", "NCCL", "Timed out waiting", "ocket", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(part in str(error) for part in parts)
