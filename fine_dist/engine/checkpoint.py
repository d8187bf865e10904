"""Checkpoints of what trains: weights, AdamW's moments and EMA as named flat ranges, written whole or not at all.

    checkpoints/LATEST                    the newest one's folder name, written last
    checkpoints/step_00001000/rank0.safetensors ...    one file a rank that owns something: `PART:NAME@START`, flat fp32
    checkpoints/step_00001000/manifest.json            step, identity, shapes, update counts, sha256 of every file

Because a tensor is stored as ranges of a named parameter, any backend, ZeRO stage and world size reads what any other
wrote. Frozen weights are not stored: the program rebuilds them, and `identity` says that it rebuilds the same ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fine_dist.core.errors import CheckpointError
from fine_dist.core.files import sync_folder, write_atomic
from fine_dist.engine.backend import MOMENTS, Backend, Piece
from fine_dist.engine.dist import World, broadcast_object
from fine_dist.engine.ema import Ema
from fine_dist.engine.run_dir import flat
from fine_dist.engine.saved import FORMAT, Saved
from fine_dist.engine.tensor_file import write_tensors

PARTS_TIMEOUT_S = 600
"""Rank 0 waits so long for the other ranks' files of one checkpoint."""
CLOSING_S = 3
"""The same, when the run has ended with an error."""
_NAME = re.compile(r"^step_(\d{8,})$")


