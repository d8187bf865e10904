"""The byte layout of one sample in a shard (`KEY.cls`, then `KEY.latent.npy`), and its checks.

All records of a shard that this package writes have the same size: record i starts at byte `i * layout.stride`. One
positioned read fetches its head (tar headers and label) and, into another buffer, its payload (the values). The heads
of many records are compared with the layout at once.

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
"""Digits of a record's number in its key, which is the shard's prefix and the number."""
PREFIX_BYTES = 7
"""`000012-`: the number of the shard, and a dash."""
LABEL_DIGITS = 9
LATENT, LABEL = "latent.npy", "cls"
"""The two entries of a sample; the names are webdataset's."""
TOKENS = "tokens.npy"
"""The third entry of a sample with an image encoder's tokens. webdataset sorts entries by name, so that it follows the
latent, and a reader of latents alone is not affected by it."""
_KEY = PREFIX_BYTES + KEY_DIGITS
_WORDS = {2: (np.uint16, np.int16, 0x7C00), 4: (np.uint32, np.int32, 0x7F800000)}
"""By size of a float in bytes: unsigned and signed integers of that size, and the bit pattern of +Inf."""
_LATENT = 2 * BLOCK
"""Offset of the latent's entry in a record: after the label's header and content."""


def shard_prefix(number: int) -> str:
    """The prefix of all keys of a shard: `000012-`."""
    return f"{number:06d}-"


def record_key(prefix: str, index: int) -> str:
    """The key of a record: `000012-000345`."""
    return f"{prefix}{index:0{KEY_DIGITS}d}"


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a `.npy` file of `array`, without pickle."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def tar_writer(stream: io.IOBase) -> wds.TarWriter:
    """webdataset's writer without times and owners, so that equal samples give equal bytes."""
    return wds.TarWriter(stream, encoder=False, mtime=0, user="nobody", group="nogroup", mode=0o444)


