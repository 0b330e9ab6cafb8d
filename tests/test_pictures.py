"""Grids of images: grey and in colour, in either layout, and in rows with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from di4c_ext import data, pictures


def colours(layout: str) -> data.ImageTokens:
    images = np.random.default_rng(0).integers(0, 4, (5, 3, 2, 3))
    return data.from_arrays(images, num_states=4, layout=layout)


def test_layouts_make_one_picture() -> None:
    together, apart = colours("HWC"), colours("CHW")
    picture = pictures.grid(together.tokens, together.shape, 4, columns=3)
    assert picture.shape == (2 * 4 + 1, 3 * 3 + 1, 3)
    assert np.array_equal(picture[1:4, 4:6], together.images()[1].numpy() * 85)
    assert np.array_equal(picture, pictures.grid(apart.tokens, apart.shape, 4, columns=3, layout="CHW"))
    assert not np.array_equal(picture, pictures.grid(apart.tokens, apart.shape, 4, columns=3))


def test_one_channel_is_grey() -> None:
    tokens = torch.arange(12).view(2, 6) % 4
    assert np.array_equal(pictures.grid(tokens, (3, 2, 1), 4), pictures.grid(tokens, (3, 2), 4))
    for shape in ((3, 2, 2), (6,), (3, 2, 1, 1)):
        with pytest.raises(ValueError, match=r"grid: shape must be \(height, width\), or with 1 or 3 channels"):
            pictures.grid(tokens, shape, 4)
    with pytest.raises(ValueError, match=r"tokens must be \(N, 9\)"):
        pictures.grid(tokens, (3, 3), 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_with_labels(channels: int, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    shape = (9, 8) if channels == 1 else (9, 8, 3)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(32, (6, 72 * channels), generator=generator)
    rows = [("teacher, 10 steps", samples[:4]), ("student", samples), ("hybrid 8 + 2", samples[:1])]
    picture = pictures.labelled_grid(rows, shape, 32, columns=4, scale=2, layout="CHW")
    grids = [pictures.grid(tokens, shape, 32, 4, "CHW").repeat(2, 0).repeat(2, 1) for _, tokens in rows]
    assert picture.dtype == np.uint8 and picture.ndim == (2 if channels == 1 else 3)
    margin = picture.shape[1] - max(each.shape[1] for each in grids)
    top = 0
    for each in grids:
        assert np.array_equal(picture[top : top + len(each), margin : margin + each.shape[1]], each)
        label = picture[top : top + max(len(each), 22), :margin]
        assert (label == pictures.INK).any() and (label[:, : pictures.MARGIN - 2] == pictures.FRAME).all()
        assert (label[:, -2:] == pictures.FRAME).all()  # no label runs into its images
        top += max(len(each), 22)
    assert top == len(picture)
    pictures.save(picture, tmp_path / "rows.png", scale=1)
    assert np.array_equal(np.asarray(image.open(tmp_path / "rows.png")), picture)


def test_labelled_refusals() -> None:
    with pytest.raises(ValueError, match="there are no rows"):
        pictures.labelled_grid([], (2, 2), 4)
    with pytest.raises(ValueError, match="0 images"):
        pictures.labelled_grid([("nothing", torch.zeros(0, 4).long())], (2, 2), 4)
