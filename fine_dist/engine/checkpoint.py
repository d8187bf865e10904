"""Checkpoints of what trains: weights, AdamW's moments and averages as named flat ranges, complete or absent.

    checkpoints/LATEST                                 name of the newest checkpoint's folder, written last
    checkpoints/step_00001000/rank0.safetensors ...    one file for each rank that owns something
    checkpoints/step_00001000/manifest.json            step, identity, shapes, update counts, sha256 of every file

Because a tensor is stored as ranges of a named parameter, any backend, ZeRO stage and world size reads what any other
wrote. Frozen weights are not stored: the program makes them again, and `identity` says that it makes the same ones.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from fine_dist.core.errors import CheckpointError, DamagedStateError
from fine_dist.core.files import sync_folder, write_atomic
from fine_dist.core.retry import remove_tree
from fine_dist.engine.backend import Backend, Piece
from fine_dist.engine.checkpoint_files import FORMAT, CheckpointReader, digest_of, write_tensors
from fine_dist.engine.dist import barrier, broadcast_object, gather_objects
from fine_dist.engine.ema import Ema
from fine_dist.engine.host_copy import copy_to_host, host_buffer
from fine_dist.engine.run_dir import flat
from fine_dist.engine.world import World

log = logging.getLogger(__name__)

OTHER_RANKS_S = 600
"""Seconds that rank 0 waits for the other ranks' files of one checkpoint."""
OTHER_RANKS_CLOSING_S = 3
"""The same after the run has ended with an error."""
_NAME = re.compile(r"^step_(\d{8,})$")


