"""Images as tokens: the built-in digits, or a user's own arrays, folder of pictures or `datasets` name.

Every source ends as `ImageTokens`: N examples of D = height * width (* channels) positions, each a state in 0..S-1.
An example keeps its number in the whole data set through every split and shuffle, because the noise of a training
step is a function of (seed, example, step), see `di4c_ext.random`.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from di4c_ext import random

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = {"digits": 17}  # name -> number of states
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
SPLIT_SEED = 0x5EED  # the split does not move with --seed: a held-out image stays held out


@dataclass(frozen=True)
class ImageTokens(Dataset[dict[str, Tensor]]):
    """N images as tokens.

    tokens (N, D), uint8 where the states fit and int32 otherwise; example (N,) int64, the number of each image in
    the whole data set; labels (N,) int64 or None; shape (height, width) or (height, width, channels).
    """

    name: str
    tokens: Tensor
    example: Tensor
    labels: Tensor | None
    shape: tuple[int, ...]
    num_states: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x_0": self.tokens[index].long(), "example": self.example[index]}

    def __getitems__(self, index: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch in two gathers; the data loader calls this instead of one `__getitem__` an image."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        return {"x_0": self.tokens[rows].long(), "example": self.example[rows]}

    @property
    def length(self) -> int:
        """D, positions per image."""
        return self.tokens.shape[1]

    def subset(self, index: Tensor) -> ImageTokens:
        """The images named by `index` (int64), with their example numbers and labels."""
        labels = None if self.labels is None else self.labels[index]
        return ImageTokens(self.name, self.tokens[index], self.example[index], labels, self.shape, self.num_states)

    def fingerprint(self) -> str:
        """Hex digest of everything a model trained on this data depends on."""
        digest = hashlib.sha256(f"{self.num_states} {self.shape} {self.tokens.dtype}".encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        digest.update(self.example.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def collate(batch: Any) -> Any:
    """`__getitems__` hands over a finished batch; a list of single examples is stacked."""
    if isinstance(batch, dict):
        return batch
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def load(
    dataset_name: str,
    *,
    num_states: int | None = None,
    image_size: int | None = None,
    grayscale: bool = True,
    dataset_config: str | None = None,
    dataset_split: str = "train",
) -> ImageTokens:
    """Loads `digits`, an .npz or .npy of integers, a folder of pictures, or a data set of the `datasets` library.

    Arrays are (N, height, width[, channels]) of integers in 0..num_states-1; an .npz names them `images` and, where
    it has them, `labels`. Pictures are resized to image_size and cut into num_states levels; the folders they lie
    in are their labels. Raises ValueError where the source cannot be read so, or a value lies outside its states.
    """
    path = Path(dataset_name).expanduser()
    if dataset_name in BUILT_IN:
        states = BUILT_IN[dataset_name]
        if num_states not in (None, states):
            raise ValueError(f"--num_states {num_states}: {dataset_name} has {states} states; leave the flag out")
        return _from_array_file(ASSETS / f"{dataset_name}.npz", dataset_name, states)
    if num_states is None:
        raise ValueError(f"--num_states is missing: say how many states (grey levels) {dataset_name!r} has, e.g. 16")
    if num_states < 1:
        raise ValueError(f"--num_states {num_states}: must be at least 1")
    if path.suffix in (".npz", ".npy"):
        if not path.is_file():
            raise ValueError(f"--dataset_name {dataset_name!r}: no such file")
        return _from_array_file(path, path.stem, num_states)
    size = _checked_size(image_size, dataset_name)
    if path.is_dir():
        images, labels = _read_folder(path, size, grayscale)
        name = path.name
    else:
        images, labels = _read_hub(dataset_name, dataset_config, dataset_split, size, grayscale)
        name = dataset_name
    return from_arrays(quantise(images, num_states), labels, num_states=num_states, name=name)


def from_arrays(
    images: np.ndarray, labels: np.ndarray | None = None, *, num_states: int, name: str = "images"
) -> ImageTokens:
    """ImageTokens of an integer array (N, height, width[, channels]); raises ValueError naming what does not fit."""
    if images.ndim not in (3, 4):
        raise ValueError(f"{name}: images have shape {images.shape}; give (N, height, width) or (N, height, width, 3)")
    if len(images) < 2:
        raise ValueError(f"{name}: {len(images)} image(s); at least 2 are needed to train and hold one out")
    if images.dtype.kind not in "iub":
        raise ValueError(f"{name}: images are {images.dtype}; give integers, each pixel's state in 0..{num_states - 1}")
    outside = (images < 0) | (images >= num_states)
    if outside.any():
        first = tuple(int(i) for i in np.argwhere(outside)[0])
        remedy = (
            f"give --num_states {int(images.max()) + 1} or more, or rescale the data"
            if images.min() >= 0
            else "shift the data so that it starts at 0"
        )
        raise ValueError(
            f"{name}: value {images[first]} at image {first[0]}, row {first[1]}, column {first[2]} is outside the "
            f"{num_states} states 0..{num_states - 1} ({int(outside.sum())} such values); {remedy}"
        )
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{name}: {len(labels)} labels for {len(images)} images; give one each, or no labels")
    dtype = np.uint8 if num_states <= 256 else np.int32
    return ImageTokens(
        name=name,
        tokens=torch.from_numpy(images.reshape(len(images), -1).astype(dtype)),
        example=torch.arange(len(images)),
        labels=None if labels is None else torch.from_numpy(np.asarray(labels).astype(np.int64)),
        shape=tuple(images.shape[1:]),
        num_states=num_states,
    )


def split(data: ImageTokens, heldout_fraction: float) -> tuple[ImageTokens, ImageTokens]:
    """(training, held-out) images: the same cut on every machine and for every seed; each side has at least one."""
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"--heldout_fraction {heldout_fraction}: must lie between 0 and 1, e.g. 0.2")
    order = random.keys(SPLIT_SEED, len(data)).argsort()
    heldout = min(max(round(heldout_fraction * len(data)), 1), len(data) - 1)
    return data.subset(order[heldout:].sort().values), data.subset(order[:heldout].sort().values)


def quantise(images: np.ndarray, num_states: int) -> np.ndarray:
    """uint8 pictures -> int64 levels 0..num_states-1, each level an equal share of the 256."""
    return images.astype(np.int64) * num_states // 256


def to_pixels(tokens: Tensor, num_states: int) -> np.ndarray:
    """States 0..S-1 -> uint8 0..255, black to white; up to 256 states stay distinct."""
    scale = 255 / max(num_states - 1, 1)
    return (tokens.double() * scale).round().clamp(0, 255).to(torch.uint8).numpy()


def _from_array_file(path: Path, name: str, num_states: int) -> ImageTokens:
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a readable array file ({error}); save integers with numpy.savez_compressed"
        ) from error
    if isinstance(file, np.ndarray):
        return from_arrays(file, num_states=num_states, name=name)
    with file:
        if "images" not in file:
            raise ValueError(f"{path}: holds {sorted(file)}, no array named 'images'; save with images=...")
        return from_arrays(file["images"], file.get("labels"), num_states=num_states, name=name)


def _checked_size(image_size: int | None, dataset_name: str) -> int:
    if image_size is None:
        raise ValueError(f"--image_size is missing: pictures of {dataset_name!r} are resized to a square, e.g. 8 or 28")
    if image_size < 1:
        raise ValueError(f"--image_size {image_size}: must be at least 1")
    return image_size


def _pixels(picture: Any, size: int, grayscale: bool) -> np.ndarray:
    picture = picture.convert("L" if grayscale else "RGB")
    return np.asarray(picture if picture.size == (size, size) else picture.resize((size, size)))


def _read_folder(path: Path, size: int, grayscale: bool) -> tuple[np.ndarray, np.ndarray | None]:
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"--dataset_name {path}: no pictures ({', '.join(sorted(PICTURES))}) in this folder")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pictures.append(_pixels(picture, size, grayscale))
        except OSError as error:
            raise ValueError(f"{file}: not a readable picture ({error}); remove it or save it again") from error
    folders = [file.parent for file in files]
    names = sorted(set(folders))
    labels = np.array([names.index(folder) for folder in folders]) if len(names) > 1 else None
    return np.stack(pictures), labels


def _read_hub(
    name: str, config: str | None, split_name: str, size: int, grayscale: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--dataset_name {name!r} is no built-in ({', '.join(BUILT_IN)}), file or folder; "
            "to load it by name install the datasets library: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(name, config, split=split_name)
    except Exception as error:  # the library raises a dozen kinds; all of them mean the name cannot be had
        raise ValueError(
            f"--dataset_name {name!r} is no built-in ({', '.join(BUILT_IN)}), file or folder, "
            f"and datasets cannot load it: {str(error).splitlines()[0]}"
        ) from error
    column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"--dataset_name {name!r}: no column of images among {list(rows.features)}")
    images = np.stack([_pixels(picture, size, grayscale) for picture in rows[column]])
    label = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    return images, None if label is None else np.asarray(rows[label])
