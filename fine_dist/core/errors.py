"""One family of exceptions. A command turns any of them into one message and exit code 2, never a traceback."""

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
    """Something the user can mend. Its text says what was wrong, the value received and the remedy."""


class ConfigError(FineDistError):
    """A config file or flag is misspelt, of the wrong type or impossible."""


class DataError(FineDistError):
    """Shards or their manifest are missing, damaged or do not fit the model."""


class ArtifactError(FineDistError):
    """A learngene or model folder is missing, damaged or does not fit what is asked of it."""


class CheckpointError(FineDistError):
    """No usable checkpoint, or one that belongs to another model."""


class DamagedStateError(CheckpointError):
    """Every saved state of a run is damaged: it would start over, which it does only when its user asks for that."""


class RunDirError(FineDistError):
    """The run directory cannot be written, is in use, or belongs to another config."""


class TrainingError(FineDistError):
    """Training cannot go on: a loss that is not finite, a rank that died."""


class ReportedElsewhere(FineDistError):
    """Another rank says what is wrong; this one ends with the same exit code and no message of its own."""


class LaunchError(FineDistError):
    """A job cannot be submitted, or a scheduler refused it."""


class NotAFile(OSError):
    """A file is needed, and a named pipe, a socket or a device is there, from which a reader may wait for ever."""


class ResumeLater(Exception):
    """The run was asked to stop, saved its state and should be started again (exit code 75)."""


def nearest(word: str, legal: Iterable[str]) -> str:
    """The end of an error message: the nearest legal word, then all of them."""
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
}
"""Optional libraries, and the extra of this package that installs each."""


def guard(main: Callable[[], int | None], promise: str | Callable[[], str] = "") -> int:
    """Run a command's body and translate what it raises into an exit code and at most one message.

    Args:
        main: The body; it returns an exit code, or None for 0.
        promise: What is true when this command is interrupted ("the same command continues from the last checkpoint"),
            or a function that is asked then. Empty: nothing is promised.

    Returns:
        The exit code. A reader of the output that has gone (`| head`) ends the command quietly, with the code that
        shells give for it.

    Set `FINE_DIST_TRACEBACK=1` to see the traceback of a user error too.
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
        if error.errno in (errno.ESTALE, errno.EIO, errno.ETIMEDOUT):  # of a file server, after several attempts
            where = f" at {error.filename}" if error.filename else ""
            _say(f"stopped: the storage failed{where} ({error.strerror}); the same command continues")
            return EXIT_RESUME
        if error.errno not in _REMEDIES and not isinstance(error, NotAFile):
            raise
        where = f": {error.filename}" if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0, "a regular file is needed there")
        _say(f"error: {error.strerror}{where} ({remedy})")
        if isinstance(error, _OutputFull):
            _to_nowhere(sys.stdout)
        return EXIT_USER_ERROR


def prepare_streams() -> None:
    """Make stdout and stderr safe to write to: closed ones lead nowhere, letters they cannot encode are escaped.

    With descriptor 1 or 2 closed, the next file that is opened would get its number, and whatever a C library writes
    to "stderr" would land in a checkpoint.
    """
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
    """A last message on stderr; one that is full or closed loses it, since there is nowhere else to say so."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class _OutputFull(OSError):
    """What was printed could not be written."""


def _and_flush(main: Callable[[], int | None]) -> int:
    """Run it, and write out what it printed here, where a reader that has gone or a full disk is noticed."""
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
    """Whether nobody reads this process's output any more (other pipes break too: to workers, to Ray). If so, what is
    still to be written goes nowhere, lest the interpreter complains about it when it ends."""
    try:
        out = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    poll = select.poll()
    poll.register(out, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    _to_nowhere(sys.stdout)
    return True


def _to_nowhere(stream: TextIO) -> None:
    """Have a stream's descriptor lead nowhere, so that what is still buffered can be flushed when the program ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_REMEDIES = {
    errno.EACCES: "choose a place you may write to, or change its permissions",
    errno.EPERM: "choose a place you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOSPC: "free some space; what was saved before is intact, and the same command continues",
    errno.EDQUOT: "the quota is used up; what was saved before is intact, and the same command continues",
    errno.EFBIG: "a limit on the size of files (ulimit -f) is reached; what was saved before is intact",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "a file is needed there, and it is a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "links there lead in a circle",
}
