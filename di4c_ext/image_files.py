"""Data sets in files of their own, read as uint8 arrays (N, height, width[, 3]) and their labels.

CIFAR-10 in its python files, and Fashion-MNIST as Debian packages it. Pictures: `picture_sets`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from di4c_ext import safe_pickle

Images = tuple[np.ndarray, np.ndarray | None]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_SPLITS = {"train": "train", "test": "t10k", "t10k": "t10k"}  # -> how its files begin
CIFAR10_SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


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
