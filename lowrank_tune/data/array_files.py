"""The `.npy` files of a store: written as they grow, mapped, and their checksums."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

MAX_CHECKSUM_BYTES = 1 << 30
"""Of larger files only the size is checked: to read them at every start would take too long."""
CHECKSUM_BLOCK_BYTES = 1 << 20


class ArrayFile:
    """A `.npy` file that grows. numpy reserves space in the header for the length."""

    def __init__(
        self,
        path: Path,
        dtype: str,
    ) -> None:
        self.file: BinaryIO = path.open("wb")
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._write_npy_header()
        self._start = self.file.tell()

    def _write_npy_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {
            "descr": descr,
            "fortran_order": False,
            "shape": (self.count,),
        }
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: Any) -> None:
        """Writes more values."""
        array = np.asarray(values, dtype=self.dtype)
        self.count += array.size
        self.file.write(array.tobytes())

    def close(self) -> None:
        """Writes the length."""
        self.file.seek(0)
        self._write_npy_header()
        assert self.file.tell() == self._start, "numpy no longer reserves space in the header"
        self.file.close()


def load_array(path: Path) -> NDArray[Any]:
    """Maps an array. One without entries cannot be mapped, because its file ends with the header, and is read."""
    mode: Any = "r" if _has_entries(path) else None
    array = np.load(path, mmap_mode=mode, allow_pickle=False)
    return cast(NDArray[Any], array)


def _has_entries(path: Path) -> bool:
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            return True
        shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return bool(shape[0])


def checksum(path: Path) -> list[int]:
    """Returns the size of a file in bytes and the CRC-32 of its contents (0 for a file above `MAX_CHECKSUM_BYTES`)."""
    size = path.stat().st_size
    crc = 0
    if size <= MAX_CHECKSUM_BYTES:
        with path.open("rb") as file:
            while block := file.read(CHECKSUM_BLOCK_BYTES):
                crc = zlib.crc32(block, crc)
    return [size, crc]
