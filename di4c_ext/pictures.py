"""Grids of sampled images as PNG."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from torch import Tensor

from di4c_ext import checkpoints
from di4c_ext.data import to_pixels

GAP = 1  # pixels between two images, before scaling
FRAME = 48  # the grey between them


def grid(tokens: Tensor, shape: tuple[int, ...], num_states: int, columns: int = 8) -> np.ndarray:
    """tokens (N, D) -> uint8 (height, width[, 3]): the images row by row, unscaled, on dark grey."""
    if columns < 1 or len(tokens) < 1:
        raise ValueError(f"grid: {len(tokens)} images in {columns} columns; both must be at least 1")
    images = to_pixels(tokens, num_states).reshape(len(tokens), *shape)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    height, width = shape[0] + GAP, shape[1] + GAP
    canvas = np.full((rows * height + GAP, columns * width + GAP, *shape[2:]), FRAME, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + GAP, i % columns * width + GAP
        canvas[top : top + shape[0], left : left + shape[1]] = image
    return canvas


def png(pixels: np.ndarray, scale: int = 1) -> bytes:
    """The pixels as a PNG file, each drawn scale x scale."""
    from PIL import Image

    enlarged = pixels.repeat(scale, 0).repeat(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(enlarged).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save(pixels: np.ndarray, file: Path, scale: int = 6) -> None:
    """Writes a PNG, whole or not at all."""
    with checkpoints.whole_file(file) as staging:
        staging.write_bytes(png(pixels, scale))


def data_url(pixels: np.ndarray) -> str:
    """The unscaled PNG as the src of an <img>; style it with image-rendering: pixelated."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
