"""Pictures of a folder, or of a data set of the `datasets` library: read into one array, or one by one as asked for.

Both kinds are opened one after the other to see that they are alike. Where together they take more memory than
`lazy_rows.IN_MEMORY`, what was read is let go, and each is read again whenever it is wanted. That first look falls away
where size and colour are told, so that nothing is left to be seen.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from di4c_ext import lazy_rows

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_GREY = {"1", "L", "LA"}
_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # pixels of more than 8 bits


@dataclass
class PictureSet:
    """N pictures that can be opened by their number, as PIL has them, and the labels that came with them.

    open: number -> a picture, of which no more than the head need be read yet; ValueError where it cannot be.
    fingerprint: of all of them, without reading them.
    """

    names: Sequence[str]
    open: Callable[[int], Any]
    labels: np.ndarray | None
    fingerprint: str
    form: tuple[int, ...] = field(default=(), init=False)  # (height, width[, 3]), once they were looked at
    _size: int | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.names)

    def look(self, size: int | None, grayscale: bool | None) -> np.ndarray | None:
        """uint8 (N, height, width[, 3]), or None where that is too much memory, and `pixels` is to be asked.

        size: of the square they are made, the middle of the shorter side's square; None keeps their own size, which
        must then be one. grayscale: None makes grey images where every picture is grey and colour ones otherwise.
        Raises ValueError for pictures of two sizes, naming both, and for pixels of more than 8 bits.
        """
        self._size = size
        if size is not None and grayscale is not None:
            self.form = (size, size) if grayscale else (size, size, 3)
            if len(self) * int(np.prod(self.form)) > lazy_rows.IN_MEMORY:
                return None
        found: list[np.ndarray] = []
        held, is_colour = 0, grayscale is False
        first: tuple[int, ...] = ()
        for i, name in enumerate(self.names):
            picture = self.open(i)
            _check_depth(name, picture)
            if grayscale is None:
                is_colour |= picture.mode not in _GREY
            form = (size, size) if size is not None else (picture.height, picture.width)
            if first and form != first:
                sizes = [f"{height} x {width}" for height, width in (first, form)]
                raise ValueError(
                    f"images of mixed sizes (height x width): {self.names[0]} is {sizes[0]}, {name} is {sizes[1]}; "
                    "give --image_size to make them all one square"
                )
            first = form
            if held <= lazy_rows.IN_MEMORY:
                found.append(self._levels(name, picture, is_colour))
                held += found[-1].nbytes
            else:
                found.clear()
        self.form = (*first, 3) if is_colour else first
        if held > lazy_rows.IN_MEMORY:
            return None
        if is_colour:
            found = [pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, -1) for pixels in found]
        return np.stack(found)

    def pixels(self, index: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width[, 3]) of some, in the form that `look` has found; read by several threads."""

        def read(number: int) -> np.ndarray:
            name, picture = self.names[number], self.open(number)
            _check_depth(name, picture)
            levels = self._levels(name, picture, len(self.form) == 3)
            if levels.shape != self.form:
                raise ValueError(f"{name}: is {levels.shape} now, all were {self.form}; has it changed?")
            return levels

        found = np.empty((len(index), *self.form), np.uint8)
        with ThreadPoolExecutor(min(len(index), os.cpu_count() or 1) or 1) as threads:
            for place, levels in enumerate(threads.map(read, index.tolist())):
                found[place] = levels
        return found

    def _levels(self, name: str, picture: Any, is_colour: bool) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            made = picture.convert("RGB" if is_colour else "L")
        except OSError as error:  # cut short, which its head does not tell
            raise _unreadable(name, error) from error
        if self._size is not None and made.size != (self._size, self._size):
            made = ImageOps.fit(made, (self._size, self._size), Image.Resampling.BICUBIC)
        return np.asarray(made)


def folder_set(path: Path, flag: str = "--dataset_name") -> PictureSet:
    """Every picture under a folder; the folders they lie in are their labels, where there are several."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{flag} {path}: no pictures ({', '.join(sorted(PICTURES))}) in this folder")
    folders = [file.parent for file in files]
    kinds = sorted(set(folders))
    number = {folder: i for i, folder in enumerate(kinds)}
    made = picture_files(files)
    made.labels = np.array([number[folder] for folder in folders]) if len(kinds) > 1 else None
    return made


def picture_files(files: Sequence[Path]) -> PictureSet:
    """These pictures, without labels."""
    names = [str(file) for file in files]
    told = hashlib.sha256()
    for file in files:
        status = file.stat()
        told.update(f"{file.parent.name}/{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return PictureSet(names, _Files(names), None, told.hexdigest())


class _Files:
    """number -> the picture in that file; a class, so that workers can be sent it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __call__(self, number: int) -> Any:
        from PIL import Image

        try:
            return Image.open(self._names[number])
        except OSError as error:
            raise _unreadable(self._names[number], error) from error


class _Column:
    """number -> the picture in that row of a data set."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows, self._name = rows, name

    def __call__(self, number: int) -> Any:
        return self._rows[number][self._name]


def hub_set(name: str, config: str | None, split_name: str, built_in: Iterable[str]) -> PictureSet:
    """A data set of the `datasets` library by name: its first column of images, and of class labels."""
    known = ", ".join(built_in)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--dataset_name {name!r} is no built-in ({known}), file or folder; "
            "to load it by name install the datasets library: pip install datasets"
        ) from error
    try:
        rows: Any = datasets.load_dataset(name, config, split=split_name)
    except Exception as error:  # the library raises a dozen kinds; all of them mean the name cannot be had
        raise ValueError(
            f"--dataset_name {name!r} is no built-in ({known}), file or folder, "
            f"and datasets cannot load it: {str(error).splitlines()[0]}"
        ) from error
    column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"--dataset_name {name!r}: no column of images among {list(rows.features)}")
    label = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    labels = None if label is None else np.asarray(rows[label])
    told = hashlib.sha256(f"{name} {config} {split_name} {len(rows)} {rows._fingerprint}".encode()).hexdigest()
    names = [f"{name}, row {i}" for i in range(len(rows))]
    return PictureSet(names, _Column(rows, column), labels, told)


def _check_depth(name: str, picture: Any) -> None:
    if picture.mode in _DEEP:
        raise ValueError(
            f"{name}: its pixels have more than 8 bits (mode {picture.mode}), levels up to "
            f"{picture.getextrema()[1]}; save it with 8 bits, or give the levels as an .npz"
        )


def _unreadable(name: str, error: OSError) -> ValueError:
    return ValueError(f"{name}: not a readable picture ({error}); remove it or save it again")
