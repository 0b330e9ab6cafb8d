"""Grids of sampled images as PNG, plain or in rows with labels."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from di4c_ext import checkpoints
from di4c_ext.data import Layout, as_images, to_pixels

GAP = 1  # pixels between two images, before scaling
FRAME = 48  # the grey between them
INK = 235  # of labels
MARGIN = 8  # pixels about a label
MAX_CLASSES = 16  # columns of a grid of classes


def grid(
    tokens: Tensor, shape: tuple[int, ...], num_states: int, columns: int = 8, layout: Layout = "HWC"
) -> np.ndarray:
    """tokens (N, D) -> uint8 (height, width[, 3]): the images row by row, unscaled, on dark grey.

    shape: (height, width[, channels]) of an image, 1 or 3 channels; layout: the order of its positions (`ImageTokens`).
    """
    if columns < 1 or len(tokens) < 1:
        raise ValueError(f"grid: {len(tokens)} images in {columns} columns; both must be at least 1")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3)):
        raise ValueError(f"grid: shape must be (height, width), or with 1 or 3 channels after them, got {shape}")
    images = to_pixels(as_images(tokens.cpu(), shape, layout), num_states)
    if shape[2:] == (1,):
        images = images[..., 0]
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    height, width = shape[0] + GAP, shape[1] + GAP
    canvas = np.full((rows * height + GAP, columns * width + GAP, *images.shape[3:]), FRAME, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + GAP, i % columns * width + GAP
        canvas[top : top + shape[0], left : left + shape[1]] = image
    return canvas


def labelled_grid(
    rows: Sequence[tuple[str, Tensor]],
    shape: tuple[int, ...],
    num_states: int,
    *,
    columns: int = 8,
    layout: Layout = "HWC",
    scale: int = 2,
    text_size: int = 14,
) -> np.ndarray:
    """Rows of (label, tokens (N, D)) -> uint8 (height, width[, 3]): each row's images beside its label.

    A row of more images than `columns` goes on below itself. Images are drawn scale x scale, labels text_size pixels
    high; save it as it is (`save(..., scale=1)`).
    """
    if not rows:
        raise ValueError("labelled_grid: there are no rows; give (label, tokens) pairs")
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(text_size)
    grids = [enlarged(grid(tokens, shape, num_states, columns, layout), scale) for _, tokens in rows]
    boxes = [font.getbbox(label) for label, _ in rows]
    margin = max(int(box[2]) for box in boxes) + 2 * MARGIN
    heights = [max(len(pixels), text_size + MARGIN) for pixels in grids]
    width = margin + max(pixels.shape[1] for pixels in grids)
    canvas = np.full((sum(heights), width, *grids[0].shape[2:]), FRAME, dtype=np.uint8)
    tops = np.cumsum([0, *heights])
    for top, pixels in zip(tops, grids, strict=False):
        canvas[top : top + len(pixels), margin : margin + pixels.shape[1]] = pixels
    picture = Image.fromarray(canvas)
    pen, ink = ImageDraw.Draw(picture), INK if canvas.ndim == 2 else (INK,) * 3
    for top, height, (label, _) in zip(tops, heights, rows, strict=False):
        pen.text((MARGIN, top + height / 2), label, fill=ink, font=font, anchor="lm")
    return np.asarray(picture)


def columns_for(num_classes: int, plain: int = 8) -> int:
    """Of a grid of samples: one for each class, where these come in turn and are not too many, else `plain`."""
    return num_classes if 1 < num_classes <= MAX_CLASSES else plain


def enlarged(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel as scale x scale of them."""
    return pixels.repeat(scale, 0).repeat(scale, 1)


def scale_for(shape: tuple[int, ...]) -> int:
    """How much to enlarge images (height, width[, channels]) that are to be looked at: 8 x 8 ones six times."""
    return max(1, round(48 / max(shape[:2])))


def png(pixels: np.ndarray, scale: int = 1) -> bytes:
    """The pixels as a PNG file, each drawn scale x scale."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(enlarged(pixels, scale)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save(pixels: np.ndarray, file: Path, scale: int = 6) -> None:
    """Writes a PNG, whole or not at all."""
    with checkpoints.whole_file(file) as staging:
        staging.write_bytes(png(pixels, scale))


def data_url(pixels: np.ndarray) -> str:
    """The unscaled PNG as the src of an <img>; style it with image-rendering: pixelated."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
