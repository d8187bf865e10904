"""Settings of glibc's allocator for the large tensors of a step.

By default glibc returns large blocks to the system when they are freed, and every step allocates them again: the kernel
then faults in and zeroes each page of a step's activations and gradients. Here the process keeps freed memory.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed host memory in this process until it ends; returns whether this is supported (Linux with glibc).

    It applies to the whole process and cannot be undone. The next step reuses the memory that a step frees, and the
    resident set stays at its peak. It does nothing if the environment sets a MALLOC_... variable.
    """
    # Setting one option disables glibc's dynamic adjustment of the others, so a user's options are not combined
    # with these.
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    # Both are needed: without mmap large blocks come from the heap, and an untrimmed heap
    # keeps them. `mallopt` returns 1 on success; musl does not have it.
    return set_option is not None and bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, _NEVER))
