"""Pictures that do not fit into memory: looked at one by one, and read as they are asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import VQ, as_words

from di4c_ext import codes, data, lazy_rows, picture_sets
from di4c_ext.lazy_rows import LazyRows
from di4c_ext.metrics import judge as judges
from di4c_ext.models import VQConfig, VQModel

image = pytest.importorskip("PIL.Image")
SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty coloured pictures of two kinds, larger than they are wanted, and wider than high."""
    rng = np.random.default_rng(0)
    for i in range(40):
        place = tmp_path / "pictures" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(place / f"{i:02d}.png")
    return tmp_path / "pictures"


def both_ways(folder: Path, monkeypatch: pytest.MonkeyPatch, **told: Any) -> tuple[data.ImageTokens, data.ImageTokens]:
    """The data set in memory, and read as it is asked for."""
    whole = data.load(str(folder), **told)
    with monkeypatch.context() as patch:
        patch.setattr(lazy_rows, "IN_MEMORY", 2000)
        lazy = data.load(str(folder), **told)
    assert isinstance(whole.tokens, torch.Tensor) and isinstance(lazy.tokens, LazyRows)
    return whole, lazy


@pytest.mark.parametrize(
    "told",
    [
        {"image_size": SIZE},
        {"image_size": SIZE, "grayscale": True, "num_states": 4},
        {"grayscale": False},
        {"image_size": SIZE, "layout": "CHW", "grayscale": False},
    ],
)
def test_the_same_images_either_way(folder: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any]) -> None:
    whole, lazy = both_ways(folder, monkeypatch, **told)
    assert torch.equal(lazy.tokens[:], whole.tokens) and lazy.tokens.dtype == whole.tokens.dtype
    assert (lazy.shape, lazy.num_states, lazy.layout) == (whole.shape, whole.num_states, whole.layout)
    assert torch.equal(lazy.labels, whole.labels) and torch.equal(lazy.example, whole.example)
    assert torch.equal(lazy.images(), whole.images())
    for side, other in zip(data.split(lazy, 0.25), data.split(whole, 0.25), strict=True):
        assert isinstance(side.tokens, LazyRows) and torch.equal(side.tokens[:], other.tokens)
        batch, same = (images.__getitems__([3, 1]) for images in (side, other))
        assert all(torch.equal(batch[name], same[name]) for name in same)


def test_the_middle_of_a_picture_is_cut_out(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 2:6] = 200  # the middle square
    for i in range(2):
        image.fromarray(pixels).save(tmp_path / f"{i}.png")
    assert (data.load(str(tmp_path), image_size=4).tokens == 200).all()


def test_told_size_and_colour_nothing_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    kept = image.open
    monkeypatch.setattr(image, "open", lambda file: opened.append(file) or kept(file))
    monkeypatch.setattr(lazy_rows, "IN_MEMORY", 2000)
    lazy = data.load(str(folder), image_size=SIZE, grayscale=False)
    assert len(opened) == 2, "those by whose form the others are known"
    first = lazy.fingerprint()
    assert len(opened) == 2 and first != data.split(lazy, 0.25)[0].fingerprint()
    os.utime(folder / "a" / "00.png", ns=(1, 1))
    assert data.load(str(folder), image_size=SIZE, grayscale=False).fingerprint() != first


def test_pictures_that_cannot_be_read_are_named_when_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_rows, "IN_MEMORY", 2000)
    lazy = data.load(str(folder), image_size=SIZE, grayscale=False)
    file = folder / "a" / "10.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"10\.png: not a readable picture"):
        lazy.tokens[:]
    image.new("I;16", (9, 9), 40_000).save(file)
    with pytest.raises(ValueError, match=r"10\.png: its pixels have more than 8 bits"):
        lazy.tokens[:]
    kept = data.load(str(folder / "b"))
    image.new("RGB", (5, 5)).save(folder / "b" / "01.png")
    with pytest.raises(ValueError, match=r"mixed sizes .*01\.png is 5 x 5, .*03\.png is 12 x 20"):
        data.load(str(folder / "b"))
    assert kept.shape == (12, 20, 3)


def test_data_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (6, 9, 9), dtype=np.uint8)
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(2)})
    rows = [{"picture": image.fromarray(p), "kind": i % 2} for i, p in enumerate(pixels)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows, features=features))
    monkeypatch.setattr(lazy_rows, "IN_MEMORY", 100)
    lazy = data.load("someone/grey")
    assert isinstance(lazy.tokens, LazyRows) and lazy.shape == (9, 9) and lazy.labels.tolist() == [0, 1] * 3
    assert np.array_equal(lazy.images().numpy(), pixels)
    assert lazy.fingerprint() == data.load("someone/grey").fingerprint()


