"""Images as tokens: the built-in digits, Fashion-MNIST or CIFAR-10, or a user's own arrays, pictures, `datasets` name.

Every source ends as `ImageTokens`: N examples of D = height * width (* channels) positions, each a state in 0..S-1.
An example keeps its number in the whole data set through every split and shuffle, because the noise of a training
step is a function of (seed, example, step), see `di4c_ext.random`.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from di4c_ext import image_files, lazy_rows, picture_sets, random
from di4c_ext.examples import Examples
from di4c_ext.lazy_rows import LazyRows, Rows, taken

ASSETS = Path(__file__).parent / "assets"
BUILT_IN = {"digits": 17, "fashion_mnist": None}  # name -> number of states; None: as many as are asked for
SPLIT_SEED = 0x5EED  # the split does not move with --seed: a held-out image stays held out

Layout = Literal["HWC", "CHW"]


@dataclass(frozen=True)
class ImageTokens(Examples):
    """N images as tokens.

    tokens (N, D), uint8 where the states fit and int32 otherwise, read as they are asked for where all of them would
    take too much memory (`lazy_rows`); example (N,) int64, the number of each image in
    the whole data set; labels (N,) int64 or None; shape (height, width) or (height, width, channels).
    layout: the order of the D positions of an image with channels, "HWC" a pixel's channels together, "CHW" one channel
    after the other, as the pixel networks have it; grey images have one order. horizontal_flip: whether training
    mirrors a random half of the images (`augment.flip_images`); tokens are as they came.
    """

    name: str
    tokens: Rows
    example: Tensor
    labels: Tensor | None
    shape: tuple[int, ...]
    num_states: int
    layout: Layout = "HWC"
    horizontal_flip: bool = False

    def subset(self, index: Tensor) -> ImageTokens:
        """The images named by `index` (int64), with their example numbers and labels."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, tokens=taken(self.tokens, index), example=self.example[index], labels=labels)

    def images(self) -> Tensor:
        """(N, height, width[, channels]), whatever the layout."""
        return as_images(self.tokens[:], self.shape, self.layout)

    def fingerprint(self) -> str:
        """Hex digest of everything a model trained on this data depends on."""
        told = f"{self.num_states} {self.shape} {self.tokens.dtype}"
        if self.layout != "HWC" and len(self.shape) == 3:
            told += f" {self.layout}"
        if self.horizontal_flip:
            told += " flipped"
        digest = hashlib.sha256(told.encode())
        tokens = self.tokens
        digest.update(tokens.digest() if isinstance(tokens, LazyRows) else tokens.contiguous().numpy().tobytes())
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
    grayscale: bool | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    layout: Layout = "HWC",
    horizontal_flip: bool = False,
) -> ImageTokens:
    """Loads images by the name of a built-in, a file, a folder, or a data set of the `datasets` library.

    digits         8x8, 17 states, in this package
    fashion_mnist  28x28, from the files of Debian's package dataset-fashion-mnist
    .npz, .npy     (N, height, width[, channels]) of integers in 0..num_states-1; an .npz names them `images` and,
                   where it has them, `labels`
    a folder       CIFAR-10's python files where they lie in it; else every picture in it, labelled by its folder
    another name   what `datasets.load_dataset` knows by it

    Images have 256 levels, cut into num_states where that is given. Pictures keep their size, which must be one, or
    are made squares of image_size: the shorter side becomes that, the middle is cut out. They are grey where all of
    them are, unless grayscale says. Where they do not fit into memory they are read as they are asked for
    (`picture_sets`). dataset_split: "train" or "test" for CIFAR-10 and Fashion-MNIST. layout, horizontal_flip: see
    `ImageTokens`.

    Raises ValueError where the source cannot be read so, or a value lies outside its states.
    """
    path = Path(dataset_name).expanduser()
    make = partial(from_arrays, layout=layout, horizontal_flip=horizontal_flip)
    if dataset_name in BUILT_IN and (states := BUILT_IN[dataset_name]) is not None:
        if num_states not in (None, states):
            raise ValueError(f"--num_states {num_states}: {dataset_name} has {states} states; leave the flag out")
        return _from_array_file(ASSETS / f"{dataset_name}.npz", dataset_name, states, make)
    if num_states is not None and num_states < 1:
        raise ValueError(f"--num_states {num_states}: must be at least 1")
    if path.suffix in (".npz", ".npy"):
        if num_states is None:
            raise ValueError(f"--num_states is missing: say how many states the integers of {dataset_name!r} have")
        if not path.is_file():
            raise ValueError(f"--dataset_name {dataset_name!r}: no such file")
        return _from_array_file(path, path.stem, num_states, make)
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image_size {image_size}: must be at least 1")
    name, cifar10 = dataset_name, image_files.cifar10_folder(path)
    levels = 256 if num_states is None else num_states
    if dataset_name in BUILT_IN or cifar10 is not None:
        if cifar10 is None:
            images, labels = image_files.read_fashion_mnist(dataset_split)
        else:
            name, (images, labels) = "cifar10", image_files.read_cifar10(cifar10, dataset_split)
        _check_kept(name, images, image_size, grayscale)
        return make(quantise(images, levels), labels, num_states=levels, name=name)
    if path.is_dir():
        name, pictures = path.name, picture_sets.folder_set(path)
    else:
        pictures = picture_sets.hub_set(name, dataset_config, dataset_split, BUILT_IN)
    held = pictures.look(image_size, grayscale)
    if held is not None:
        return make(quantise(held, levels), pictures.labels, num_states=levels, name=name)
    # Too many for memory: two of them go the way of all, and the rows become the pictures themselves.
    first = make(quantise(pictures.pixels(np.arange(min(2, len(pictures)))), levels), num_states=levels, name=name)
    return replace(
        first,
        tokens=lazy_rows.LazyRows(_Levels(pictures, levels, layout)),
        example=torch.arange(len(pictures)),
        labels=None if pictures.labels is None else torch.from_numpy(pictures.labels.astype(np.int64)),
    )


