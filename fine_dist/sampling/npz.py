"""ADM's `.npz` files (arXiv 2105.05233): reference statistics, and samples as one array of images.

A statistics file holds `mu` [2048] and `sigma` [2048, 2048] of Inception's pooled features, and `mu_s` and `sigma_s` of
its spatial features; a sample file holds `arr_0`, uint8 [N, H, W, 3]. The published reference batches hold both.

Images are read and written in batches. Pickled arrays are refused, so that no code in a file is executed.

Shapes: N images, B images of a batch, H, W height and width of an image, F features.
"""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fine_dist.core.errors import DataError
from fine_dist.core.files import atomic_file
from fine_dist.core.regular_files import check_regular

IMAGES = "arr_0"
_DAMAGE = (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise for damaged arrays; RuntimeError for encrypted members and unknown compression."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """Means [F] and covariances [F, F], in the dtype of the file. The spatial pair is None if the file has none."""

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None


# --- statistics ------------------------------------------------------------------------------------------------------


def read_statistics(path: str | Path) -> ReferenceStatistics:
    """Read the statistics in a file.

    Raises:
        DataError: The file is damaged, has no statistics, or their shapes or dtypes are impossible.
    """
    path = Path(path)
    with _open(path) as archive:
        names = _names(archive)
        if not {"mu", "sigma"} <= names:
            raise DataError(
                f"{path} holds no statistics (mu, sigma); its arrays: {', '.join(sorted(names)) or 'none'}. "
                "Images (arr_0) are a reference, too, with the features' weights at hand"
            )
        mu, sigma = _vector(archive, "mu", path), _matrix(archive, "sigma", path)
        both = {"mu_s", "sigma_s"} <= names
        mu_s, sigma_s = (_vector(archive, "mu_s", path), _matrix(archive, "sigma_s", path)) if both else (None, None)
    for mean, covariance, which in ((mu, sigma, "mu, sigma"), (mu_s, sigma_s, "mu_s, sigma_s")):
        if mean is not None and covariance is not None and covariance.shape != (len(mean), len(mean)):
            raise DataError(f"{path}: {which} are {list(mean.shape)} and {list(covariance.shape)}; they do not fit")
    return ReferenceStatistics(mu, sigma, mu_s, sigma_s)


def has_statistics(path: str | Path) -> bool:
    """Whether a file holds `mu` and `sigma`."""
    with _open(Path(path)) as archive:
        return {"mu", "sigma"} <= _names(archive)


def write_statistics(path: str | Path, statistics: ReferenceStatistics) -> None:
    """Write statistics as float64 under ADM's names, atomically."""
    arrays = {
        name: np.asarray(value, np.float64)
        for name in ("mu", "sigma", "mu_s", "sigma_s")
        if (value := getattr(statistics, name)) is not None
    }
    with _new_archive(Path(path)) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


# --- images ----------------------------------------------------------------------------------------------------------


class NpzImages:
    """The images of a sample file: `count` of them, of `size` (H, W), which are read in batches.

    Raises:
        DataError: The file is damaged, or has no `arr_0` of uint8 images.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _open(self.path) as archive:
            names = _names(archive)
            if IMAGES not in names:
                raise DataError(
                    f"{self.path} holds no {IMAGES}; its arrays: {', '.join(sorted(names)) or 'none'}. ADM's sample "
                    f"files have their images there, uint8 [N, H, W, 3]"
                )
            with _member(archive, IMAGES, self.path) as stream:
                shape, dtype, fortran = _header(stream, self.path)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            raise DataError(
                f"{self.path}: {IMAGES} is {dtype} {list(shape)}; legal: uint8 [N, H, W, 3] or [N, H, W, 1]"
            )
        self.shape = shape
        self.count, self.size = shape[0], (shape[1], shape[2])

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Yield all images in order, uint8 [B, H, W, 1 or 3]. Raises `DataError` if the file is damaged or short."""
        image_bytes = math.prod(self.shape[1:])
        with _open(self.path) as archive, _member(archive, IMAGES, self.path) as stream:
            _header(stream, self.path)
            for start in range(0, self.count, batch):
                num = min(batch, self.count - start)
                try:
                    # Read as a stream, because a compressed array cannot be memory-mapped.
                    blob = stream.read(num * image_bytes)
                except _DAMAGE as error:
                    raise DataError(f"{self.path} is damaged after image {start}: {error}") from None
                if len(blob) != num * image_bytes:
                    raise DataError(
                        f"{self.path}: {IMAGES} ends after {start + len(blob) // image_bytes} of {self.count} images"
                    )
                yield np.frombuffer(blob, np.uint8).reshape(num, *self.shape[1:])


def write_samples(
    path: str | Path, batches: Iterable[np.ndarray], *, count: int, size: tuple[int, int], channels: int = 3
) -> None:
    """Write a sample file, `arr_0` uint8 [count, H, W, channels], from batches uint8 [B, H, W, channels].

    One batch at a time is in memory. The file is written atomically.

    Raises:
        DataError: A batch has another dtype or size, or there are more or fewer images than `count`.
    """
    shape = (count, *size, channels)
    with _new_archive(Path(path)) as archive, archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        done = 0
        for images in batches:
            if images.dtype != np.uint8 or images.shape[1:] != shape[1:]:
                raise DataError(f"{path}: images are {images.dtype} {list(images.shape)}, not uint8 {list(shape)}")
            done += len(images)
            if done > count:
                raise DataError(f"{path}: more images than the {count} that were expected")
            stream.write(np.ascontiguousarray(images).data)
        if done != count:
            raise DataError(f"{path}: {count} images were expected, and there are {done}")


# --- archives --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A context with a new archive, which gets its final name if the block ends without an error."""
    with atomic_file(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        yield archive


def _open(path: Path) -> zipfile.ZipFile:
    try:
        check_regular(path)
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is no .npz file: {error}") from None


def _names(archive: zipfile.ZipFile) -> set[str]:
    """Return the names of the arrays. Members of other types, which numpy does not write, are ignored."""
    return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    try:
        return archive.open(f"{name}.npy")
    except _DAMAGE as error:
        raise DataError(f"{path}: {name} is damaged: {error}") from None


def _header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Read the header of a `.npy` stream: shape, dtype, and whether the array is in Fortran order."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except _DAMAGE as error:
        raise DataError(f"{path}: an array in it is damaged: {error}") from None
    return shape, dtype, fortran


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(io.BytesIO(stream.read()), allow_pickle=False)
    except _DAMAGE as error:
        raise DataError(f"{path}: {name} is damaged or no plain array: {error}") from None
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise DataError(f"{path}: {name} is {array.dtype}; legal: float32, float64")
    return array


def _vector(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    array = _array(archive, name, path)
    if array.ndim != 1:
        raise DataError(f"{path}: {name} is {list(array.shape)}, and a vector [F] is needed")
    return array


def _matrix(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    array = _array(archive, name, path)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise DataError(f"{path}: {name} is {list(array.shape)}, and a square matrix [F, F] is needed")
    return array