class Layout:
    """The byte offsets of a record that holds one latent of some shape and dtype.

    Attributes:
        stride: Bytes from the start of one record to the start of the next.
        head: Bytes before the payload (H).
        size: Bytes of head and payload, without padding.
        tokens: Layout of the image encoder's tokens; None for shards without tokens.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, tokens: tuple[tuple[int, ...], str] | None = None) -> None:
        # Little-endian on every machine: shards are read in place, without swapping bytes.
        self.shape, self.dtype = tuple(shape), np.dtype(dtype).newbyteorder("<")
        stream = io.BytesIO()
        with tar_writer(stream) as tar:
            latent = npy_bytes(np.zeros(self.shape, self.dtype))
            tar.write({"__key__": record_key(shard_prefix(0), 0), LABEL: b"0", LATENT: latent})
        # The reference record is written by the same writer as the shards, so that it
        # matches the headers of the installed version of webdataset.
        record = stream.getvalue()
        payload = int(np.prod(self.shape)) * self.dtype.itemsize
        self.head = 3 * BLOCK + len(latent) - payload
        self.size = self.head + payload
        # Two headers and the label's content, one block each; then
        # the .npy file, filled up to whole blocks as tar requires.
        self.stride = 3 * BLOCK + -(-len(latent) // BLOCK) * BLOCK
        self.tokens = TokenLayout(self.stride, *tokens) if tokens else None
        self.stride += self.tokens.length if self.tokens else 0
        self._npy = latent[: len(latent) - payload]
        # Heads are compared as 64-bit words, and only in the fields that are fixed: the suffixes of both names, the
        # size, the type flags and the whole .npy header. Keys and labels differ and are checked separately.
        want = np.zeros(-(-self.head // 8) * 8, np.uint8)
        want[: self.head] = np.frombuffer(record[: self.head], np.uint8)
        mask = np.zeros_like(want)
        # The byte ranges are fields of tar's ustar header (POSIX.1-1988): name 0..100, size
        # 124..136, checksum 148..156, type 156, magic and version 257..265, prefix 345. The
        # label's size and both checksums vary with label and key and are left out. The
        # latent's size is compared, because a wrong one would shift all that follows.
        for start, stop in (
            (_KEY, _KEY + len(LABEL) + 2),
            (156, 157),
            (257, 265),
            (345, 346),
            (BLOCK + LABEL_DIGITS, BLOCK + LABEL_DIGITS + 1),
            (_LATENT + _KEY, _LATENT + _KEY + len(LATENT) + 2),
            (_LATENT + 124, _LATENT + 136),
            (_LATENT + 156, _LATENT + 157),
            (_LATENT + 257, _LATENT + 265),
            (_LATENT + 345, _LATENT + 346),
            (_LATENT + BLOCK, self.head),
        ):
            mask[start:stop] = 255
        # `mask` marks bytes that must be equal. `needed` adds keys and the label, which are parsed.
        needed = mask.copy()
        for start, length in ((0, _KEY), (BLOCK, LABEL_DIGITS), (_LATENT, _KEY)):
            needed[start : start + length] = 255
        # Only words with a needed byte are gathered, 35 of the 208 of a head: less
        # to compare, and less to store until the whole batch is compared.
        self._word_indices = np.flatnonzero(needed.view(np.uint64))
        self._mask = mask.view(np.uint64)[self._word_indices]
        self._want = want.view(np.uint64)[self._word_indices] & self._mask
        # Byte offsets of the label and of the latent's key among the gathered words.
        # Both ranges start at a multiple of 8, because BLOCK is a multiple of 8.
        self._label_at, self._latent_at = (
            8 * int(np.searchsorted(self._word_indices, at // 8)) for at in (BLOCK, _LATENT)
        )
        self._texts = np.empty((0, KEY_DIGITS), np.uint8)

    def heads(self, count: int) -> np.ndarray:
        """A buffer for the heads of `count` records: uint8 [count, H]."""
        return np.zeros((count, self.head), np.uint8)

    def marks(self, heads_NH: np.ndarray) -> np.ndarray:
        """The words of the heads that `check` compares: uint64 [N, W]."""
        return heads_NH.view(np.uint64).take(self._word_indices, axis=1)

    def check(self, marks_NW: np.ndarray, prefixes_NP: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """Compare records with this layout and read their labels.

        Args:
            marks_NW: uint64, `marks` of the records.
            prefixes_NP: uint8, the key prefix of each record's shard.
            index_N: int64, each record's number in its shard.

        Returns:
            (good, labels): bool [N] and int64 [N]. The label of a record that is not good is undefined.
        """
        same_NW = (marks_NW & self._mask) == self._want
        # If all are good, the usual case, one reduction is enough; rows are compared only if something is wrong.
        good_N = np.ones(len(marks_NW), bool) if same_NW.all() else same_NW.all(1)
        bytes_NM = marks_NW.view(np.uint8)
        keys_NK = self.keys(prefixes_NP, index_N)
        for at in (0, self._latent_at):
            same_NK = bytes_NM[:, at : at + _KEY] == keys_NK
            if not same_NK.all():
                good_N &= same_NK.all(1)
        labels_N, is_label_N = _labels(bytes_NM[:, self._label_at : self._label_at + LABEL_DIGITS])
        return good_N & is_label_N, labels_N

    def keys(self, prefixes_NP: np.ndarray, index_N: np.ndarray) -> np.ndarray:
        """Keys of records as text: uint8 [N, K]."""
        return np.concatenate([prefixes_NP, self._digits(index_N)], 1)

    def _digits(self, index_N: np.ndarray) -> np.ndarray:
        """The numbers of records as text: uint8 [N, KEY_DIGITS]."""
        most = int(index_N.max(initial=0))
        if most >= len(self._texts):
            numbers = np.arange(max(1024, 2 * most))
            tens = 10 ** np.arange(KEY_DIGITS - 1, -1, -1)
            # A table of the digits of all numbers so far, because formatting
            # each key would take longer than reading the records.
            self._texts = (numbers[:, None] // tens % 10 + ord("0")).astype(np.uint8)
        return self._texts[index_N]

    def explain(self, raw: bytes, key: str, num_classes: int) -> str:
        """Why a record of `size` bytes is not good, as a clause for a message."""
        for at, ending in ((0, LABEL), (_LATENT, LATENT)):
            name = raw[at : at + 100].split(b"\0")[0].decode("utf-8", "replace")
            if name != f"{key}.{ending}":
                return f"entry {name!r} where {key}.{ending} belongs: duplicate, missing, refused or out of place"
        if raw[_LATENT + BLOCK : self.head] != self._npy:
            return f"the latent is not {self.dtype} {'x'.join(map(str, self.shape))} as the manifest says"
        label = raw[BLOCK : BLOCK + LABEL_DIGITS].split(b"\0")[0]
        if not label.isdigit():
            return f"the label is {label.decode('ascii', 'replace')!r}, not a whole number"
        if int(label) >= num_classes:
            return f"label {int(label)}, but there are {num_classes} classes"
        return "its tar headers are damaged"


def all_finite(numbers: np.ndarray) -> bool:
    """Whether a contiguous array of float16 or float32 has neither NaN nor Inf.

    Inf and NaN have the largest bit patterns of their sign. Positive ones are above every finite number as signed
    integers, negative ones as unsigned integers. Two maxima are therefore enough, which stream through the cache.
    """
    unsigned, signed, infinity = _WORDS[numbers.itemsize]
    sign = 1 << (8 * numbers.itemsize - 1)
    return (
        int(numbers.view(signed).max(initial=0)) < infinity
        and int(numbers.view(unsigned).max(initial=0)) < sign + infinity
    )


def _labels(text_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parse rows of ASCII digits that are padded with zero bytes, uint8 [N, C].

    Returns:
        The numbers, int64 [N], and whether each row is valid, bool [N].
    """
    text_CN = np.ascontiguousarray(text_NC.T)  # contiguous along records, so that each operation handles many records
    values_CN = text_CN - np.uint8(ord("0"))  # everything else becomes 10 or more
    leading_CN = values_CN < 10
    good_N, labels_N = leading_CN[0].copy(), np.zeros(text_CN.shape[1], np.int64)
    for position in range(len(text_CN)):
        if position:
            leading_CN[position] &= leading_CN[position - 1]
        if not text_CN[position:].any():
            break
        digit_N = leading_CN[position]
        # Only zeros, tar's padding, may follow the last digit: `12\0x` is not a label.
        good_N &= digit_N | (text_CN[position] == 0)
        labels_N = np.where(digit_N, labels_N * 10 + values_CN[position], labels_N)
    return labels_N, good_N


