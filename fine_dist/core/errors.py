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
"""128 and the signal's number (SIGINT, SIGPIPE), as shells count."""
EXIT_RESUME = 75
"""`EX_TEMPFAIL`: the run stopped well and the same command continues it; launchers requeue on this code."""


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
    """Every saved state of a run is damaged: it would start over, which it does only when its user asks for that."""


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


def nearest(word: str, legal: Iterable[str]) -> str:
    """The end of an error message: a suggestion if a legal word is similar, then all legal words."""
    legal = sorted(legal)
    close = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
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
"""Optional libraries, and the extra of this package that installs each."""


def guard(main: Callable[[], int | None], promise: str | Callable[[], str] = "") -> int:
    """Run a command's body and translate its exceptions into an exit code and at most one message.

    Args:
        main: The body; it returns an exit code, or None for 0.
        promise: Text for a user who interrupts the command ("the same command continues from the last checkpoint"), or
            a function that returns it. Empty: no text.

    Returns:
        The exit code. When the reader of the output has ended (`| head`), it is the code that shells use for that.

    With `FINE_DIST_TRACEBACK=1` in the environment, user errors show their traceback.
    """
    prepare_streams()
    if os.environ.get("FINE_DIST_TRACEBACK"):
        return main() or 0
    try:
        return _and_flush(main)
    except ResumeLater as stop:
        _say(f"stopped: {stop}")
        return EXIT_RESUME
    except ReportedElsewhere:
        return EXIT_USER_ERROR
    except FineDistError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        said = promise if isinstance(promise, str) else promise()
        _say(f"interrupted; {said}" if said else "interrupted")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _say(f"error: this needs {error.name}, which is not installed; install it: pip install 'fine_dist[{extra}]'")
        return EXIT_USER_ERROR
    except MemoryError as error:
        _say(f"error: not enough memory: {error or 'none is left'}; choose smaller sizes or batches")
        return EXIT_USER_ERROR
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return EXIT_BROKEN_PIPE
        if error.errno in _STORAGE_FAILS or (error.filename and error.errno in _SERVER_GONE):
            where = f" at {error.filename}" if error.filename else ""
            _say(f"stopped: the storage failed{where} ({error.strerror}); the same command continues")
            return EXIT_RESUME
        remedy = "a regular file is needed there" if isinstance(error, NotAFile) else _REMEDIES.get(error.errno or 0)
        # Errors that concern no file are faults of this program, and their traceback is what a report of a bug needs.
        if remedy is None and not error.filename:
            raise
        where = f": {error.filename}" if error.filename else ""
        remedy = remedy or "look after the file system there; FINE_DIST_TRACEBACK=1 shows where this was met"
        _say(f"error: {error.strerror}{where} ({remedy})")
        if isinstance(error, _OutputFull):
            _to_nowhere(sys.stdout)
        return EXIT_USER_ERROR


def prepare_streams() -> None:
    """Make stdout and stderr safe to write to: closed ones are redirected to /dev/null, and characters that they cannot
    encode are escaped.

    With descriptor 1 or 2 closed, the next file that is opened would get its number, and whatever a C library writes
    to "stderr" would land in a checkpoint.
    """
    # `open` returns the lowest free number, so closed descriptors below 3 are filled up one after the other.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - open until the program ends
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _say(text: str) -> None:
    """Write a last message to stderr. If that is full or closed, the message is lost: there is no other place."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class _OutputFull(OSError):
    """The standard output could not be written."""


def _and_flush(main: Callable[[], int | None]) -> int:
    """Run `main` and flush stdout here, where a reader that has ended or a full disk can still be reported."""
    try:
        return main() or 0
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _OutputFull(error.errno, error.strerror, "standard output") from None


def _reader_has_gone() -> bool:
    """Whether the reader of this process's output has ended; other pipes (to workers, to Ray) can break as well.

    If so, stdout is redirected to /dev/null, because the interpreter would report an error when it flushes at exit.
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
    _to_nowhere(sys.stdout)
    return True


def _to_nowhere(stream: TextIO) -> None:
    """Redirect a stream's descriptor to /dev/null, so that flushing the rest of its buffer at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_STORAGE_FAILS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EBUSY)
"""Errors of a file server that have stayed through several attempts."""
_SERVER_GONE = (errno.ENOTCONN, errno.EHOSTDOWN, errno.EREMOTEIO)
"""The same, where the error is a file's: sockets know them too."""
_REMEDIES = {
    errno.EACCES: "choose a place you may read and write, or have its owner change its permissions",
    errno.EPERM: "choose a place you may read and write, or have its owner change its permissions",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOSPC: "free some space; what was saved before is intact, and the same command continues",
    errno.EDQUOT: "the quota is used up; what was saved before is intact, and the same command continues",
    errno.EFBIG: "a limit on the size of files (ulimit -f) is reached; what was saved before is intact",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EEXIST: "a folder is needed there, and it is a file; choose another path",
    errno.EISDIR: "a file is needed there, and it is a folder",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "this machine has too many files open",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "links there lead in a circle",
}
