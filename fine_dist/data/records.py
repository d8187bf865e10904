"""The bytes of one sample in a shard (`KEY.cls`, then `KEY.latent.npy`), and how they are checked.

All records of a shard that this package writes have the same size: record i begins at byte `i * layout.stride`. One
positioned read brings its head (tar headers and label) and, into another buffer, its payload (the numbers). The heads
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
"""A key is a shard's prefix, then the record's number in so many digits."""
PREFIX_BYTES = 7
"""`000012-`: the number of the shard, and a dash."""
LABEL_DIGITS = 9
LATENT, LABEL = "latent.npy", "cls"
"""The two entries of a sample; the names are webdataset's."""
TOKENS = "tokens.npy"
"""A third entry, where an image encoder's tokens are stored beside the latents. webdataset writes entries in the order
of their names, so that it lies behind the latent, and a reader of latents alone reads as without it."""
_KEY = PREFIX_BYTES + KEY_DIGITS
_WORDS = {2: (np.uint16, np.int16, 0x7C00), 4: (np.uint32, np.int32, 0x7F800000)}
"""By bytes of a float: words of its size, and the bits of +Inf, the first pattern that is no number."""
_LATENT = 2 * BLOCK
"""Where the latent's entry begins in a record: after the label's header and content."""


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
    """The byte offsets of a record that holds one latent of some shape and dtype.

    Attributes:
        stride: Bytes from the beginning of one record to the next.
        head: Bytes before the payload (H).
        size: Bytes of head and payload, without the padding behind them.
        tokens: Where the image encoder's tokens lie; None in shards without them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, tokens: tuple[tuple[int, ...], str] | None = None) -> None:
        # Little-endian on every machine: shards are read in place, without a swap of bytes.
        self.shape, self.dtype = tuple(shape), np.dtype(dtype).newbyteorder("<")
        stream = io.BytesIO()
        with tar_writer(stream) as tar:
            latent = npy_bytes(np.zeros(self.shape, self.dtype))
            tar.write({"__key__": record_key(shard_prefix(0), 0), LABEL: b"0", LATENT: latent})
        # A record is written by the same writer as the shards and taken as the pattern. If
        # another version of webdataset wrote other headers, the pattern would follow it.
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
        # Heads are compared as 64-bit words, and only where they matter: the ends of both names, the size, what tar
        # calls the types, and the whole .npy header. Keys and the label differ and are looked at apart.
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
        # `mask` marks bytes that must be equal. Keys and label are needed as well, but are compared by their meaning.
        needed = mask.copy()
        for start, length in ((0, _KEY), (BLOCK, LABEL_DIGITS), (_LATENT, _KEY)):
            needed[start : start + length] = 255
        # Only the words that hold a needed byte are gathered, 35 of the 208 of a
        # head: less to compare, and less to keep until the whole batch is compared.
        self._words = np.flatnonzero(needed.view(np.uint64))
        self._mask = mask.view(np.uint64)[self._words]
        self._want = want.view(np.uint64)[self._words] & self._mask
        # Where the label and the latent's key are found among the gathered words,
        # in bytes. Each range begins at a multiple of 8 because BLOCK is one.
        self._label_at, self._latent_at = (8 * int(np.searchsorted(self._words, at // 8)) for at in (BLOCK, _LATENT))
        self._texts = np.empty((0, KEY_DIGITS), np.uint8)

    def heads(self, count: int) -> np.ndarray:
        """A buffer for the heads of `count` records: uint8 [count, H]."""
        return np.zeros((count, self.head), np.uint8)

    def marks(self, heads_NH: np.ndarray) -> np.ndarray:
        """The words of the heads that `check` compares: uint64 [N, W]."""
        return heads_NH.view(np.uint64).take(self._words, axis=1)

    def check(self, marks_NW: np.ndarray, prefixes_NP: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, ...]:
        """Compare records with this layout and read their labels.

        Args:
            marks_NW: uint64, `marks` of the records.
            prefixes_NP: uint8, the key prefix of each record's shard.
            index_N: int64, each record's number in its shard.

        Returns:
            (good, labels): bool [N] and int64 [N]; the label of a record that is not good is meaningless.
        """
        same_NW = (marks_NW & self._mask) == self._want
        # The usual case, all good, costs one reduction; rows are told apart only where something is wrong.
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
            # A table of the digits of all numbers so far: formatting
            # each key anew would take longer than reading the records.
            self._texts = (numbers[:, None] // tens % 10 + ord("0")).astype(np.uint8)
        return self._texts[index_N]

    def explain(self, raw: bytes, key: str, num_classes: int) -> str:
        """The reason why a record of `size` bytes is not good, as one sentence."""
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

    Infinities and NaNs are the largest bit patterns of their sign: as signed words those without a sign, and as
    unsigned words those with one, lie above every number. So two maxima, which stream through the cache, say it.
    """
    unsigned, signed, infinity = _WORDS[numbers.itemsize]
    sign = 1 << (8 * numbers.itemsize - 1)
    return (
        int(numbers.view(signed).max(initial=0)) < infinity
        and int(numbers.view(unsigned).max(initial=0)) < sign + infinity
    )


def _labels(text_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in rows of ASCII digits that are padded with zero bytes, int64 [N], and which rows are valid, bool
    [N]."""
    text_CN = np.ascontiguousarray(text_NC.T)  # operations run along rows, many records at once
    values_CN = text_CN - np.uint8(ord("0"))  # what is no digit becomes 10 or more
    leading_CN = values_CN < 10
    good_N, labels_N = leading_CN[0].copy(), np.zeros(text_CN.shape[1], np.int64)
    for place in range(len(text_CN)):
        if place:
            leading_CN[place] &= leading_CN[place - 1]
        if not text_CN[place:].any():
            break
        digit_N = leading_CN[place]
        # Behind the first byte that is no digit only zeros may follow, as tar's padding: `12\0x` is no label.
        good_N &= digit_N | (text_CN[place] == 0)
        labels_N = np.where(digit_N, labels_N * 10 + values_CN[place], labels_N)
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
        # The same fields as of the latent's header: the end of the name, the size, type, magic, prefix, .npy header.
        ranges = ((_KEY, _KEY + len(TOKENS) + 2), (124, 136), (156, 157), (257, 265), (345, 346), (BLOCK, self.head))
        self._fields = np.concatenate([np.arange(start, stop) for start, stop in ranges])

    def check(self, heads_NH: np.ndarray, keys_NK: np.ndarray) -> np.ndarray:
        """Whether the heads uint8 [N, H] of this entry are those of the records with these keys: bool [N]."""
        same_N = (heads_NH[:, self._fields] == self._want[self._fields]).all(1)
        return same_N & (heads_NH[:, :_KEY] == keys_NK).all(1)


@lru_cache(maxsize=16)
def layout_of(shape: tuple[int, ...], dtype: str, tokens: tuple[tuple[int, ...], str] | None = None) -> Layout:
    """The layout of records with latents, and tokens where there are any, of these shapes and dtypes."""
    return Layout(shape, dtype, tokens)