class TokenLayout:
    """The byte offsets of the entry `KEY.tokens.npy` of a record.

    Attributes:
        at: Byte of the record at which the entry's header begins.
        head: Bytes before the payload (H).
        size: Bytes of head and payload.
        length: Bytes of the whole entry, in blocks.
    """

    def __init__(self, at: int, shape: tuple[int, ...], dtype: str) -> None:
        self.at, self.shape, self.dtype = at, tuple(shape), np.dtype(dtype).newbyteorder("<")
        stream = io.BytesIO()
        with tar_writer(stream) as tar:
            entry = npy_bytes(np.zeros(self.shape, self.dtype))
            tar.write({"__key__": record_key(shard_prefix(0), 0), TOKENS: entry})
        payload = int(np.prod(self.shape)) * self.dtype.itemsize
        self.size = BLOCK + len(entry)
        self.head = self.size - payload
        self.length = BLOCK + -(-len(entry) // BLOCK) * BLOCK
        self._want = np.frombuffer(stream.getvalue()[: self.head], np.uint8)
        # The same fields as in the latent's header: name suffix, size, type, magic, prefix, .npy header.
        ranges = ((_KEY, _KEY + len(TOKENS) + 2), (124, 136), (156, 157), (257, 265), (345, 346), (BLOCK, self.head))
        self._fields = np.concatenate([np.arange(start, stop) for start, stop in ranges])

    def check(self, heads_NH: np.ndarray, keys_NK: np.ndarray) -> np.ndarray:
        """Whether the heads, uint8 [N, H], are those of token entries with the given keys, uint8 [N, K]: bool [N]."""
        same_N = (heads_NH[:, self._fields] == self._want[self._fields]).all(1)
        return same_N & (heads_NH[:, :_KEY] == keys_NK).all(1)


@lru_cache(maxsize=16)
def layout_of(shape: tuple[int, ...], dtype: str, tokens: tuple[tuple[int, ...], str] | None = None) -> Layout:
    """The (cached) layout of records with a latent, and optionally tokens, of the given shapes and dtypes."""
    return Layout(shape, dtype, tokens)
