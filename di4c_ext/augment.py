"""Altered images for training: mirrored; and for a teacher that has few, moved, turned, scaled, sheared, brighter.

A mirror image counts as one of the kind. Of the other alterations the network is told by how much (EDM's non-leaking
augmentation, arXiv 2206.00364): numbers that are 0 for an image left as it is. Asked with zeros, or with none, it draws
images of the unaltered kind.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from di4c_ext import random
from di4c_ext.data import Layout

MIRROR = 3  # sub-key for the mirror of those who alter with the same key: `augment_images` has the three before it
AUGMENTATION_DIM = 7  # shift x, shift y, angle, log width, log height, shear, log brightness
_SPREAD = (0.15, 0.15, 0.2, 0.12, 0.12, 0.2, 0.15)  # of each: shifts in half image widths, the angle in radians


def flip_images(
    x_0: Tensor, keys: Tensor, *, shape: tuple[int, ...], layout: Layout = "HWC", stream: int = 0
) -> Tensor:
    """x_0 (B, D) levels of images of `shape` (height, width[, channels]), each mirrored left to right with probability
    1/2 by its key (B,). The network is not told: a mirror image is one of the kind. ValueError where D does not match.
    """
    if x_0.ndim != 2 or x_0.shape[1] != math.prod(shape):
        raise ValueError(
            f"flip_images: x_0 must be (B, {' * '.join(map(str, shape))}) for images of {shape}, got {tuple(x_0.shape)}"
        )
    return one_of_two(x_0, mirrored(x_0, shape, layout), keys, stream=stream)


def mirrored(x_0: Tensor, shape: tuple[int, ...], layout: Layout = "HWC") -> Tensor:
    """x_0 (B, D) levels of images of `shape` (height, width[, channels]), each of them mirrored left to right."""
    height, width, channels = (*shape, 1)[:3]
    size = (height, width, channels) if layout == "HWC" else (channels, height, width)
    return x_0.view(-1, *size).flip(layout.index("W") + 1).flatten(1)


def one_of_two(x_0: Tensor, other: Tensor, keys: Tensor, *, stream: int = 0) -> Tensor:
    """Each row of x_0 (B, D), or with probability 1/2 by its key (B,) that of `other`."""
    return torch.where(random.uniform(keys, 1, stream=stream) < 0.5, other, x_0)


def augment_images(
    x_0: Tensor, keys: Tensor, *, shape: tuple[int, int], num_states: int, share: float = 0.5, stream: int = 0
) -> tuple[Tensor, Tensor]:
    """x_0 (B, D) int64 levels of images of `shape` (height, width), D = height * width, altered at random.

    Each of the seven amounts is Gaussian for a `share` of the images and 0 for the rest, which stay as they are. Levels
    between two states are rounded up or down at random, keeping their mean. Everything hangs on keys (B,).

    Returns:
        The altered x_0 (B, D) int64, and the amounts (B, 7) float32 in units of their spread.

    Raises:
        ValueError: where D does not match `shape`, or share lies outside [0, 1].
    """
    height, width = shape
    if x_0.ndim != 2 or x_0.shape[1] != height * width:
        raise ValueError(
            f"augment_images: x_0 must be (B, {height} * {width}) for images of {shape}, got {tuple(x_0.shape)}"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"augment_images: share must lie in [0, 1], got {share}")
    key = [random.fold_in(keys, use) for use in range(3)]
    altered = random.uniform(key[0], 1, stream=stream) < share
    amount = torch.where(altered, random.normal(key[1], AUGMENTATION_DIM, stream=stream), 0.0).float()
    shift_x, shift_y, angle, wide, high, shear, bright = (amount * amount.new_tensor(_SPREAD)).unbind(1)
    cos, sin, wide, high = angle.cos(), angle.sin(), wide.exp(), high.exp()
    row_x = torch.stack([cos * wide, (shear - sin) * high, shift_x], 1)
    row_y = torch.stack([sin * wide, cos * high, shift_y], 1)
    images = x_0.view(-1, 1, height, width).float()
    grid = nn.functional.affine_grid(torch.stack([row_x, row_y], 1), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, "bicubic", "zeros", align_corners=False).flatten(1)
    level = (moved * bright.exp()[:, None]).clamp(0, num_states - 1)
    level = (level + random.uniform(key[2], x_0.shape[1], stream=stream).float()).floor().clamp(max=num_states - 1)
    return torch.where(altered, level.long(), x_0), amount