class Checkpoints:
    """The checkpoints of one run directory: all ranks make one of these and call it alike."""

    def __init__(self, folder: Path, world: World, identity: dict[str, Any], keep: int) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        self.identity = json.loads(json.dumps(identity))  # as it will be read: tuples are lists, keys are strings
        self.last_saved = -1
        self.stall_s = 0.0
        """Seconds that the last `save` held the training up."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._staging: dict[str, Tensor] = {}
        # What an earlier start left half-written is not confused with this start's, even at the same step.
        self._token: str = broadcast_object(f"{os.getpid()}-{time.time_ns():x}", world)
        if world.is_main:
            for stale in folder.glob(".writing-*"):
                shutil.rmtree(stale, ignore_errors=True)

    # --- reading ----------------------------------------------------------------------------------------------------

    def newest(self) -> Saved | None:
        """The newest undamaged checkpoint, the same on every rank; none when there is none.

        A damaged one is named in a warning, set aside as `damaged-…`, and the one before is taken. Raises
        `CheckpointError` when all are damaged, or when the one found belongs to another run, saying what differs.
        """
        answer: dict[str, Any] = {}
        if self.world.is_main:
            try:
                answer["name"] = self._find_newest()
            except CheckpointError as error:
                answer["error"] = str(error)
        answer = broadcast_object(answer, self.world)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        if answer["name"] is None:
            return None
        saved = Saved(self.folder / answer["name"])
        self.last_saved = saved.step
        return saved

    def _find_newest(self) -> str | None:
        found = self._folders()
        for folder in reversed(found):
            try:
                saved = Saved(folder)
                saved.verify()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns():x}")
                os.replace(folder, aside)
                warnings.warn(
                    f"checkpoint {folder} is damaged ({error}); it is set aside as {aside.name} and the one before it "
                    "is used",
                    stacklevel=2,
                )
                continue
            self._refuse_other_run(saved)
            return folder.name
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.folder} are damaged; start again in another run directory, or "
                "remove this folder to start again here"
            )
        return None

    def _refuse_other_run(self, saved: Saved) -> None:
        theirs, ours = flat(saved.identity), flat(self.identity)
        differing = [
            f"{key}: {theirs.get(key, 'absent')!r} in the checkpoint, {ours.get(key, 'absent')!r} now"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint {saved.folder} belongs to another run:\n  "
                + "\n  ".join(differing)
                + "\nuse another run directory, or give what this run was started with"
            )

    def _folders(self) -> list[Path]:
        """Folders of complete checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        return sorted((p for p in self.folder.iterdir() if _NAME.match(p.name)), key=lambda p: int(p.name[5:]))

    # --- writing ----------------------------------------------------------------------------------------------------

    def save(self, step: int, backend: Backend, ema: Ema, extra: dict[str, Any]) -> None:
        """Copy the state and write it in the background; training goes on when the copy is made.

        An error of an earlier write (a full disk) is raised here or by `check` and `finish`.
        """
        if step == self.last_saved:
            return
        begun = time.perf_counter()
        self._join()
        self.check()
        tensors: dict[str, Tensor] = {}
        pieces = backend.pieces()
        for piece in pieces:
            parts = {"weight": piece.weight, "ema": ema.values[piece.name], **backend.moments(piece)}
            for part, value in parts.items():
                tensors[f"{part}:{piece.name}@{piece.start}"] = self._copy(f"{part}:{piece.name}", value)
        about = {
            "shapes": {piece.name: list(piece.shape) for piece in pieces},
            "optimizer_steps": backend.optimizer_steps(),
        }
        header = {"format": FORMAT, "step": step, "identity": self.identity, "extra": extra}
        self._thread = threading.Thread(
            target=self._write, args=(step, tensors, about, header), name="fine-dist-checkpoint", daemon=True
        )
        self._thread.start()
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
        """Wait until every rank's last save is on disk, and raise what went wrong with it."""
        self._join()
        self.check()
        broadcast_object(None, self.world)  # rank 0 has put the parts together when it comes here

    def close(self) -> None:
        """Let a write that is under way end, whatever became of the run; its parts of dead ranks are not waited for."""
        self._closing.set()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, key: str, value: Tensor) -> Tensor:
        """The value in host memory that is kept for it: after the first save no page is touched for the first time."""
        kept = self._staging.get(key)
        if kept is None or kept.shape != value.shape:
            kept = self._staging[key] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        return kept.copy_(value)

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any], header: dict[str, Any]) -> None:
        name = f"step_{step:08d}"
        folder = self.folder / f".writing-{name}-{self._token}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if tensors:
                file = f"rank{self.world.rank}.safetensors"
                about["files"] = {file: write_tensors(folder / file, tensors)}
            write_atomic(folder / f"part{self.world.rank}.json", json.dumps(about))
            if self.world.is_main:
                self._put_together(folder, name, header)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error = OSError(error.errno, error.strerror, str(folder))  # a write does not say where
            self._error = error
            if self.world.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _put_together(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        """Rank 0: when all parts are there, the manifest, the folder's final name, and last the pointer."""
        manifest = {**manifest, "world_size": self.world.world_size, "files": {}, "shapes": {}, "optimizer_steps": {}}
        until = time.monotonic() + PARTS_TIMEOUT_S
        for rank in range(self.world.world_size):
            path = folder / f"part{rank}.json"
            while not path.exists():
                if self._closing.is_set():
                    until = min(until, time.monotonic() + CLOSING_S)
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"rank {rank} did not write its part of {self.folder / name} within {PARTS_TIMEOUT_S} s; the "
                        "run directory must be on a file system that all nodes share"
                    )
                time.sleep(0.02)
                os.listdir(folder)  # makes a network file system look again
            part = json.loads(path.read_text(encoding="utf-8"))
            for key in ("files", "shapes", "optimizer_steps"):
                manifest[key].update(part.get(key, {}))
            path.unlink()
        write_atomic(folder / "manifest.json", json.dumps(manifest))
        sync_folder(folder)
        final = self.folder / name
        if final.exists():
            os.replace(final, folder.with_name(f".writing-old-{name}-{self._token}"))
        os.replace(folder, final)
        sync_folder(self.folder)
        write_atomic(self.folder / "LATEST", name)
        self._prune()

    def _prune(self) -> None:
        for folder in self._folders()[: -self.keep]:
            shutil.rmtree(folder)
        for folder in self.folder.glob(f".writing-old-*-{self._token}"):
            shutil.rmtree(folder)


def restore_ema(saved: Saved, ema: Ema, pieces: list[Piece]) -> None:
    """Set the averages of this rank's pieces."""
    for piece in pieces:
        ema.values[piece.name].copy_(saved.read("ema", piece.name, piece.start, piece.stop))


def restore_moments(saved: Saved, piece: Piece) -> dict[str, Tensor]:
    """AdamW's moments of a piece, flat, in host memory; zeros when it had no update yet."""
    if not saved.optimizer_steps.get(piece.name, 0):
        return {key: torch.zeros(piece.stop - piece.start) for key in MOMENTS}
    return {key: saved.read(key, piece.name, piece.start, piece.stop) for key in MOMENTS}
