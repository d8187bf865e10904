"""Logging: records of `logging` as one line each on stderr, with the rank where several processes run.

A module has `log = logging.getLogger(__name__)`; a command calls `configure` once. The result of a command (a table, a
path, a dry run) is printed to stdout; everything else is a record:

    DEBUG    details for debugging, and messages of libraries on all ranks (shown with --verbose)
    INFO     progress and intermediate results (the default level)
    WARNING  something that a user should know, from this project or a library (the lowest level with --quiet)
    ERROR    why a command or a rank ends
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import warnings
from typing import Any

from fine_dist.core.processes import rank_for_logs

LEVEL = "FINE_DIST_LOG_LEVEL"
"""Environment variable with the level (debug, info or warning), inherited by the processes that a command starts."""
OURS = ("fine_dist", "benchmarks")
"""Prefixes of the names of this project's loggers; all other loggers belong to libraries."""
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
_lock = threading.Lock()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--verbose` and `--quiet`, which every command has."""
    parser.add_argument(
        "--verbose", action="store_true", help="also log details, and libraries' messages on every rank"
    )
    parser.add_argument("--quiet", action="store_true", help="log warnings and errors only; results are still printed")


def configure(options: argparse.Namespace | None = None) -> None:
    """Send log records of this project and of libraries to stderr. May be called again, with another level.

    Python's `warnings` become records too, so that a library's warning is written once, by rank 0.

    Args:
        options: Parsed flags of `add_flags`. None: the level in the environment, which a parent process has set.
    """
    if options is not None and (options.verbose or options.quiet):
        os.environ[LEVEL] = "debug" if options.verbose else "warning"
    level = _LEVELS.get(os.environ.get(LEVEL, ""), logging.INFO)
    root = logging.getLogger()
    with _lock:
        if not any(isinstance(handler, _Terminal) for handler in root.handlers):
            root.addHandler(_Terminal())
        # INFO records of libraries concern their developers; their warnings concern users.
        root.setLevel(logging.DEBUG if level == logging.DEBUG else logging.WARNING)
        for name in OURS:
            logging.getLogger(name).setLevel(level)
        for name in _VERBOSE_LIBRARIES:
            logging.getLogger(name).setLevel(logging.WARNING)
        warnings.showwarning = _show_warning
        threading.excepthook = _show_thread_error


_VERBOSE_LIBRARIES = ("PIL", "matplotlib", "asyncio", "urllib3", "filelock", "fsspec", "h5py", "numba", "torch")
"""Libraries whose DEBUG records would fill thousands of lines."""


class _Terminal(logging.Handler):
    """A handler that writes a record as one line to the current stderr, above any progress bars on the screen."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown. Those of libraries are shown once, and below ERROR by rank 0 alone."""
        rank, world_size = rank_for_logs()
        record.rank, record.world_size = rank, world_size
        if record.name.startswith(OURS) or logging.getLogger(OURS[0]).level == logging.DEBUG:
            return True
        if rank and record.levelno < logging.ERROR:
            return False
        key = (record.name, record.getMessage())
        if key in self._shown:
            return False
        self._shown.add(key)
        return True

    def format(self, record: logging.LogRecord) -> str:
        """`[rank 3] warning: text`, without the rank in a single process and without the level for INFO."""
        several = getattr(record, "world_size", 1) > 1
        prefix = f"[rank {record.__dict__['rank']}] " if several else ""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        return f"{prefix}{level}{text}"

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record. A stderr that is closed or full loses it: a log line may not end a run."""
        try:
            text = self.format(record)
            bars: Any = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
            if bars is not None and getattr(bars, "_instances", None):
                bars.write(text, file=sys.stderr)  # removes the bars, writes, and draws them again below
            else:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # stderr is full, closed or None
            pass


def _show_thread_error(args: threading.ExceptHookArgs) -> None:
    """Log one line when a thread ends with an exception, such as TensorBoard's writer on a full disk."""
    name = args.thread.name if args.thread else "thread"
    log = logging.getLogger("fine_dist")
    log.error("%s ended: %s: %s", name, args.exc_type.__name__, args.exc_value)
    if args.exc_value is not None:
        log.debug("where %s ended", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if file is not None:  # the caller of `showwarning` chose where
        print(warnings.formatwarning(message, category, filename, lineno, line), file=file, end="")
        return
    if f"{os.sep}fine_dist{os.sep}" in filename:
        logging.getLogger("fine_dist").warning(message)
    else:
        logging.getLogger("py.warnings").warning("%s: %s (%s, line %d)", category.__name__, message, filename, lineno)


def duration(seconds: float) -> str:
    """A duration in seconds as text in a suitable unit: `50 s`, `12 min`, `3.5 h`, `140 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
