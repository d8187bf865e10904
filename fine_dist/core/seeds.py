"""Seeds of generators, made from several numbers."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A hash of some integers, 0 .. 2^63 - 1, good enough to seed a generator with.

    splitmix64's finalizer goes over each word. The lowest bit is given up, because a seed is a signed 64-bit number.
    """
    # The fractional part of the golden ratio, as in splitmix64; its multiples are spread evenly.
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state + 0x9E3779B97F4A7C15 + (word & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
