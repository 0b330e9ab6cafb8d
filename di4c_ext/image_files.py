"""Images as they lie on disk, read as uint8 arrays (N, height, width[, 3]) and their labels.

Folders of pictures and data sets of the `datasets` library, CIFAR-10 in its python files, and Fashion-MNIST as Debian
packages it.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from di4c_ext import safe_pickle

Images = tuple[np.ndarray, np.ndarray | None]

PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SPLITS = {"train": "train", "test": "t10k", "t10k": "t10k"}  # -> how its files begin
CIFAR10_SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_GREY = {"1", "L", "LA"}
_DEEP = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # pixels of more than 8 bits


def read_folder(path: Path, size: int | None, grayscale: bool | None) -> Images:
    """Every picture under a folder; the folders they lie in are their labels, where there are several."""
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"--dataset_name {path}: no pictures ({', '.join(sorted(PICTURES))}) in this folder")

    def opened() -> Iterable[tuple[str, Any]]:
        for file in files:
            try:
                with Image.open(file) as picture:
                    picture.load()
                    yield str(file), picture
            except OSError as error:
                raise ValueError(f"{file}: not a readable picture ({error}); remove it or save it again") from error

    images = stacked(opened(), size, grayscale)
    folders = [file.parent for file in files]
    names = sorted(set(folders))
    number = {folder: i for i, folder in enumerate(names)}
    return images, np.array([number[folder] for folder in folders]) if len(names) > 1 else None


def read_hub(
    name: str, config: str | None, split_name: str, size: int | None, grayscale: bool | None, built_in: Iterable[str]
) -> Images:
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
        rows = datasets.load_dataset(name, config, split=split_name)
    except Exception as error:  # the library raises a dozen kinds; all of them mean the name cannot be had
        raise ValueError(
            f"--dataset_name {name!r} is no built-in ({known}), file or folder, "
            f"and datasets cannot load it: {str(error).splitlines()[0]}"
        ) from error
    column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"--dataset_name {name!r}: no column of images among {list(rows.features)}")
    images = stacked(((f"{name}, row {i}", row[column]) for i, row in enumerate(rows)), size, grayscale)
    label = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    return images, None if label is None else np.asarray(rows[label])


def stacked(pictures: Iterable[tuple[str, Any]], size: int | None, grayscale: bool | None) -> np.ndarray:
    """Named PIL pictures -> uint8 (N, height, width[, 3]), N >= 1.

    size: of the square they are resized to; None keeps their own, which must then be one. grayscale: None makes grey
    images where every picture is grey and colour ones otherwise. Raises ValueError for pictures of two sizes, naming
    both, and for pixels of more than 8 bits.
    """
    found: list[np.ndarray] = []
    first = ""
    for name, picture in pictures:
        if picture.mode in _DEEP:
            raise ValueError(
                f"{name}: its pixels have more than 8 bits (mode {picture.mode}), levels up to "
                f"{picture.getextrema()[1]}; save it with 8 bits, or give the levels as an .npz"
            )
        colour = not grayscale if grayscale is not None else picture.mode not in _GREY
        picture = picture.convert("RGB" if colour else "L")
        if size is not None and picture.size != (size, size):
            picture = picture.resize((size, size))
        pixels = np.asarray(picture)
        if found and pixels.shape[:2] != found[0].shape[:2]:
            sizes = [f"{height} x {width}" for height, width in (found[0].shape[:2], pixels.shape[:2])]
            raise ValueError(
                f"images of mixed sizes (height x width): {first} is {sizes[0]}, {name} is {sizes[1]}; "
                "give --image_size to resize them all to one square"
            )
        first = first or name
        found.append(pixels)
    if any(pixels.ndim == 3 for pixels in found):
        found = [pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, -1) for pixels in found]
    return np.stack(found)


def cifar10_folder(path: Path) -> Path | None:
    """The folder of CIFAR-10's python files, this one or the one they unpack to in it; None where there is none."""
    batches = [*CIFAR10_SPLITS["train"], *CIFAR10_SPLITS["test"]]
    for folder in (path, path / "cifar-10-batches-py"):
        if any((folder / name).is_file() for name in batches):
            return folder
    return None


def read_cifar10(folder: Path, split_name: str) -> Images:
    """(N, 32, 32, 3) and labels of `data_batch_1` to `data_batch_5` (train) or `test_batch` (test)."""
    images, labels = [], []
    for name in _files_of(folder, CIFAR10_SPLITS, split_name):
        batch = safe_pickle.load(folder / name)
        rows, given = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
            found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise ValueError(f"{folder / name}: no CIFAR-10 batch: `data` must be uint8 (N, 3072), got {found}")
        if not isinstance(given, list) or len(given) != len(rows) or set(given) - set(range(10)):
            raise ValueError(f"{folder / name}: no CIFAR-10 batch: `labels` must be {len(rows)} numbers in 0..9")
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += given
    return np.concatenate(images), np.array(labels)


def read_fashion_mnist(split_name: str) -> Images:
    """(N, 28, 28) and labels, 60,000 of them (train) or 10,000 (test), of the Debian package's files."""
    start = _files_of(FASHION_MNIST, {key: [name] for key, name in FASHION_MNIST_SPLITS.items()}, split_name)[0]
    files = [FASHION_MNIST / f"{start}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"fashion_mnist: no {file}; install Debian's package of it: apt-get install dataset-fashion-mnist "
                "(or name another folder of pictures, an .npz or a data set of the `datasets` library)"
            )
    images, labels = (read_idx(file) for file in files)
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{files[0]}: images {images.shape} and labels {labels.shape} do not belong together")
    return images, labels


def read_idx(file: Path) -> np.ndarray:
    """The bytes in a gzipped IDX file: two zeros, the type (8: bytes), the number of sizes, the sizes, the values."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a gzip file that can be read ({error}); install it again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{file}: no IDX file of bytes, it begins with {content[:4]!r}")
    begin = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, begin, 4))
    if len(content) != begin + math.prod(shape):
        raise ValueError(
            f"{file}: says its shape is {shape}, {math.prod(shape)} bytes, but {len(content) - begin} follow"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _files_of(folder: Path, splits: dict[str, list[str]], split_name: str) -> list[str]:
    if split_name not in splits:
        raise ValueError(f"--dataset_train_split {split_name!r}: {folder} has the splits {', '.join(splits)}")
    return splits[split_name]
