"""Retries of file operations that fail for a moment on network file systems, and removal of folders."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

TRANSIENT = (errno.ESTALE, errno.EIO, errno.EBUSY, errno.ETIMEDOUT)
"""Errors of network file systems that often pass: a server that fails over, a handle that another client replaced."""
WAITS_S = (0.1, 0.5, 2.0)
"""Seconds to wait before each further attempt."""


def retry(operation: Callable[[], T], errors: tuple[int, ...] = TRANSIENT) -> T:
    """Call a function, and call it again, up to three times, when it fails with a transient error.

    Args:
        operation: A function of no arguments that may raise OSError.
        errors: Error numbers after which it is called again.

    Returns:
        The result of the function.

    Raises:
        OSError: Another error occurred, or the last attempt failed too.
    """
    # The last attempt is outside of the loop, so that its error reaches the caller as it is.
    for wait_s in WAITS_S:
        try:
            return operation()
        except OSError as error:
            if error.errno not in errors:
                raise
            log.debug("%s; another attempt in %g s", error, wait_s)
            time.sleep(wait_s)
    return operation()


def remove_tree(folder: str | Path) -> bool:
    """Remove a folder with its content; returns whether that worked.

    On NFS a folder cannot be removed while another process has a file of it open (ENOTEMPTY, EBUSY). In that case a
    warning is logged and the folder is left for a later attempt: a folder that remains is no reason to end a run.
    """

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)

    try:
        retry(remove, (*TRANSIENT, errno.ENOTEMPTY))
    except OSError as error:
        log.warning("%s could not be removed (%s); it is left for the next time", folder, error.strerror)
        return False
    return True
