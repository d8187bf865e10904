"""Pairs of concepts: their sources, the held-out pairs, and the pair of each sample of a step.

The pair at a position of a step is a function of (seed, step, position) alone, so that the training data of a run does
not depend on the number of processes, on restarts, or on other runs in its pack.

Shapes: b samples of a rank's batch, B of the global batch, R rows that train together.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from fine_dist.core.config import expand_path
from fine_dist.core.errors import DataError
from fine_dist.core.regular_files import read_text
from fine_dist.creative.config import CreativeConfig

Pair = tuple[str, str]
_DRAW, _SPLIT = 0x70616972, 0x73706C69
"""Constants that separate the random streams of pairs and of the split from other uses of a seed."""


@dataclass(frozen=True)
class Pairs:
    """Training pairs and held-out pairs."""

    trained: tuple[Pair, ...]
    held_out: tuple[Pair, ...]

    @property
    def all(self) -> tuple[Pair, ...]:
        """All pairs, the training pairs first."""
        return self.trained + self.held_out


def make_pairs(config: CreativeConfig) -> Pairs:
    """The pairs of a config, from the user's file of pairs or from concepts, split by `split_seed`.

    No pair is in both parts, in either order. `DataError` when a file cannot be used or there are too few pairs.
    """
    draw = np.random.Generator(np.random.Philox(key=[config.split_seed, _SPLIT]))
    if config.pairs is not None:
        pairs = read_pairs(config.pairs)
        order = draw.permutation(len(pairs))
        if len(pairs) <= config.held_out:
            raise DataError(
                f"{config.pairs}: {len(pairs)} pairs, and held_out: {config.held_out} leaves none to train on; "
                "give more pairs, or lower held_out"
            )
        chosen = [pairs[i] for i in order]
        return Pairs(tuple(chosen[config.held_out :]), tuple(chosen[: config.held_out]))
    words = read_concepts(config.concepts)
    combinations = list(itertools.combinations(words, 2))
    needed = config.held_out + config.num_pairs
    if needed > len(combinations):
        raise DataError(
            f"{config.concepts or 'the list of concepts'}: {len(words)} words make {len(combinations)} pairs, and "
            f"num_pairs {config.num_pairs} with held_out {config.held_out} need {needed}; lower them, or add words"
        )
    chosen = [combinations[i] for i in draw.permutation(len(combinations))[:needed]]
    return Pairs(tuple(chosen[config.held_out :]), tuple(chosen[: config.held_out]))


def read_concepts(path: str | None) -> list[str]:
    """Words of a file, one per line; None: the project's list. `DataError` for fewer than two words or a repeat."""
    if path is None:
        lines = resources.files("fine_dist.creative").joinpath("concepts.txt").read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    words = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if twice := [word for word, count in Counter(words).items() if count > 1]:
        raise DataError(f"{path}: {twice[0]!r} occurs twice; remove one of them")
    if len(words) < 2:
        raise DataError(f"{path}: {len(words)} words make no pair; give two words or more, one per line")
    return words


def read_pairs(path: str) -> list[Pair]:
    """Pairs of words in the order of the file, in two columns separated by a comma or a tab.

    `DataError` names the line of a wrong number of columns or of a pair that occurs twice (in either order).
    """
    lines = _read(path).splitlines()
    delimiter = "\t" if any("\t" in line for line in lines) else ","
    pairs: list[Pair] = []
    seen: dict[frozenset[str], int] = {}
    for number, row in enumerate(_rows(path, lines, delimiter), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) != 2 or not all(cells):
            raise DataError(
                f"{path}, line {number}: {len([c for c in cells if c])} column(s) in {lines[number - 1]!r}; a line is "
                "two words, split by a comma or a tab, such as: lettuce,mantis"
            )
        key = frozenset(cells)
        if len(key) < 2:
            raise DataError(f"{path}, line {number}: {cells[0]!r} is paired with itself; give two different words")
        if key in seen:
            raise DataError(
                f"{path}, line {number}: repeats the pair of line {seen[key]}; both orders of a pair are trained, so "
                "remove one of the lines"
            )
        seen[key] = number
        pairs.append((cells[0], cells[1]))
    return pairs


def _rows(path: str, lines: list[str], delimiter: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise DataError(f"{path}: {error}; give two words a line") from None


def _read(path: str) -> str:
    try:
        return read_text(expand_path(path)).removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


# --- the stream ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairBatch:
    """A rank's part of a global batch.

    positions: int64 [b], positions in the global batch.
    pairs:     int64 [b, R], number of the training pair of each sample and row.
    """

    step: int
    positions: Tensor
    pairs: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> PairBatch:
        """The batch with its pairs on a device."""
        return replace(self, pairs=self.pairs.to(device, non_blocking=True))

    def part(self, start: int, size: int) -> PairBatch:
        """Samples `start` to `start + size`: a micro-batch."""
        rows = slice(start, start + size)
        return replace(self, positions=self.positions[rows], pairs=self.pairs[rows])


class PairStream:
    """An endless stream of `PairBatch`; rank r of W has positions r B/W to (r + 1) B/W of each global batch of B.

    `seeds` are those of the R rows; rows with the same seed get the same pairs.
    """

    def __init__(
        self, seeds: Sequence[int], num_pairs: int, *, global_batch: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.seeds, self.num_pairs, self.global_batch = list(seeds), num_pairs, global_batch
        if global_batch % world_size:
            near = max(world_size, round(global_batch / world_size) * world_size)
            raise DataError(
                f"a batch of {global_batch} pairs cannot be divided over {world_size} processes; use a multiple of "
                f"{world_size}, such as {near}"
            )
        share = global_batch // world_size
        self._own = slice(rank * share, (rank + 1) * share)
        self._positions = torch.arange(global_batch)[self._own]

    def batches(self, start_step: int = 0) -> Iterator[PairBatch]:
        """Batches from `start_step` on, without end."""
        for step in itertools.count(start_step):
            drawn = {seed: self._draw(seed, step) for seed in set(self.seeds)}
            pairs = torch.stack([drawn[seed] for seed in self.seeds], dim=1)
            yield PairBatch(step, self._positions, pairs)

    def _draw(self, seed: int, step: int) -> Tensor:
        """Pairs [b] of this rank: every rank draws the complete batch (a few numbers) and selects its positions."""
        # A counter-based generator gives step 10,000 without drawing the steps before it, so a restart costs nothing.
        draw = np.random.Generator(np.random.Philox(key=[seed, _DRAW], counter=[0, 0, 0, step]))
        return torch.from_numpy(draw.integers(self.num_pairs, size=self.global_batch)[self._own])
