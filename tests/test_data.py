"""Loading images as tokens: the built-in digits, arrays, folders; what is refused and in which words."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from di4c_ext import data


def test_digits_are_those_of_scikit_learn() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    theirs, digits = sklearn_datasets.load_digits(), data.load("digits")
    assert (digits.num_states, digits.shape, len(digits)) == (17, (8, 8), 1797)
    assert np.array_equal(digits.tokens.numpy(), theirs.data)
    assert digits.labels is not None and np.array_equal(digits.labels.numpy(), theirs.target)
    assert "Alpaydin" in (data.ASSETS / "digits.txt").read_text()


def test_split_is_a_partition_that_never_moves() -> None:
    digits = data.load("digits")
    train, heldout = data.split(digits, 1 / 6)
    assert (len(train), len(heldout)) == (1497, 300)
    assert sorted(torch.cat([train.example, heldout.example]).tolist()) == list(range(1797))
    assert heldout.example[:6].tolist() == data.split(data.load("digits"), 1 / 6)[1].example[:6].tolist()
    assert torch.equal(train.tokens, digits.tokens[train.example])
    assert torch.bincount(heldout.labels, minlength=10).min() >= 15  # no digit is missing from it


def test_batches_carry_the_example_numbers() -> None:
    train, _ = data.split(data.load("digits"), 1 / 6)
    batch = data.collate(train.__getitems__([5, 3]))
    assert batch["x_0"].dtype == torch.int64 and batch["x_0"].shape == (2, 64)
    assert batch["example"].tolist() == train.example[[5, 3]].tolist()
    single = data.collate([train[5], train[3]])
    assert all(torch.equal(batch[name], single[name]) for name in batch)


def test_fingerprint_follows_the_content() -> None:
    images = np.arange(32).reshape(2, 4, 4) % 16
    first = data.from_arrays(images, num_states=16)
    other = images.copy()
    other[1, 0, 0] ^= 1
    assert first.fingerprint() == data.from_arrays(images, num_states=16, name="another").fingerprint()
    assert first.fingerprint() != data.from_arrays(other, num_states=16).fingerprint()
    assert first.fingerprint() != data.from_arrays(images, num_states=17).fingerprint()


def test_own_arrays(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 5 * 3).reshape(2, 3, 5, 3)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.array([1, 0]))
    np.save(tmp_path / "mine.npy", images)
    for name, labels in (("mine.npz", [1, 0]), ("mine.npy", None)):
        loaded = data.load(str(tmp_path / name), num_states=1000)
        assert loaded.shape == (3, 5, 3) and loaded.length == 45
        assert np.array_equal(loaded.tokens.numpy().reshape(images.shape), images)
        assert (None if loaded.labels is None else loaded.labels.tolist()) == labels


def test_folder_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, level in (("a", 0), ("b", 255)):
        (tmp_path / label).mkdir()
        for i in range(2):
            image.fromarray(np.full((9, 7), level, np.uint8)).save(tmp_path / label / f"{i}.png")
    loaded = data.load(str(tmp_path), num_states=4, image_size=3)
    assert loaded.tokens.tolist() == [[0] * 9] * 2 + [[3] * 9] * 2
    assert loaded.labels is not None and loaded.labels.tolist() == [0, 0, 1, 1]
    colour = data.load(str(tmp_path), num_states=4, image_size=3, grayscale=False)
    assert colour.shape == (3, 3, 3)
    (tmp_path / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png: not a readable picture"):
        data.load(str(tmp_path), num_states=4, image_size=3)


def test_layouts_hold_the_same_images() -> None:
    images = np.arange(2 * 2 * 3 * 3).reshape(2, 2, 3, 3)
    together, apart = (data.from_arrays(images, num_states=36, layout=layout) for layout in ("HWC", "CHW"))
    assert torch.equal(together.tokens, torch.arange(36).view(2, 18))
    assert apart.tokens[0].tolist() == [*range(0, 18, 3), *range(1, 18, 3), *range(2, 18, 3)]
    for loaded in (together, apart, apart.subset(torch.tensor([0, 1]))):
        assert np.array_equal(loaded.images().numpy(), images) and loaded.shape == (2, 3, 3)
    assert together.fingerprint() != apart.fingerprint()
    grey = [data.from_arrays(images[..., 0], num_states=36, layout=layout) for layout in ("HWC", "CHW")]
    assert torch.equal(grey[0].tokens, grey[1].tokens) and grey[0].fingerprint() == grey[1].fingerprint()
    with pytest.raises(ValueError, match="layout must be one of"):
        data.from_arrays(images, num_states=36, layout="WHC")
    with pytest.raises(ValueError, match=r"tokens must be \(N, 18\) for images \(2, 3, 3\), got \(2, 17\)"):
        data.as_images(together.tokens[:, :-1], (2, 3, 3))


def test_flips_are_part_of_what_a_data_set_is() -> None:
    plain, flipped = data.load("digits"), data.load("digits", horizontal_flip=True)
    assert flipped.horizontal_flip and data.split(flipped, 0.5)[0].horizontal_flip
    assert torch.equal(plain.tokens, flipped.tokens) and plain.fingerprint() != flipped.fingerprint()


def test_quantise_cuts_the_range_evenly() -> None:
    levels = data.quantise(np.arange(256, dtype=np.uint8), 16)
    assert np.bincount(levels).tolist() == [16] * 16 and levels.dtype == np.uint8
    for states in (1, 3, 17, 255, 256):  # uneven cuts differ by one
        shares = np.bincount(data.quantise(np.arange(256, dtype=np.uint8), states))
        assert len(shares) == states and shares.max() - shares.min() <= 1
    assert data.to_pixels(torch.arange(17), 17)[[0, 8, 16]].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("images", "states", "message"),
    [
        (np.full((2, 2, 2), 5), 4, r"value 5 at image 0, row 0, column 0 is outside the 4 states 0\.\.3 \(8 such"),
        (np.array([[[0, 1], [2, -3]]] * 2), 4, r"value -3 at image 0, row 1, column 1 .* shift the data"),
        (np.zeros((2, 2, 2)), 4, "float64; give integers"),
        (np.zeros((2, 2), int), 4, r"shape \(2, 2\)"),
        (np.zeros((1, 2, 2), int), 4, "at least 2 are needed"),
    ],
)
def test_refuses_arrays(images: np.ndarray, states: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.from_arrays(images, num_states=states)


def test_refuses_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(tmp_path / "nameless.npz", pixels=np.zeros((2, 2, 2), int))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for name, flags, message in (
        ("broken.npz", {}, "not a readable array file"),
        ("nameless.npz", {}, r"holds \['pixels'\], no array named 'images'"),
        ("objects.npy", {}, "not a readable array file"),
        ("missing.npz", {}, "no such file"),
        ("", {"image_size": 0}, "--image_size 0: must be at least 1"),
        ("", {"image_size": 4}, "no pictures"),
        ("../mnist", {"image_size": 4}, "pip install datasets"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(str(tmp_path / name), num_states=4, **flags)
    with pytest.raises(ValueError, match="--num_states is missing"):
        data.load(str(tmp_path / "broken.npz"))
    with pytest.raises(ValueError, match="--num_states 16: digits has 17"):
        data.load("digits", num_states=16)
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(data.load("digits"), 1.0)
