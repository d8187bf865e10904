"""Checkpoints of the training state: weights, AdamW moments and the EMA as named flat ranges, written atomically.

    checkpoints/LATEST                                 name of the newest checkpoint's folder, written last
    checkpoints/step_00001000/rank0.safetensors ...    one file for each rank that owns a range
    checkpoints/step_00001000/manifest.json            step, identity, shapes, update counts, sha256 of every file

A tensor is stored as ranges of a named parameter, so that any backend, ZeRO stage and world size can read a checkpoint
of any other. Frozen weights are not stored: the program creates them, and `identity` ensures that they are the same.
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
"""Seconds that rank 0 waits for the other ranks' files of a checkpoint."""
OTHER_RANKS_CLOSING_S = 3
"""Seconds that rank 0 waits for them after the run has ended with an error."""
_NAME = re.compile(r"^step_(\d{8,})$")


class Checkpoints:
    """The checkpoints of one run directory. All ranks create one and call its methods at the same points.

    Args:
        folder: Folder of the checkpoints.
        world: Rank and world size of this process.
        identity: Values that a checkpoint of this run must have (JSON).
        keep: Number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, world: World, identity: dict[str, Any], keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.identity = json.loads(json.dumps(identity))  # in the form that is read back: tuples become lists
        self.last_saved = -1
        self.stall_s = 0.0
        """Seconds for which the last `save` blocked training."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._staging: dict[str, Tensor] = {}
        # The token in a draft's name separates this start from earlier ones at the same step:
        # processes of an earlier start may still be writing, on a node that SLURM has lost.
        self._token: str = broadcast_object(f"{os.getpid()}-{time.time_ns():x}", world)
        if world.is_main:
            # This process holds the lock of the run directory, so that no other start uses these drafts.
            for stale in folder.glob(".writing-*"):
                shutil.rmtree(stale, ignore_errors=True)

    # --- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> CheckpointReader | None:
        """The newest undamaged checkpoint, the same on every rank; None if there is none.

        Rank 0 finds and verifies it. A damaged checkpoint is renamed to `damaged-...` with a warning, and the one
        before it is used. The first rank of every other node verifies the files that its node reads.

        Raises:
            DamagedStateError: All are damaged.
            CheckpointError: The checkpoint belongs to another run; the message names the difference. Or another node
                reads other bytes than were written.
        """
        newest: dict[str, Any] = {}
        if self.world.is_main:
            try:
                newest["name"] = self._find_newest()
            except CheckpointError as error:
                newest |= {"error": str(error), "damaged": isinstance(error, DamagedStateError)}
        # One rank decides: a network file system could show each rank another newest
        # checkpoint, and the ranks would resume at different steps.
        newest = broadcast_object(newest, self.world)
        if "error" in newest:
            raise (DamagedStateError if newest["damaged"] else CheckpointError)(newest["error"])
        if newest["name"] is None:
            return None
        checkpoint, problem = self._open_on_this_node(self.folder / newest["name"])
        problems = [text for text in gather_objects(problem, self.world) if text]
        if problems or checkpoint is None:
            raise CheckpointError(problems[0])
        self.last_saved = checkpoint.step
        return checkpoint

    def _open_on_this_node(self, folder: Path) -> tuple[CheckpointReader | None, str]:
        """Open the checkpoint that rank 0 has verified; returns it, or None and the problem on this node."""
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
        folders = self._folders()
        for folder in reversed(folders):
            try:
                checkpoint = CheckpointReader(folder)
                checkpoint.verify()
            except (OSError, ValueError, CheckpointError) as error:
                # Renamed and not deleted, because hours of training may be recoverable
                # by hand. The time distinguishes damaged checkpoints of the same step.
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
        if damaged:  # including those that an earlier start has renamed: a run never restarts at step 0 by itself
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
        """Copy the state into host memory and write it in the background while training continues.

        An error of a write, such as a full disk, is raised by the next call of `save`, `check` or `finish`.

        Args:
            step: Number of updates of the state.
            backend: Weights and optimizer state.
            ema: The EMA of the weights.
            extra: Further state (JSON values).
        """
        if step == self.last_saved:
            return
        begun = time.perf_counter()
        self._join()
        self.check()
        # At most one write at a time, because the previous write uses the host buffers below until it has ended.
        values: dict[str, Tensor] = {}
        pieces = backend.pieces()
        for piece in pieces:
            # These are live views, which the next update changes while
            # the thread writes; they are copied below, all at once.
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
        # Set before the write has succeeded. `check` resets it if the
        # write fails, so that this step can be saved again.
        self.last_saved = step
        self.stall_s = time.perf_counter() - begun

    @property
    def writing(self) -> bool:
        """Whether this rank is still writing its last save."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a failed write, if there is one."""
        if self._error is not None:
            error, self._error = self._error, None
            self.last_saved = -1
            raise error

    def finish(self) -> None:
        """Wait until the last save of every rank is on disk, and raise its error, if there is one."""
        self._join()
        self.check()
        barrier(self.world)  # rank 0 arrives here after it has assembled the checkpoint

    def close(self) -> None:
        """Wait for a running write, without waiting for files of ranks that have ended."""
        self._closing.set()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _buffer(self, key: str, value: Tensor) -> Tensor:
        """Host memory for a value, which every save reuses, so that only the first save allocates pages."""
        buffer = self._staging.get(key)
        # The moments do not exist before the first update, so later saves may have more keys.
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
                # A rank writes only its own file, so that no tensor crosses the network for a checkpoint.
                part["files"] = {file: write_tensors(folder / file, tensors)}
            # After the tensors, and synced, because rank 0 relies on this small file: the tensors are then on disk.
            write_atomic(folder / f"part{self.world.rank}.json", json.dumps(part))
            if self.world.is_main:
                self._assemble(folder, name, header)
        except BaseException as error:  # raised in the training thread, by `check`
            if isinstance(error, OSError) and error.filename is None:
                error = OSError(error.errno, error.strerror, str(folder))  # `write` does not name the file
            self._error = error
            if self.world.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _assemble(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        """On rank 0: wait for all ranks, write the manifest, rename the folder, and update LATEST last."""
        manifest = {**manifest, "world_size": self.world.world_size, "files": {}, "shapes": {}, "optimizer_steps": {}}
        until = time.monotonic() + OTHER_RANKS_S
        for rank in range(self.world.world_size):
            path = folder / f"part{rank}.json"
            # Files and no collective, because this is a background thread: collectives of
            # two threads of a process could be matched in different orders on different ranks.
            while not path.exists():
                if self._closing.is_set():
                    until = min(until, time.monotonic() + OTHER_RANKS_CLOSING_S)
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"rank {rank} did not write its part of {self.folder / name} within {OTHER_RANKS_S} s; the "
                        "run directory must be on a file system that all nodes share"
                    )
                time.sleep(0.02)
                os.listdir(folder)  # makes a network file system refresh its cache of the folder
            part = json.loads(path.read_text(encoding="utf-8"))
            for key in ("files", "shapes", "optimizer_steps"):
                manifest[key].update(part.get(key, {}))
            path.unlink()
        manifest = json.loads(json.dumps(manifest))  # in the form that will be read back
        write_atomic(folder / "manifest.json", json.dumps({**manifest, "digest": digest_of(manifest)}))
        sync_folder(folder)
        # The manifest is written before the rename, which is atomic: a crash leaves either a complete
        # checkpoint or a draft that no reader uses. `sync_folder` ensures this order after a power cut as well.
        final = self.folder / name
        if final.exists():
            # POSIX cannot rename a folder onto one that is not empty. A run that
            # resumed from an earlier checkpoint saves the same step again.
            os.replace(final, folder.with_name(f".writing-old-{name}-{self._token}"))
        os.replace(folder, final)
        sync_folder(self.folder)
        write_atomic(self.folder / "LATEST", name)
        self._prune()

    def _prune(self) -> None:
        # Only after LATEST names the new checkpoint, so that there is always a complete one to resume from.
        for folder in self._folders()[: -self.keep]:
            remove_tree(folder)
        for folder in self.folder.glob(f".writing-old-*-{self._token}"):
            remove_tree(folder)


def restore_ema(checkpoint: CheckpointReader, ema: Ema, pieces: list[Piece]) -> None:
    """Load the EMA of this rank's pieces from a checkpoint."""
    for piece in pieces:
        ema.values[piece.name].copy_(checkpoint.read("ema", piece.name, piece.start, piece.stop))