def test_codes_of_more_pictures_than_memory_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of them are read together than are noted together, and the codes are mapped too."""
    torch.manual_seed(0)
    vq = VQModel(VQConfig(**VQ, image_size=SIZE, num_channels=3)).eval()
    whole, lazy = both_ways(folder, monkeypatch, image_size=SIZE, horizontal_flip=True)
    wanted = codes.codes_of(whole, vq, tmp_path / "cache")
    asked: list[int] = []
    read = picture_sets.PictureSet.pixels
    monkeypatch.setattr(
        picture_sets.PictureSet, "pixels", lambda self, index: asked.append(len(index)) or read(self, index)
    )
    monkeypatch.setattr(codes, "CHUNK_BYTES", 4 * lazy.length * 7)
    monkeypatch.setattr(lazy_rows, "IN_MEMORY", 100)
    made = codes.codes_of(lazy, vq, tmp_path / "cache")
    assert asked == [7] * 5 + [5]
    for rows, same in ((made.tokens, wanted.tokens), (made.mirrored, wanted.mirrored)):
        assert isinstance(rows, LazyRows) and rows.dtype == torch.uint8 and torch.equal(rows[:], same)
    assert made.labels is lazy.labels and made.num_classes == 2
    train, _ = data.split(made, 0.25)
    assert isinstance(train.tokens, LazyRows) and isinstance(train.mirrored, LazyRows)
    batch = train.__getitems__([2, 0])
    assert torch.equal(batch["mirrored"], wanted.mirrored[train.example[[2, 0]]].long())
    assert codes.usage(made.tokens, 12) == codes.usage(wanted.tokens, 12)


def test_samples_are_judged_by_them(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(judges, "classifier", lambda train, cache: _steps(train, cache))
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path))
    whole, lazy = both_ways(folder, monkeypatch, image_size=SIZE)
    figures = []
    for images in (whole, lazy):
        judge = judges.Judge(*data.split(images, 0.25), None, 10)
        figures.append((judge.floors, judge.sizes, judge.measure(whole.tokens[:10])))
    assert figures[0] == figures[1]
    few = data.spread(lazy, 7)
    assert isinstance(few.tokens, LazyRows) and few.example.tolist() == [0, 5, 11, 17, 22, 28, 34]
    assert data.spread(lazy, 40) is lazy


def _steps(train: data.ImageTokens, cache: Path | None) -> Any:
    from di4c_ext.metrics.features import classifier

    return classifier(train, cache, steps=3)


def test_the_whole_way_with_more_pictures_than_memory_holds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VQ model, codes, teacher, student, samples and figures, and nobody asks for all of the pictures at once."""
    from test_tokens_commands import NETWORK, _distill, _vq

    from di4c_ext import distill, evaluate, pretrain
    from di4c_ext.metrics import features

    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(judges, "classifier", lambda train, cache: features.classifier(train, cache, steps=3))
    monkeypatch.setattr(lazy_rows, "IN_MEMORY", 100)
    pieces = ((codes, "CHUNK"), (features, "AT_ONCE"), (features, "BATCH"), (judges, "_AT_ONCE"))
    for module, name in pieces:
        monkeypatch.setattr(module, name, 16)
    asked: list[int] = []
    read = picture_sets.PictureSet.pixels
    monkeypatch.setattr(
        picture_sets.PictureSet, "pixels", lambda self, index: asked.append(len(index)) or read(self, index)
    )
    told = {"image_size": SIZE, "grayscale": False, "horizontal_flip": True}
    assert pretrain.main(_vq(folder, tmp_path / "vq", **told, max_steps=2, save_steps=2)) == 0
    settings = {"teacher_max_steps": 2, "max_steps": 2, "teacher_model_config": NETWORK, "eval_num_samples": 6}
    run = tmp_path / "run"
    assert distill.main(_distill(folder, tmp_path / "vq", run, **told, **settings)) == 0
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["frechet_features"] >= 0 for row in rows)
    words = {"model": run, "dataset_name": folder, "eval_num_samples": 6, "eval_num_steps": 1, "eval_seeds": 0, **told}
    quick = {"eval_num_bootstraps": 0, "eval_num_turns": 0}
    assert evaluate.main(as_words(words | quick)) == 0
    assert max(asked) == 16, "what is done with all of them is done piece by piece"
