"""Images on disk: CIFAR-10's python files, Debian's Fashion-MNIST, folders and hub data of any size and colour."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from di4c_ext import data, image_files

RGB = (16, 200, 90)


def cifar10(folder: Path, per_batch: int = 3) -> np.ndarray:
    """Batches of the published layout and names; returns the training images (N, 3, 32, 32)."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    written = []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        batch = {
            b"batch_label": name.encode(),
            b"labels": [i % 10 for i in range(per_batch)],
            b"data": rows,
            b"filenames": [b"a.png"] * per_batch,
        }
        (folder / name).write_bytes(pickle.dumps(batch, 2))
        written.append(rows)
    return np.concatenate(written[:-1]).reshape(-1, 3, 32, 32)


def test_cifar10(tmp_path: Path) -> None:
    images = cifar10(tmp_path / "cifar-10-batches-py")
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        loaded = data.load(str(folder), layout="CHW")
        assert (loaded.name, loaded.shape, loaded.num_states, len(loaded)) == ("cifar10", (32, 32, 3), 256, 15)
        assert np.array_equal(loaded.tokens.numpy(), images.reshape(15, -1))  # positions as in the files
        assert loaded.labels is not None and loaded.labels.tolist() == [0, 1, 2] * 5
    together = data.load(str(tmp_path))
    assert np.array_equal(together.tokens.view(15, 32, 32, 3).numpy(), images.transpose(0, 2, 3, 1))
    assert torch.equal(together.images(), loaded.images())
    assert len(data.load(str(tmp_path), dataset_split="test")) == 3
    few = data.load(str(tmp_path), num_states=8, layout="CHW")
    assert few.num_states == 8 and np.array_equal(few.tokens.numpy(), images.reshape(15, -1) // 32)


def test_cifar10_refusals(tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    cifar10(folder)
    for flags, message in (
        ({"dataset_split": "validation"}, r"--dataset_train_split 'validation': .*has the splits train, test"),
        ({"image_size": 16}, "--image_size 16: cifar10 is 32 x 32; leave the flag out"),
        ({"grayscale": True}, "--grayscale True: cifar10 is RGB"),
        ({"num_states": 300}, "--num_states 300: pictures have 256 levels"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(str(folder), **flags)
    good: dict[bytes, Any] = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    for bad, message in (
        ([], r"data_batch_2: no CIFAR-10 batch: `data` must be uint8 \(N, 3072\), got NoneType"),
        (good | {b"data": np.zeros((2, 100), np.uint8)}, r"got uint8 \(2, 100\)"),
        (good | {b"data": np.zeros((2, 3072))}, r"got float64 \(2, 3072\)"),
        (good | {b"labels": [0]}, "`labels` must be 2 numbers in 0..9"),
        (good | {b"labels": [0, 10]}, "`labels` must be 2 numbers in 0..9"),
        ({b"fine": 1}, "`data` must be"),
        (print, r"data_batch_2: refused, it asks for (builtins|__builtin__)\.print, which was not run"),
    ):
        (folder / "data_batch_2").write_bytes(pickle.dumps(bad, 2))
        with pytest.raises(ValueError, match=message):
            data.load(str(folder))
    (folder / "data_batch_2").unlink()
    with pytest.raises(ValueError, match=r"data_batch_2: cannot be read \(No such file"):
        data.load(str(folder))


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    monkeypatch.setattr(image_files, "FASHION_MNIST", tmp_path / "fashion-mnist")
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images = np.random.default_rng(1).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for start, some in (("train", slice(0, 10)), ("t10k", slice(10, 12))):
        (folder / f"{start}-images-idx3-ubyte.gz").write_bytes(idx(images[some]))
        (folder / f"{start}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(12, dtype=np.uint8)[some] % 10))
    return folder, images


def test_fashion_mnist(fashion: tuple[Path, np.ndarray]) -> None:
    _, images = fashion
    loaded = data.load("fashion_mnist")
    assert (loaded.shape, loaded.num_states, len(loaded)) == ((28, 28), 256, 10)
    assert np.array_equal(loaded.images().numpy(), images[:10])
    assert loaded.labels is not None and loaded.labels.tolist() == list(range(10))
    few = data.load("fashion_mnist", num_states=32, dataset_split="test", layout="CHW")
    assert np.array_equal(few.images().numpy(), images[10:] // 8) and few.num_states == 32


def test_fashion_mnist_refusals(fashion: tuple[Path, np.ndarray]) -> None:
    folder, images = fashion
    labels = folder / "train-labels-idx1-ubyte.gz"
    for content, message in (
        (idx(np.zeros(9, np.uint8)), r"images \(10, 28, 28\) and labels \(9,\) do not belong together"),
        (gzip.compress(b"\0\0\x0d\x01"), "no IDX file of bytes"),
        (gzip.compress(b"\0"), "no IDX file of bytes"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x09ab"), r"says its shape is \(9,\), 9 bytes, but 2 follow"),
        (b"no gzip", "not a gzip file that can be read"),
        (idx(images)[:-20], "not a gzip file that can be read"),
    ):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load("fashion_mnist")
    with pytest.raises(ValueError, match="splits train, test, t10k"):
        data.load("fashion_mnist", dataset_split="valid")
    with pytest.raises(ValueError, match="--image_size 14: fashion_mnist is 28 x 28"):
        data.load("fashion_mnist", image_size=14, dataset_split="test")
    labels.unlink()
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        data.load("fashion_mnist")


def test_the_real_fashion_mnist() -> None:
    if not image_files.FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    for split, size in (("train", 60_000), ("test", 10_000)):
        loaded = data.load("fashion_mnist", dataset_split=split)
        assert loaded.tokens.shape == (size, 784) and loaded.labels is not None
        assert torch.bincount(loaded.labels).tolist() == [size // 10] * 10
    train = data.load("fashion_mnist").tokens
    assert train.float().mean().item() / 255 == pytest.approx(0.28604, abs=1e-4)


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()

    def save(name: str, mode: str, size: tuple[int, int], colour: Any) -> str:
        image.new(mode, size, colour).save(folder / name)
        return str(folder)

    return save


def test_folder_keeps_sizes_and_channels(pictures: Any) -> None:
    pictures("a.png", "L", (7, 9), 10)
    folder = pictures("b.png", "LA", (7, 9), (20, 255))
    grey = data.load(folder)
    assert (grey.shape, grey.num_states) == ((9, 7), 256)
    assert grey.tokens.unique(dim=1).tolist() == [[10], [20]]
    pictures("c.png", "RGB", (7, 9), RGB)
    colour = data.load(folder, layout="CHW")
    assert colour.shape == (9, 7, 3)
    assert colour.tokens[:, ::63].tolist() == [[10] * 3, [20] * 3, list(RGB)]
    assert data.load(folder, grayscale=True).shape == (9, 7)
    assert data.load(folder, image_size=4, num_states=4).images().shape == (3, 4, 4, 3)


def test_folder_refusals(pictures: Any) -> None:
    pictures("a.png", "L", (7, 9), 10)
    folder = pictures("b.png", "L", (6, 5), 10)
    with pytest.raises(ValueError, match=r"mixed sizes .*a\.png is 9 x 7, .*b\.png is 5 x 6; give --image_size"):
        data.load(folder)
    assert data.load(folder, image_size=5).shape == (5, 5)
    pictures("b.png", "I;16", (7, 9), 40_000)
    with pytest.raises(ValueError, match=r"b\.png: its pixels have more than 8 bits \(mode I;16\), levels up to 40000"):
        data.load(folder)
    with pytest.raises(ValueError, match="--num_states 257: pictures have 256 levels"):
        (Path(folder) / "b.png").unlink()
        pictures("c.png", "L", (7, 9), 10)
        data.load(folder, num_states=257)


def test_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    features = datasets.Features(
        {"label": datasets.ClassLabel(2), "img": datasets.Image(), "note": datasets.Value("string")}
    )

    def published(*sizes: tuple[int, int]) -> Any:
        rows = [{"label": i % 2, "img": image.new("RGB", size, RGB), "note": "-"} for i, size in enumerate(sizes)]
        return datasets.Dataset.from_list(rows, features=features)

    asked: list[Any] = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **more: asked.append((names, more)) or published((3, 2), (3, 2))
    )
    loaded = data.load("someone/images", dataset_config="small", dataset_split="valid", layout="CHW")
    assert asked == [(("someone/images", "small"), {"split": "valid"})]
    assert loaded.shape == (2, 3, 3) and loaded.tokens[0].tolist() == [RGB[0]] * 6 + [RGB[1]] * 6 + [RGB[2]] * 6
    assert loaded.labels is not None and loaded.labels.tolist() == [0, 1]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: published((3, 2), (4, 4)))
    with pytest.raises(ValueError, match="images, row 0 is 2 x 3, someone/images, row 1 is 4 x 4"):
        data.load("someone/images")
