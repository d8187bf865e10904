"""Steps written as formulas of a study's symbols: `N`, `3N`, `N+I`, `N+C/3`, `400`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fine_dist.core.errors import ConfigError

_TERM = re.compile(r"(?P<factor>\d+)?(?P<symbol>[A-Z])(?:/(?P<divisor>[1-9]\d*))?|(?P<number>\d+)")


def steps_of(formula: int | str, symbols: Mapping[str, int]) -> int:
    """The number of steps that a formula comes to, fractions rounded to the nearest step.

    symbols: one capital letter each -> steps.
    Raises `ConfigError` for a formula that cannot be read or a symbol without a value, naming the known ones.
    """
    if isinstance(formula, int):
        return formula
    total = 0.0
    for part in formula.replace(" ", "").split("+"):
        term = _TERM.fullmatch(part)
        if term is None:
            raise ConfigError(
                f"steps {formula!r}: {part!r} is no term; write terms such as N, 3N, C/4 or 400, joined by +"
            )
        if term["number"]:
            total += int(term["number"])
            continue
        if term["symbol"] not in symbols:
            known = ", ".join(f"{name} = {value}" for name, value in symbols.items()) or "none"
            raise ConfigError(f"steps {formula!r}: {term['symbol']} has no value; known are {known}")
        total += int(term["factor"] or 1) * symbols[term["symbol"]] / int(term["divisor"] or 1)
    return round(total)
