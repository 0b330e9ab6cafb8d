"""Rows of tokens that are read as they are asked for, so that a data set may be larger than memory.

rows = LazyRows(MappedCodes(file))
rows[3], rows[10:20], rows[index]       # tensors, read now
rows.take(index)                        # some of the rows, none of them read
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

IN_MEMORY = 1 << 30  # bytes up to which a data set is simply held in memory
AT_ONCE = 4096  # rows looked at together where all of them are


class Source(Protocol):
    """N rows of D integers somewhere. fingerprint: of what they hang on; None where their values have to tell."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    fingerprint: str | None

    def read(self, index: np.ndarray) -> np.ndarray:
        """index (n,) int64 -> (n, D)."""
        ...


class MappedCodes:
    """A .npy file of rows, or those of it from `start` on; each process maps it for itself."""

    fingerprint: str | None = None

    def __init__(self, file: Path, rows: slice = slice(None)) -> None:
        self._file, self._rows = file, rows
        self._mapped: np.ndarray | None = None
        mapped = self._open()
        self.shape: tuple[int, int] = (mapped.shape[0], mapped.shape[1])
        self.dtype = mapped.dtype

    def _open(self) -> np.ndarray:
        if self._mapped is None:
            self._mapped = np.load(self._file, mmap_mode="r")[self._rows]
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}  # to a worker goes the name, not the content

    def read(self, index: np.ndarray) -> np.ndarray:
        return self._open()[index]


class LazyRows:
    """(N, D) integers of a source, or some rows of it: what of a Tensor data sets ask for, and `take`."""

    def __init__(self, source: Source, index: Tensor | None = None) -> None:
        self.source = source
        self._index = torch.arange(source.shape[0]) if index is None else index

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._index), self.source.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return torch.from_numpy(np.empty(0, self.source.dtype)).dtype

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        """(D,) of a number, (n, D) of a slice or of numbers."""
        chosen = self._index[rows]
        read = torch.from_numpy(np.ascontiguousarray(self.source.read(chosen.reshape(-1).numpy())))
        return read.view(*chosen.shape, self.source.shape[1])

    def __repr__(self) -> str:
        return f"LazyRows({tuple(self.shape)}, {self.dtype})"

    def take(self, index: Tensor | slice) -> LazyRows:
        """The rows named by index, numbers (n,) int64 or a slice, unread."""
        return LazyRows(self.source, self._index[index])

    def split(self, size: int) -> Iterator[Tensor]:
        """`size` rows at a time, in turn."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def long(self) -> Tensor:
        """All of them, int64."""
        return self[:].long()

    def digest(self) -> bytes:
        """Of what the source hangs on and which rows these are, or of their values, as those of a Tensor."""
        told = hashlib.sha256()
        if self.source.fingerprint is None:
            for some in self.split(AT_ONCE):
                told.update(some.numpy().tobytes())
        else:
            told.update(self.source.fingerprint.encode())
            told.update(self._index.numpy().tobytes())
        return told.digest()


Rows: TypeAlias = Tensor | LazyRows


def taken(rows: Rows, index: Tensor | slice) -> Rows:
    """The rows named by index, numbers (n,) int64 or a slice; those that are read as they are asked for still are."""
    return rows.take(index) if isinstance(rows, LazyRows) else rows[index]


class Joined:
    """The rows of two sets, one after the other."""

    fingerprint: str | None = None

    def __init__(self, first: Rows, second: Rows) -> None:
        self._parts = (first, second)
        self.shape = (len(first) + len(second), first.shape[1])
        self.dtype = first[:1].numpy().dtype

    def read(self, index: np.ndarray) -> np.ndarray:
        found = np.empty((len(index), self.shape[1]), self.dtype)
        edge = len(self._parts[0])
        for part, inside, offset in ((self._parts[0], index < edge, 0), (self._parts[1], index >= edge, edge)):
            if inside.any():
                found[inside] = part[torch.from_numpy(index[inside] - offset)].numpy()
        return found


def joined(first: Rows, second: Rows) -> Rows:
    """Both, one after the other; a tensor where both are."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    return LazyRows(Joined(first, second))
