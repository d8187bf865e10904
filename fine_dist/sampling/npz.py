"""ADM's `.npz` files (arXiv 2105.05233): reference statistics, and samples as one array of images.

A statistics file holds `mu` [2048], `sigma` [2048, 2048] of Inception's pooled features and `mu_s`, `sigma_s` of its
spatial ones; a sample file holds `arr_0`, uint8 [N, H, W, 3]. The published reference batches hold both.

Arrays are read and written in pieces, and without pickle: no code in a file is run.
"""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from fine_dist.core.errors import DataError
from fine_dist.core.files import atomic_file
from fine_dist.core.regular_files import check_regular

IMAGES = "arr_0"


@dataclass(frozen=True)
class ReferenceStatistics:
    """Means [F] and covariances [F, F] in the dtype they are stored in; the spatial pair is None where it is absent."""

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None


# --- statistics ------------------------------------------------------------------------------------------------------


def read_statistics(path: str | Path) -> ReferenceStatistics:
    """The statistics in a file. `DataError` when it has none, or they are of impossible shape or type."""
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
    """Write float64 statistics under ADM's names, atomically."""
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
    """The images of a sample file: `count`, `size` (H, W), and batches of them, read as they are asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _open(self.path) as archive:
            names = _names(archive)
            if IMAGES not in names:
                raise DataError(
                    f"{self.path} holds no {IMAGES}; its arrays: {', '.join(sorted(names)) or 'none'}. ADM's sample "
                    f"files have their images there, uint8 [N, H, W, 3]"
                )
            with archive.open(f"{IMAGES}.npy") as stream:
                shape, dtype, fortran = _header(stream, self.path)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
            raise DataError(
                f"{self.path}: {IMAGES} is {dtype} {list(shape)}; legal: uint8 [N, H, W, 3] or [N, H, W, 1]"
            )
        self.shape = shape
        self.count, self.size = shape[0], (shape[1], shape[2])

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """uint8 [B, H, W, 3 or 1]. `DataError` when the file ends early or is damaged."""
        one = int(np.prod(self.shape[1:]))
        with _open(self.path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            _header(stream, self.path)
            for start in range(0, self.count, batch):
                num = min(batch, self.count - start)
                try:
                    # Sequentially through the archive's own stream: a member
                    # may be compressed, and then it cannot be mapped or sought.
                    blob = stream.read(num * one)
                except (zipfile.BadZipFile, EOFError, OSError) as error:
                    raise DataError(f"{self.path} is damaged after image {start}: {error}") from None
                if len(blob) != num * one:
                    raise DataError(
                        f"{self.path}: {IMAGES} ends after {start + len(blob) // one} of {self.count} images"
                    )
                yield np.frombuffer(blob, np.uint8).reshape(num, *self.shape[1:])


def write_samples(
    path: str | Path, batches: Iterable[np.ndarray], *, count: int, size: tuple[int, int], channels: int = 3
) -> None:
    """Write `arr_0`, uint8 [count, H, W, channels], from batches uint8 [B, H, W, channels] that come one by one.

    One batch at a time is in memory, and the file is written atomically. `DataError` when a batch has another type or
    size, or there are more or fewer images than `count`.
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
                raise DataError(f"{path}: more than the {count} images that were announced")
            stream.write(np.ascontiguousarray(images).data)
        if done != count:
            raise DataError(f"{path}: {done} images came, and {count} were announced")


# --- archives --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A new archive, which is there under its name when the block has ended well."""
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
    return {name.removesuffix(".npy") for name in archive.namelist()}


def _header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype, bool]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: an array in it is damaged: {error}") from None
    return shape, dtype, fortran


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as stream:
            array = np.lib.format.read_array(io.BytesIO(stream.read()), allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
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
