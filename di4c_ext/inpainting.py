"""What samples of image tokens begin from: codes or pictures, and a mask that says which of them are drawn anew.

    python -m di4c_ext.sample --model runs/tokens --inpaint photo.png --mask hole.png --num_steps 4
    python -m di4c_ext.sample --model runs/tokens --inpaint samples.npz --mask hole.npy

Codes come as an .npz with an array `codes`, as `sample` itself writes them, or as an .npy, (N, D) or (N, height,
width) of the grid; a position that holds the mask's number is drawn. Pictures are a file, a folder, or the array
`images` of an .npz in 256 levels, and become codes by the VQ model, so that what is kept comes back as these say it.
The mask is an array or a picture, of the grid or of the pixels, one for all images or one each: not 0, or white, where
codes are drawn; so is a code of which a single pixel is to be. Fewer images than samples take turns.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from di4c_ext import data
from di4c_ext.codes import as_input, check_images
from di4c_ext.models import TokenConfig, VQModel
from di4c_ext.picture_sets import PICTURES, PictureSet, folder_set, picture_files

_ARRAYS = (".npz", ".npy")


def start_of(file: str, mask: str | None, config: TokenConfig, vq: VQModel, num_samples: int) -> Tensor:
    """(N, D) int64 codes to begin from, `config.mask_id` where one is to be drawn.

    Raises ValueError naming the flag and the file for what cannot be read, codes outside the code-book, a grid or a
    size that is not the model's, and where nothing is left to draw.
    """
    codes = _codes(Path(file), config, vq)
    if mask is not None:
        drawn = _drawn(Path(mask), vq)
        if len(drawn) not in (1, len(codes)):
            raise ValueError(f"--mask {mask}: holds {len(drawn)} masks for {len(codes)} images; give one, or one each")
        codes = torch.where(drawn, config.mask_id, codes)
    if not bool((codes == config.mask_id).any(1).all()):
        which = int((codes != config.mask_id).all(1).nonzero()[0])
        raise ValueError(
            f"--inpaint {file}: nothing of image {which} is left to draw; name by --mask what is, "
            f"or give codes that are {config.mask_id} there"
        )
    return codes[torch.arange(num_samples) % len(codes)]


def _codes(file: Path, config: TokenConfig, vq: VQModel) -> Tensor:
    """(M, D) int64."""
    if file.suffix not in _ARRAYS:
        height, width = vq.config.image_size
        pictures = folder_set(file, "--inpaint") if file.is_dir() else picture_files([_there(file, "--inpaint")])
        return _encoded(_pixels(pictures, height if height == width else None, vq.config.num_channels == 1), file, vq)
    held = _read(file, "--inpaint")
    if isinstance(held, dict) and "codes" not in held:
        if "images" not in held:
            raise ValueError(f"--inpaint {file}: holds {sorted(held)}, no array named 'codes' or 'images'")
        return _encoded(held["images"], file, vq)
    codes = held["codes"] if isinstance(held, dict) else held
    if codes.dtype.kind not in "iu":
        raise ValueError(f"--inpaint {file}: codes must be integers, got {codes.dtype}")
    if codes.shape[1:] not in ((config.length,), tuple(config.grid)) or len(codes) < 1:
        grid = " x ".join(map(str, config.grid))
        raise ValueError(
            f"--inpaint {file}: codes must be (N, {config.length}) or (N, {', '.join(map(str, config.grid))}), the "
            f"model's grid is {grid}, got {codes.shape}"
        )
    made = torch.from_numpy(codes.astype(np.int64)).flatten(1)
    try:
        config.check_codes(made, "codes")
    except ValueError as error:
        raise ValueError(f"--inpaint {file}: {str(error).split(': ', 1)[1]}") from error
    return made


def _encoded(pixels: np.ndarray, file: Path, vq: VQModel) -> Tensor:
    """Levels (M, height, width[, channels]) as codes."""
    if pixels.dtype.kind not in "iu" or pixels.ndim not in (3, 4) or not len(pixels):
        raise ValueError(f"--inpaint {file}: images must be integers (N, height, width[, 3]), got {_kind(pixels)}")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(f"--inpaint {file}: images must have the levels 0..255, got {pixels.min()}..{pixels.max()}")
    images = data.ImageTokens(
        name=file.name,
        tokens=torch.from_numpy(pixels.astype(np.uint8)).flatten(1),
        example=torch.arange(len(pixels)),
        labels=None,
        shape=pixels.shape[1:],
        num_states=256,
    )
    check_images(images, vq.config, f"--inpaint {file}")
    return vq.encode(as_input(images.tokens[:], images), 64).cpu()


def _pixels(pictures: PictureSet, size: int | None, is_grey: bool) -> np.ndarray:
    found = pictures.look(size, is_grey)
    return pictures.pixels(np.arange(len(pictures))) if found is None else found


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def _drawn(file: Path, vq: VQModel) -> Tensor:
    """(M, D) bool of the grid."""
    (height, width), (rows, columns) = vq.config.image_size, vq.config.grid
    if file.suffix in _ARRAYS:
        held = _read(file, "--mask")
        if isinstance(held, dict) and "mask" not in held:
            raise ValueError(f"--mask {file}: holds {sorted(held)}, no array named 'mask'")
        mask = held["mask"] if isinstance(held, dict) else held
    else:
        mask = _pixels(picture_files([_there(file, "--mask")]), None, True) >= 128
    shape = mask.shape[-2:]
    if mask.ndim not in (2, 3) or shape not in ((rows, columns), (height, width)):
        raise ValueError(
            f"--mask {file}: must be {rows} x {columns}, the grid of codes, or {height} x {width}, the pixels, "
            f"got {_kind(mask)}"
        )
    cells = mask.reshape(-1, rows, shape[0] // rows, columns, shape[1] // columns) != 0
    return torch.from_numpy(cells.any((2, 4))).flatten(1)


def _read(file: Path, flag: str) -> np.ndarray | dict[str, Any]:
    try:
        held = np.load(_there(file, flag), allow_pickle=False)
        return held if isinstance(held, np.ndarray) else dict(held)
    except (OSError, EOFError, zipfile.BadZipFile, ValueError) as error:
        if str(error).startswith(flag):
            raise
        raise ValueError(f"{flag} {file}: not a readable array file ({error})") from error


def _there(file: Path, flag: str) -> Path:
    if not file.is_file():
        kinds = ", ".join(sorted((*_ARRAYS, *PICTURES)))
        raise ValueError(f"{flag} {file}: no such file; give one of {kinds}")
    return file
