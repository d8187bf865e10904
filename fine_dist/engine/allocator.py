"""What glibc's allocator does with the large tensors of a step.

By default it gives large blocks back to the system when they are freed, and every step asks for them again: each page
of a step's activations and gradients is then faulted in and zeroed anew. Here freed memory stays with the process.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let freed host memory stay with this process until it ends; whether that could be set (Linux with glibc).

    It holds for the whole process and cannot be taken back. What a step frees, the next one uses; the resident set
    stays at its peak. Settings of the user's own (MALLOC_...) are left as they are.
    """
    # Setting one of these turns off glibc's own adaptation of the others, so our settings and a user's do not mix.
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    # Both are needed. Without mmap, large blocks come from the heap, and a heap that is never
    # trimmed keeps them. `mallopt` returns 1 where it worked; musl has no such function.
    return set_option is not None and bool(set_option(_MMAP_MAX, 0) and set_option(_TRIM_THRESHOLD, _NEVER))
