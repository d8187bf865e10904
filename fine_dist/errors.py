"""One family of exceptions. A command turns any of them into one message and exit code 2, never a traceback."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
EXIT_TASKS_FAILED = 3
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


class RunDirError(FineDistError):
    """The run directory cannot be written, is in use, or belongs to another config."""


class TrainingError(FineDistError):
    """Training cannot go on: a loss that is not finite, a rank that died."""


class ToldElsewhere(FineDistError):
    """Another rank says what is wrong; this one ends with the same exit code and no message of its own."""


class LaunchError(FineDistError):
    """A job cannot be submitted, or a scheduler refused it."""


class ResumeLater(Exception):
    """The run was asked to stop, saved its state and should be started again (exit code 75)."""


def nearest(word: str, legal: Iterable[str]) -> str:
    """The end of an error message: the nearest legal word, then all of them."""
    legal = sorted(legal)
    close = difflib.get_close_matches(word, legal, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}legal: {', '.join(legal)}"


def guard(main: Callable[[], int | None]) -> int:
    """Run a command's body and translate what it raises into an exit code and at most one message.

    Set `FINE_DIST_TRACEBACK=1` to see the traceback of a user error too.
    """
    if os.environ.get("FINE_DIST_TRACEBACK"):
        return main() or 0
    try:
        return main() or 0
    except ResumeLater as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return EXIT_RESUME
    except ToldElsewhere:
        return EXIT_USER_ERROR
    except FineDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        print(f"error: {error.strerror}: {error.filename or ''} ({_REMEDIES[error.errno]})", file=sys.stderr)
        return EXIT_USER_ERROR


_REMEDIES = {
    errno.EACCES: "choose a place you may write to, or change its permissions",
    errno.EPERM: "choose a place you may write to, or change its permissions",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOSPC: "free some space; what was saved before is intact, and the same command continues",
    errno.EDQUOT: "the quota is used up; what was saved before is intact, and the same command continues",
    errno.EFBIG: "a limit on the size of files (ulimit -f) is reached; what was saved before is intact",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
}
