"""Images as codes of a VQ model: made once, kept memory-mapped in the cache, and turned back into images.

vq = open_vq("runs/vq")
codes = codes_of(images, vq, checkpoints.cache_folder() / "codes")     # ImageCodes (N, D), labels and all
levels = Decoder(vq)(tokens)                                          # sampled codes (N, D) -> levels of pixels
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from di4c_ext import checkpoints, lazy_rows
from di4c_ext.augment import mirrored
from di4c_ext.data import ImageTokens
from di4c_ext.lazy_rows import LazyRows, MappedCodes, Rows, taken
from di4c_ext.models import VQConfig, VQModel

VQ_FOLDER = "vq"  # of a run's folder: the model whose codes it was trained on
CODES, STATE, LOCK = "codes.npy", "state.json", "lock"
LEVELS = 256  # of a decoded picture where nobody says how many
CHUNK, CHUNK_BYTES = 2048, 64 << 20  # images between two notes of how far it has come, and their size as floats


@dataclass(frozen=True)
class ImageCodes(ImageTokens):
    """N images as codes: `ImageTokens` whose shape is the grid of codes and whose states are those of the code-book.

    codebook: `VQModel.fingerprint`. num_classes: of the labels, which are told to the network; 0 where there are none.
    mirrored (N, D): the codes of the mirror images, where training draws these too; they are no mirrored codes, for
    what an encoder says of an image is not what it says of its mirror image.
    """

    codebook: str = ""
    num_classes: int = 0
    mirrored: Rows | None = None

    def subset(self, index: Tensor) -> ImageCodes:
        cut: Any = super().subset(index)
        return cut if self.mirrored is None else replace(cut, mirrored=taken(self.mirrored, index))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | self._beside(torch.tensor(index))

    def __getitems__(self, index: Sequence[int]) -> dict[str, Tensor]:
        return super().__getitems__(index) | self._beside(torch.as_tensor(index, dtype=torch.int64))

    def _beside(self, index: Tensor) -> dict[str, Tensor]:
        # Not "labels": to transformers' Trainer these are what a language model is to predict, and count as tokens.
        told = {} if self.labels is None else {"label": self.labels[index]}
        return told if self.mirrored is None else told | {"mirrored": self.mirrored[index].long()}

    def fingerprint(self) -> str:
        told = f"{super().fingerprint()} {self.codebook} {self.num_classes}"
        if self.mirrored is not None:
            told += f" {replace(self, tokens=self.mirrored, mirrored=None).fingerprint()}"
        return hashlib.sha256(told.encode()).hexdigest()


def open_vq(folder: str | Path) -> VQModel:
    """A saved VQ model in evaluation mode, on the CPU; ValueError naming the folder and what is wrong with it."""
    folder = Path(folder)
    checkpoints.check_model(folder)
    model: VQModel = VQModel.from_pretrained(folder)
    return model.eval().requires_grad_(False)


def vq_beside(folder: str | Path, named: str | Path | None = None) -> VQModel:
    """The VQ model of the run that `folder`, a student's or its teacher's, belongs to; or the one that is named."""
    if named is not None:
        return open_vq(named)
    folder = Path(folder)
    for place in (folder / VQ_FOLDER, folder.parent / VQ_FOLDER):
        if place.is_dir():
            return open_vq(place)
    raise ValueError(
        f"{folder}: samples codes, and no folder {VQ_FOLDER!r} lies in it; name its VQ model by --vq_model"
    )


def image_shape_of(config: VQConfig) -> tuple[int, ...]:
    """(height, width) of a grey image, (height, width, channels) of others: the shape that `ImageTokens` has."""
    channels, height, width = config.image_shape
    return (height, width) if channels == 1 else (height, width, channels)


def check_images(images: ImageTokens, config: VQConfig, where: str) -> None:
    """Raises ValueError naming both sizes unless the images are of those that the VQ model takes."""
    own = image_shape_of(config)
    if tuple(images.shape) != own:
        told = [" x ".join(map(str, shape)) for shape in (own, images.shape)]
        raise ValueError(
            f"{where}: takes images of {told[0]}, those of {images.name!r} are {told[1]}; "
            "give the VQ model of this data, or data of its size (--image_size, --grayscale)"
        )


def as_input(levels: Tensor, images: ImageTokens) -> Tensor:
    """Rows of `images.tokens` (n, D) -> what a VQ model takes: (n, C, height, width) float32 in [-1, 1]."""
    height, width, channels = (*images.shape, 1)[:3]
    scaled = levels.float() * (2 / max(images.num_states - 1, 1)) - 1
    if images.layout == "CHW":
        return scaled.view(-1, channels, height, width)
    return scaled.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()


class Decoder:
    """codes (N, D) -> levels (N, pixels) of 0..num_states - 1, positions in the order of HWC, on the CPU."""

    def __init__(self, vq: VQModel, num_states: int = LEVELS, batch_size: int = 64) -> None:
        self.vq = vq
        self.shape = image_shape_of(vq.config)
        self.num_states = num_states
        self.batch_size = batch_size

    def __call__(self, codes: Tensor) -> Tensor:
        """Raises ValueError for codes outside the code-book, or not as many as the grid has."""
        images = self.vq.decode(codes, self.batch_size).float().cpu()
        levels = ((images + 1) * ((self.num_states - 1) / 2)).round().clamp(0, self.num_states - 1)
        return levels.permute(0, 2, 3, 1).flatten(1).to(torch.uint8 if self.num_states <= 256 else torch.int32)


def codes_of(images: ImageTokens, vq: VQModel, cache: Path, batch_size: int = 64) -> ImageCodes:
    """The images as codes, from `cache` where they are there, else made now and kept.

    The cache has a folder for each (images, VQ model). Making them reads some images at a time, notes how far it has
    come, and goes on from there after a stop; of several processes one makes them, the others wait. Tokens are mapped:
    pages are read as they are asked for. Of images that training mirrors the mirror images' codes are made too.

    Raises ValueError for images that the VQ model does not take, and labels that are no classes.
    """
    check_images(images, vq.config, "--vq_model")
    if images.labels is not None and int(images.labels.min()) < 0:
        raise ValueError(f"{images.name}: label {int(images.labels.min())}: classes are numbered from 0")
    folder = cache / f"codes-{_key(images, vq)}"
    if not _made(folder, images, vq):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _make(folder, images, vq, batch_size)
    return ImageCodes(
        name=images.name,
        tokens=_rows(folder, slice(0, len(images))),
        example=images.example,
        labels=images.labels,
        shape=tuple(vq.config.grid),
        num_states=vq.config.num_codes,
        codebook=vq.fingerprint(),
        num_classes=0 if images.labels is None else int(images.labels.max()) + 1,
        mirrored=_rows(folder, slice(len(images), None)) if images.horizontal_flip else None,
    )


def classes_like(images: ImageTokens, n: int) -> Tensor | None:
    """(n,) labels in the proportions of the images, one class after the other in turn; None where there are none."""
    if images.labels is None:
        return None
    ordered = images.labels.sort().values
    chosen = ordered[((torch.arange(n) + 0.5) / n * len(ordered)).long()]
    starts = torch.searchsorted(chosen, chosen)
    rank = torch.arange(n) - starts  # which of its class each one is
    return chosen[torch.argsort(rank * (int(ordered[-1]) + 1) + chosen)]


def usage(codes: Rows, num_codes: int) -> dict[str, float]:
    """How a code-book is used by codes (N, D): codes that occur at all, and exp of their entropy."""
    counted = torch.zeros(num_codes, dtype=torch.int64)
    for some in codes.split(lazy_rows.AT_ONCE):
        counted += some.flatten().long().cpu().bincount(minlength=num_codes)
    share = counted / max(int(counted.sum()), 1)
    return {"codes_used": float((share > 0).sum()), "perplexity": float(torch.special.entr(share).sum().exp())}


def _key(images: ImageTokens, vq: VQModel) -> str:
    """Of the images, the code-book, and the encoder, which chooses among its codes."""
    digest = hashlib.sha256(f"{images.fingerprint()} {vq.fingerprint()} ".encode())
    for part in (vq.encoder, vq.quant_conv):
        for weight in part.state_dict().values():
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _state(folder: Path) -> dict[str, Any]:
    try:
        state: Any = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _dtype(vq: VQModel) -> type:
    """The narrowest that holds a code."""
    kinds = (np.uint8, np.int16, np.int32)
    return next(kind for kind in kinds if vq.config.num_codes - 1 <= np.iinfo(kind).max)


def _rows(folder: Path, rows: slice) -> Rows:
    """Some rows of the file of codes, mapped; where they are many, without a page of those that nobody asks for."""
    mapped: np.ndarray = np.load(folder / CODES, mmap_mode="c")[rows]
    if mapped.nbytes <= lazy_rows.IN_MEMORY:
        return torch.from_numpy(mapped)
    return LazyRows(MappedCodes(folder / CODES, rows))


def _mapped(folder: Path, images: ImageTokens, vq: VQModel) -> np.ndarray | None:
    """The file of codes, open to be written, where it is one of this shape."""
    try:
        np.load(folder / CODES, mmap_mode="r")  # which sees a lost end; "r+" would put zeros there
        codes: np.ndarray = np.load(folder / CODES, mmap_mode="r+")
    except (OSError, ValueError, EOFError):  # none, or damaged
        return None
    fits = codes.shape == (_num_rows(images), vq.config.length) and codes.dtype == _dtype(vq)
    return codes if fits else None


def _num_rows(images: ImageTokens) -> int:
    """Of the file: the images, and after them their mirror images."""
    return len(images) * (1 + images.horizontal_flip)


def _made(folder: Path, images: ImageTokens, vq: VQModel) -> bool:
    return _state(folder).get("done") == len(images) and _mapped(folder, images, vq) is not None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the system has locks; they end with the process that has them, however it ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / LOCK, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(folder: Path, images: ImageTokens, vq: VQModel, batch_size: int) -> None:
    """Writes the codes from where an earlier attempt stopped."""
    done, codes = int(_state(folder).get("done", 0)), _mapped(folder, images, vq)
    if codes is None:
        done = 0
        _note(folder, done, images)  # before a file of nothing lies there
        shape = (_num_rows(images), vq.config.length)
        codes = np.lib.format.open_memmap(folder / CODES, mode="w+", dtype=_dtype(vq), shape=shape)
    step = max(1, min(CHUNK, CHUNK_BYTES // (4 * images.length)))
    with tqdm(total=len(images), initial=done, desc="codes", unit="image", delay=5, mininterval=1) as bar:
        for start in range(done, len(images), step):
            end = min(start + step, len(images))
            levels = images.tokens[start:end]
            codes[start:end] = _encoded(levels, images, vq, batch_size, codes.dtype)
            if images.horizontal_flip:
                flipped = mirrored(levels, images.shape, images.layout)
                own = slice(len(images) + start, len(images) + end)
                codes[own] = _encoded(flipped, images, vq, batch_size, codes.dtype)
            codes.flush()  # type: ignore[attr-defined]  # a memmap: on disk before it is said to be there
            _note(folder, end, images)
            bar.update(end - start)


def _note(folder: Path, done: int, images: ImageTokens) -> None:
    checkpoints.write_text(folder / STATE, json.dumps({"done": done, "images": len(images)}) + "\n")


def _encoded(levels: Tensor, images: ImageTokens, vq: VQModel, batch_size: int, dtype: np.dtype[Any]) -> np.ndarray:
    return vq.encode(as_input(levels, images), batch_size).cpu().numpy().astype(dtype)
