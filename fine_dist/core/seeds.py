"""Seeds of generators, made from several numbers."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """A hash of several integers as a seed, 0 .. 2^63 - 1.

    Each number passes through the finalizer of splitmix64. The lowest bit is dropped, because a seed is a signed 64-bit
    number.
    """
    # The fractional part of the golden ratio, as in splitmix64; its multiples are spread evenly.
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + (number & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