class Checkpoints:
    """The checkpoints of one run directory. All ranks make one and call it at the same points.

    Args:
        folder: Where they are.
        identity: What must match for a checkpoint to be of this run (JSON values).
        keep: How many of the newest stay.
    """

    def __init__(self, folder: Path, world: World, identity: dict[str, Any], keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.identity = json.loads(json.dumps(identity))  # as it is read back: tuples become lists, keys strings
        self.last_saved = -1
        self.stall_s = 0.0
        """Seconds for which the last `save` held up the training."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._staging: dict[str, Tensor] = {}
        # Drafts of an earlier start cannot be taken for this start's, even at the same step.
        # A restarted job may still have processes of the start before it that are writing, on a node that SLURM lost.
        self._token: str = broadcast_object(f"{os.getpid()}-{time.time_ns():x}", world)
        if world.is_main:
            # The run directory's lock is held, so nobody who may write here uses them any more.
            for stale in folder.glob(".writing-*"):
                shutil.rmtree(stale, ignore_errors=True)

    # --- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> CheckpointReader | None:
        """The newest undamaged checkpoint, the same on every rank; None when there is none.

        Rank 0 looks for it and verifies it. A damaged one is named in a warning and renamed to `damaged-...`, and the
        one before it is taken. The first rank of every other node verifies what its own node sees of that one.

        Raises:
            DamagedStateError: All are damaged.
            CheckpointError: The one found belongs to another run; the message says what differs. Or another node reads
                something else than was written.
        """
        found: dict[str, Any] = {}
        if self.world.is_main:
            try:
                found["name"] = self._find_newest()
            except CheckpointError as error:
                found |= {"error": str(error), "damaged": isinstance(error, DamagedStateError)}
        # One rank decides. If each looked for itself, a network file system could show
        # them different newest checkpoints, and the ranks would resume at different steps.
        found = broadcast_object(found, self.world)
        if "error" in found:
            raise (DamagedStateError if found["damaged"] else CheckpointError)(found["error"])
        if found["name"] is None:
            return None
        checkpoint, problem = self._as_this_node_sees_it(self.folder / found["name"])
        problems = [said for said in gather_objects(problem, self.world) if said]
        if problems or checkpoint is None:
            raise CheckpointError(problems[0])
        self.last_saved = checkpoint.step
        return checkpoint

    def _as_this_node_sees_it(self, folder: Path) -> tuple[CheckpointReader | None, str]:
        """The checkpoint that rank 0 has verified, and what is wrong with it here."""
        try:
            checkpoint = CheckpointReader(folder)
            if self.world.reads_storage and not self.world.is_main:
                checkpoint.verify()
            return checkpoint, ""
        except (OSError, ValueError, CheckpointError) as error:
            return None, (
                f"rank 0 has verified {folder}, and {socket.gethostname()} (rank {self.world.rank}) reads something "
                f"else: {error}; is the run directory on storage that every node shares?"
            )

    def _find_newest(self) -> str | None:
        found = self._folders()
        for folder in reversed(found):
            try:
                checkpoint = CheckpointReader(folder)
                checkpoint.verify()
            except (OSError, ValueError, CheckpointError) as error:
                # Renamed, not removed: hours of training may be recoverable from it
                # by hand. The time keeps two damaged checkpoints of one step apart.
                aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns():x}")
                os.replace(folder, aside)
                log.warning(
                    "checkpoint %s is damaged (%s); it is renamed to %s and the one before it is used",
                    folder,
                    error,
                    aside.name,
                )
                continue
            self._refuse_other_run(checkpoint)
            return folder.name
        damaged = sorted(path.name for path in self.folder.glob("damaged-step_*"))
        if damaged:  # also those that an earlier start has set aside: a run never starts over by itself
            raise DamagedStateError(
                f"all {len(damaged)} checkpoints in {self.folder} are damaged ({damaged[-1]} is the newest); copy one "
                "back, start again in another run directory, or remove this folder to start over here at step 0"
            )
        return None

    def _refuse_other_run(self, checkpoint: CheckpointReader) -> None:
        before, now = flat(checkpoint.identity), flat(self.identity)
        differing = [
            f"{key}: {before.get(key, 'absent')!r} in the checkpoint, {now.get(key, 'absent')!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} belongs to another run:\n  "
                + "\n  ".join(differing)
                + "\nchoose another run directory, or give the settings that this run was started with"
            )

    def _folders(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.match(p.name)), key=lambda p: int(p.name[5:]))

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self, step: int, backend: Backend, ema: Ema, extra: dict[str, Any]) -> None:
        """Copy the state into host memory and write it in the background, while training goes on.

        An error of an earlier write, such as a full disk, is raised here, by `check` or by `finish`.

        Args:
            step: Updates that the state has had.
            extra: What else to keep (JSON values).
        """
        if step == self.last_saved:
            return
        begun = time.perf_counter()
        self._join()
        self.check()
        # At most one write at a time: the host buffers below belong to the write before until it has ended.
        values: dict[str, Tensor] = {}
        pieces = backend.pieces()
        for piece in pieces:
            # Copies are made now, all at once, because the next update
            # changes the live views while the thread still writes.
            parts = {"weight": piece.weight, "ema": ema.values[piece.name], **backend.moments(piece)}
            values |= {f"{key}:{piece.name}@{piece.start}": value for key, value in parts.items()}
        tensors = dict(
            zip(values, copy_to_host(list(values.values()), [self._buffer(*item) for item in values.items()]))
        )
        part: dict[str, Any] = {
            "shapes": {piece.name: list(piece.shape) for piece in pieces},
            "optimizer_steps": backend.optimizer_steps(),
        }
        header = {"format": FORMAT, "step": step, "identity": self.identity, "extra": extra}
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, part, header), name="fine-dist-checkpoint", daemon=True
        )
        self._thread.start()
        # Before the write has succeeded: `check` sets it back when
        # the write fails, so that a later save of this step runs.
        self.last_saved = step
        self.stall_s = time.perf_counter() - begun

    @property
    def writing(self) -> bool:
        """Whether this rank's last save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a write that has failed, if any."""
        if self._error is not None:
            error, self._error = self._error, None
            self.last_saved = -1
            raise error

    def finish(self) -> None:
        """Wait until the last save of every rank is on disk, and raise what went wrong with it."""
        self._join()
        self.check()
        barrier(self.world)  # rank 0 comes here when it has assembled the checkpoint

    def close(self) -> None:
        """Let a write that is under way end, however the run ended; the files of dead ranks are not waited for."""
        self._closing.set()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _buffer(self, key: str, value: Tensor) -> Tensor:
        """Host memory for a value that every save uses again: only the first one pays for new pages."""
        buffer = self._staging.get(key)
        # The moments are absent before the first update, so the first save after it brings new keys.
        if buffer is None or buffer.shape != value.shape:
            buffer = self._staging[key] = host_buffer(value)
        return buffer

    def _write(self, step: int, tensors: dict[str, Tensor], part: dict[str, Any], header: dict[str, Any]) -> None:
        name = f"step_{step:08d}"
        folder = self.folder / f".writing-{name}-{self._token}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if tensors:
                file = f"rank{self.world.rank}.safetensors"
                # A rank writes only its own file. No tensor crosses the network for a checkpoint, whatever its size.
                part["files"] = {file: write_tensors(folder / file, tensors)}
            # After the tensors, and synced: rank 0 takes this small file for the promise that the tensors are on disk.
            write_atomic(folder / f"part{self.world.rank}.json", json.dumps(part))
            if self.world.is_main:
                self._assemble(folder, name, header)
        except BaseException as error:  # the training thread raises it: see `check`
            if isinstance(error, OSError) and error.filename is None:
                error = OSError(error.errno, error.strerror, str(folder))  # an error of `write` does not name a file
            self._error = error
            if self.world.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _assemble(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        """Rank 0: wait for all ranks, write the manifest, give the folder its name, and point LATEST to it last."""
        manifest = {**manifest, "world_size": self.world.world_size, "files": {}, "shapes": {}, "optimizer_steps": {}}
        until = time.monotonic() + OTHER_RANKS_S
        for rank in range(self.world.world_size):
            path = folder / f"part{rank}.json"
            # Files and no collective: this is a background thread, and collectives of
            # two threads of one process would pair up differently on different ranks.
            while not path.exists():
                if self._closing.is_set():
                    until = min(until, time.monotonic() + OTHER_RANKS_CLOSING_S)
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"rank {rank} did not write its part of {self.folder / name} within {OTHER_RANKS_S} s; the "
                        "run directory must be on a file system that all nodes share"
                    )
                time.sleep(0.02)
                os.listdir(folder)  # makes a network file system refresh what it knows of the folder
            part = json.loads(path.read_text(encoding="utf-8"))
            for key in ("files", "shapes", "optimizer_steps"):
                manifest[key].update(part.get(key, {}))
            path.unlink()
        manifest = json.loads(json.dumps(manifest))  # as it will be read
        write_atomic(folder / "manifest.json", json.dumps({**manifest, "digest": digest_of(manifest)}))
        sync_folder(folder)
        # The manifest is inside before the rename, and a rename is atomic: a crash leaves either a complete
        # checkpoint or a draft that no reader looks at. `sync_folder` makes the order hold over a power cut as well.
        final = self.folder / name
        if final.exists():
            # POSIX renames a folder only onto an absent or empty one. A run that
            # was set back to an earlier checkpoint saves the same step again.
            os.replace(final, folder.with_name(f".writing-old-{name}-{self._token}"))
        os.replace(folder, final)
        sync_folder(self.folder)
        write_atomic(self.folder / "LATEST", name)
        self._prune()

    def _prune(self) -> None:
        # Only after LATEST points to the new one: at every instant there is a complete checkpoint to resume from.
        for folder in self._folders()[: -self.keep]:
            remove_tree(folder)
        for folder in self.folder.glob(f".writing-old-*-{self._token}"):
            remove_tree(folder)


def restore_ema(checkpoint: CheckpointReader, ema: Ema, pieces: list[Piece]) -> None:
    """Set the averages of this rank's pieces from a checkpoint."""
    for piece in pieces:
        ema.values[piece.name].copy_(checkpoint.read("ema", piece.name, piece.start, piece.stop))