class _Levels:
    """Pictures as rows of levels, `lazy_rows.Source`."""

    dtype = np.dtype(np.uint8)

    def __init__(self, pictures: picture_sets.PictureSet, num_states: int, layout: Layout) -> None:
        self._pictures, self._num_states, self._layout = pictures, num_states, layout
        self.shape = len(pictures), math.prod(pictures.form)
        self.fingerprint: str | None = f"{pictures.fingerprint} {pictures.form}"

    def read(self, index: np.ndarray) -> np.ndarray:
        return _positions(quantise(self._pictures.pixels(index), self._num_states), self._layout)


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    num_states: int,
    name: str = "images",
    layout: Layout = "HWC",
    horizontal_flip: bool = False,
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
    if layout not in get_args(Layout):
        raise ValueError(f"{name}: layout must be one of {get_args(Layout)}, got {layout!r}")
    dtype = np.uint8 if num_states <= 256 else np.int32
    return ImageTokens(
        name=name,
        tokens=torch.from_numpy(_positions(images, layout).astype(dtype)),
        example=torch.arange(len(images)),
        labels=None if labels is None else torch.from_numpy(np.asarray(labels).astype(np.int64)),
        shape=tuple(images.shape[1:]),
        num_states=num_states,
        layout=layout,
        horizontal_flip=horizontal_flip,
    )


def _positions(images: np.ndarray, layout: Layout) -> np.ndarray:
    """(N, height, width[, channels]) -> (N, D) in the order of the layout."""
    ordered = np.moveaxis(images, -1, 1) if layout == "CHW" and images.ndim == 4 else images
    return ordered.reshape(len(images), -1)


def split(data: ImageTokens, heldout_fraction: float) -> tuple[ImageTokens, ImageTokens]:
    """(training, held-out) images: the same cut on every machine and for every seed; each side has at least one."""
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"--heldout_fraction {heldout_fraction}: must lie between 0 and 1, e.g. 0.2")
    order = random.keys(SPLIT_SEED, len(data)).argsort()
    heldout = min(max(round(heldout_fraction * len(data)), 1), len(data) - 1)
    return data.subset(order[heldout:].sort().values), data.subset(order[:heldout].sort().values)


def spread(images: ImageTokens, most: int) -> ImageTokens:
    """At most so many of the images, evenly over the set."""
    if len(images) <= most:
        return images
    return images.subset(torch.arange(most) * len(images) // most)


def quantise(images: np.ndarray, num_states: int) -> np.ndarray:
    """uint8 pictures -> uint8 levels 0..num_states-1, each level an equal share of the 256."""
    if num_states > 256:
        raise ValueError(f"--num_states {num_states}: pictures have 256 levels; give at most 256, or leave it out")
    return (np.arange(256) * num_states // 256).astype(np.uint8)[images]


def as_images(tokens: Tensor, shape: tuple[int, ...], layout: Layout = "HWC") -> Tensor:
    """tokens (N, D) -> (N, height, width[, channels]), whatever the order of their positions."""
    if tokens.ndim != 2 or tokens.shape[1] != math.prod(shape):
        raise ValueError(
            f"as_images: tokens must be (N, {math.prod(shape)}) for images {shape}, got {tuple(tokens.shape)}"
        )
    if layout == "HWC" or len(shape) == 2:
        return tokens.reshape(len(tokens), *shape)
    height, width, channels = shape
    return tokens.reshape(len(tokens), channels, height, width).permute(0, 2, 3, 1)


def to_pixels(tokens: Tensor, num_states: int) -> np.ndarray:
    """States 0..S-1 -> uint8 0..255, black to white; up to 256 states stay distinct."""
    scale = 255 / max(num_states - 1, 1)
    return (tokens.double() * scale).round().clamp(0, 255).to(torch.uint8).numpy()


def _check_kept(name: str, images: np.ndarray, image_size: int | None, grayscale: bool | None) -> None:
    """ValueError for flags that ask of a built-in what it is not."""
    height, width = images.shape[1:3]
    if image_size not in (None, height):
        raise ValueError(f"--image_size {image_size}: {name} is {height} x {width}; leave the flag out")
    is_grey = images.ndim == 3
    if grayscale not in (None, is_grey):
        raise ValueError(f"--grayscale {grayscale}: {name} is {'grey' if is_grey else 'RGB'}; leave the flag out")


def _from_array_file(path: Path, name: str, num_states: int, make: Callable[..., ImageTokens]) -> ImageTokens:
    try:
        file = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a readable array file ({error}); save integers with numpy.savez_compressed"
        ) from error
    if isinstance(file, np.ndarray):
        return make(file, num_states=num_states, name=name)
    with file:
        if "images" not in file:
            raise ValueError(f"{path}: holds {sorted(file)}, no array named 'images'; save with images=...")
        return make(file["images"], file.get("labels"), num_states=num_states, name=name)
