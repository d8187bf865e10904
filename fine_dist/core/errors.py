"""The exceptions of this project. A command turns each into one message and exit code 2, without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import select
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

EXIT_USER_ERROR = 2
EXIT_TASKS_FAILED = 3
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141
"""128 plus the number of the signal (SIGINT, SIGPIPE), as in shells."""
EXIT_RESUME = 75
"""`EX_TEMPFAIL`: the run saved its state and the same command continues it; launchers requeue on this code."""


class FineDistError(Exception):
    """Base class of errors that a user can fix. The text says what was wrong, the value received and the remedy."""


class ConfigError(FineDistError):
    """A setting of a config file or flag is unknown, of the wrong type, or impossible."""


class DataError(FineDistError):
    """Shards or their manifest are missing, damaged or do not fit the model."""


class ArtifactError(FineDistError):
    """A learngene or model folder is missing, damaged, or cannot be used as requested."""


class CheckpointError(FineDistError):
    """There is no usable checkpoint, or it belongs to another run."""


class DamagedStateError(CheckpointError):
    """Every saved state of a run is damaged. The run would start over, which it does only on the user's request."""


class RunDirError(FineDistError):
    """The run directory cannot be written, is in use, or belongs to another config."""


class TrainingError(FineDistError):
    """Training cannot continue: a loss is not finite, or a rank died."""


class ReportedElsewhere(FineDistError):
    """Another rank reports the error; this one ends with the same exit code and without a message."""


class LaunchError(FineDistError):
    """A job cannot be started or submitted, or a scheduler refused it."""


class NotAFile(OSError):
    """The path is a named pipe, a socket or a device where a regular file is needed."""


class ResumeLater(Exception):
    """The run was asked to stop and has saved its state; the same command continues it (exit code 75)."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or accelerator memory is used up."""
    # torch's allocators raise RuntimeErrors, which only their text identifies.
    messages = ("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in messages)


def nearest(value: str, legal: Iterable[str]) -> str:
    """The end of an error message: a suggestion if a legal value is similar, then all legal values."""
    legal = sorted(legal)
    close = difflib.get_close_matches(value, legal, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}legal: {', '.join(legal)}"


EXTRAS = {
    "ray": "ray",
    "submitit": "slurm",
    "deepspeed": "deepspeed",
    "peft": "peft",
    "transformers": "eval",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
"""The extra of this package that installs each optional library."""


def guard(main: Callable[[], int | None], promise: str | Callable[[], str] = "") -> int:
    """Run a command's body and translate its exceptions into an exit code and at most one message.

    Args:
        main: The body; it returns an exit code, or None for 0.
        promise: Text for a user who interrupts the command ("the same command continues from the last checkpoint"), or
            a function that returns it. Empty: no text.

    Returns:
        The exit code. If the reader of stdout has ended (`| head`), it is the one that shells use (`EXIT_BROKEN_PIPE`).

    With `FINE_DIST_TRACEBACK=1` in the environment, user errors show their traceback.
    """
    prepare_streams()
    if os.environ.get("FINE_DIST_TRACEBACK"):
        return main() or 0
    try:
        return _run_and_flush(main)
    except ResumeLater as stop:
        _print_error(f"stopped: {stop}")
        return EXIT_RESUME
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except FineDistError as error:
        _print_error(f"error: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        text = promise if isinstance(promise, str) else promise()
        _print_error(f"interrupted; {text}" if text else "interrupted")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _print_error(
            f"error: this needs {error.name}, which is not installed; install it: pip install 'fine_dist[{extra}]'"
        )
        return EXIT_USER_ERROR
    except MemoryError as error:
        _print_error(f"error: not enough memory: {error or 'none is left'}; choose smaller sizes or batches")
        return EXIT_USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_reader_ended():
            return EXIT_BROKEN_PIPE
        if error.errno in _STORAGE_ERRORS or (error.filename and error.errno in _SERVER_ERRORS):
            where = f" at {error.filename}" if error.filename else ""
            _print_error(f"stopped: the storage failed{where} ({error.strerror}); the same command continues")
            return EXIT_RESUME
        remedy = "a regular file is needed there" if isinstance(error, NotAFile) else _REMEDIES.get(error.errno or 0)
        # An OSError without a file is most likely a bug of this program, and a bug report needs its traceback.
        if remedy is None and not error.filename:
            raise
        where = f": {error.filename}" if error.filename else ""
        remedy = remedy or "check the file system there; FINE_DIST_TRACEBACK=1 shows where in the program this happened"
        _print_error(f"error: {error.strerror}{where} ({remedy})")
        if isinstance(error, _OutputFull):
            _redirect_to_devnull(sys.stdout)
        return EXIT_USER_ERROR


def prepare_streams() -> None:
    """Make stdout and stderr safe to write to: closed ones are redirected to /dev/null, and characters that they cannot
    encode are escaped.

    With descriptor 1 or 2 closed, the next file that is opened would get its number, and whatever a C library writes
    to "stderr" would land in a checkpoint.
    """
    # `open` returns the lowest free number, so this fills closed descriptors below 3 one after the other.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - open until the program ends
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _print_error(text: str) -> None:
    """Write a last message to stderr. The message is lost if stderr is full or closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class _OutputFull(OSError):
    """Writing to stdout failed."""


def _run_and_flush(main: Callable[[], int | None]) -> int:
    """Run `main` and flush stdout, so that a closed pipe or a full disk is reported and not lost at exit."""
    try:
        return main() or 0
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _OutputFull(error.errno, error.strerror, "standard output") from None


def _stdout_reader_ended() -> bool:
    """Whether the reader of stdout has ended. A BrokenPipeError may also come from other pipes (to workers, to Ray).

    If so, stdout is redirected to /dev/null, because the interpreter flushes at exit and would report an error.
    """
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    # An empty mask: POLLERR is always reported, and on a pipe it means that the reading end is closed.
    poll.register(out, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    _redirect_to_devnull(sys.stdout)
    return True


def _redirect_to_devnull(stream: TextIO) -> None:
    """Redirect a stream's descriptor to /dev/null, so that flushing the rest of its buffer at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_STORAGE_ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EBUSY)
"""Errors of a file server, after several attempts."""
_SERVER_ERRORS = (errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)
"""Further errors of a file server, if the error has a file: sockets raise them too."""
_REMEDIES = {
    errno.EACCES: "choose a path that you may read and write, or have its owner change its permissions",
    errno.EPERM: "choose a path that you may read and write, or have its owner change its permissions",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.ENOSPC: "free some space; what was saved before is intact, and the same command continues",
    errno.EDQUOT: "the quota is used up; what was saved before is intact, and the same command continues",
    errno.EFBIG: "a limit on the size of files (ulimit -f) is reached; what was saved before is intact",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EEXIST: "a folder is needed there, but it is a file; choose another path",
    errno.EISDIR: "a file is needed there, but it is a folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "this machine has too many files open",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its symbolic links form a cycle",
}
