"""One sample inside a shard: `KEY.cls` then `KEY.latent.npy`, and what can be wrong with it.

Every record of a shard that this package writes has the same size, so that record i begins at `i * layout.stride` and
one positioned read brings its label, its headers and its payload. Each read is checked against the layout, many
records at once.

Shapes: N records, H bytes of a record's head, K bytes of a key.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import webdataset as wds

BLOCK = 512
"""Bytes of a tar block."""
KEY_DIGITS = 6
"""A key is a shard's prefix, then the record's number in so many digits."""
PREFIX_BYTES = 7
"""`000012-`: the number of the shard, and a dash."""
LABEL_DIGITS = 9
LATENT, LABEL = "latent.npy", "cls"
"""The two entries of a sample; the names are webdataset's."""


def shard_prefix(number: int) -> str:
    """The part of a key that its shard gives: `000012-`."""
    return f"{number:06d}-"


def record_key(prefix: str, index: int) -> str:
    """The key of a shard's record: `000012-000345`."""
    return f"{prefix}{index:0{KEY_DIGITS}d}"


def npy_bytes(array: np.ndarray) -> bytes:
    """`array` as the bytes of a `.npy` file (never pickled)."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def tar_writer(stream: io.IOBase) -> wds.TarWriter:
    """webdataset's writer, set so that equal samples give equal bytes (no times, no owners)."""
    return wds.TarWriter(stream, encoder=False, mtime=0, user="nobody", group="nogroup", mode=0o444)


class Layout:
    """Where everything lies in a record that holds one latent of this shape and dtype.

    `stride`:  bytes from one record to the next.
    `head`:    bytes before the payload (H).
    `size`:    bytes of a record that matter: head and payload.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype).newbyteorder("<")
        stream = io.BytesIO()
        with tar_writer(stream) as tar:
            latent = npy_bytes(np.zeros(self.shape, self.dtype))
            tar.write({"__key__": record_key(shard_prefix(0), 0), LABEL: b"0", LATENT: latent})
        record = stream.getvalue()
        payload = int(np.prod(self.shape)) * self.dtype.itemsize
        self.head = 3 * BLOCK + len(latent) - payload
        self.size = self.head + payload
        self.stride = 3 * BLOCK + -(-len(latent) // BLOCK) * BLOCK
        self._template = np.frombuffer(record[: self.head], np.uint8)
        # what must equal the template in every record: all but keys, checksums, and the label with its length
        key = PREFIX_BYTES + KEY_DIGITS
        self._same = [
            (key, 124),
            (136, 148),
            (156, BLOCK),
            (2 * BLOCK + key, 2 * BLOCK + 148),
            (2 * BLOCK + 156, self.head),
        ]
        self._units = 10 ** np.arange(KEY_DIGITS - 1, -1, -1)

    def check(self, heads_NH: np.ndarray, prefixes_NP: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """Which records are what they should be, and their labels.

        heads_NH:    uint8, the first `head` bytes of each record.
        prefixes_NP: uint8, the key prefix of each record's shard.
        index_N:     int64, each record's number in its shard.

        Returns (good bool [N], labels int64 [N]); a bad record's label is meaningless.
        """
        good_N = np.ones(len(heads_NH), bool)
        for start, stop in self._same:
            good_N &= (heads_NH[:, start:stop] == self._template[start:stop]).all(1)
        digits_ND = (index_N[:, None] // self._units % 10 + ord("0")).astype(np.uint8)
        for at in (0, 2 * BLOCK):
            good_N &= (heads_NH[:, at : at + PREFIX_BYTES] == prefixes_NP).all(1)
            good_N &= (heads_NH[:, at + PREFIX_BYTES : at + PREFIX_BYTES + KEY_DIGITS] == digits_ND).all(1)
        labels_N = np.zeros(len(heads_NH), np.int64)
        more_N = np.ones(len(heads_NH), bool)
        for column in range(LABEL_DIGITS):
            char_N = heads_NH[:, BLOCK + column]
            digit_N = (char_N >= ord("0")) & (char_N <= ord("9"))
            good_N &= digit_N | (char_N == 0) if column else digit_N
            more_N &= digit_N
            if not more_N.any():
                break
            labels_N = np.where(more_N, labels_N * 10 + char_N - ord("0"), labels_N)
        return good_N, labels_N


@lru_cache(maxsize=16)
def layout_of(shape: tuple[int, ...], dtype: str) -> Layout:
    """The layout of records with latents of this shape and dtype."""
    return Layout(shape, dtype)
