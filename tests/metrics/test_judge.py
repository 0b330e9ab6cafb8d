"""The judge's figures and floors, against the same written out, and from sets larger than it looks at at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from di4c_ext import data, random
from di4c_ext.metrics import Moments, entropy, frechet_distance, label_score
from di4c_ext.metrics.features import classifier
from di4c_ext.metrics.judge import Judge

short = partial(classifier, steps=100)


@pytest.fixture(scope="module")
def digits() -> tuple[data.ImageTokens, data.ImageTokens]:
    return data.split(data.load("digits"), 1 / 6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the classifier is kept, and in this module trained for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("di4c_ext.metrics.judge.classifier", short)
        yield tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def judge(digits: tuple[data.ImageTokens, data.ImageTokens], cache: Path) -> Judge:
    return Judge(*digits, cache, num_samples=200)


def test_figures_are_their_definitions(
    digits: tuple[data.ImageTokens, data.ImageTokens], cache: Path, judge: Judge
) -> None:
    train, heldout = digits
    model, samples = short(train, cache), heldout.tokens[:90]
    real = torch.cat([train.tokens, heldout.tokens])
    figures = judge.measure(samples)
    expected = {
        "frechet_features": frechet_distance(Moments(model.features(real)), Moments(model.features(samples))),
        "frechet_features_heldout": frechet_distance(
            Moments(model.features(heldout.tokens)), Moments(model.features(samples))
        ),
        "frechet_pixels": frechet_distance(Moments(real.double() / 16), Moments(samples.double() / 16)),
        "frechet_pixels_heldout": frechet_distance(
            Moments(heldout.tokens.double() / 16), Moments(samples.double() / 16)
        ),
        "label_score": label_score(model.seen(samples).probabilities),
        "position_entropy": entropy.position_entropy(samples, 17),
        "unigram_entropy": entropy.unigram_entropy(samples, 17),
    }
    assert figures == pytest.approx(expected, rel=1e-9)
    assert list(judge.floors) and set(judge.floors) == set(expected)
    assert judge.accuracy == model.accuracy(heldout) and judge.sizes == {"all": 1797, "train": 1497, "heldout": 300}


def test_floors_are_taken_at_the_number_of_samples(
    digits: tuple[data.ImageTokens, data.ImageTokens], cache: Path, judge: Judge
) -> None:
    """So many real images against all the others; the fewer they are, the higher."""
    train, heldout = digits
    real = torch.cat([train.tokens, heldout.tokens]).double() / 16
    found = []
    for cut in range(10):
        order = random.keys(cut, len(real)).argsort()
        found.append(frechet_distance(Moments(real[order[:200]]), Moments(real[order[200:]])))
    assert judge.floors["frechet_pixels"] == pytest.approx(sum(found) / 10, rel=1e-8)
    halves = Judge(train, heldout, cache)
    assert (judge.floor_size, halves.floor_size) == (200, 898)
    assert Judge(train, heldout, cache, num_samples=5000).floors == halves.floors  # never more than half
    for figure in ("frechet_features", "frechet_pixels", "frechet_features_heldout", "frechet_pixels_heldout"):
        assert halves.floors[figure] < judge.floors[figure], figure
    assert 3 < halves.floors["label_score"] <= 10


def test_sets_larger_than_it_looks_at_at_once(
    digits: tuple[data.ImageTokens, data.ImageTokens], cache: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("di4c_ext.metrics.judge._AT_ONCE", 77)
    monkeypatch.setattr("di4c_ext.metrics.features.AT_ONCE", 100)
    again = Judge(*digits, cache, num_samples=200)
    assert again.floors == pytest.approx(judge.floors, rel=1e-6)
    samples = digits[0].tokens[:300]
    assert again.measure(samples) == pytest.approx(judge.measure(samples), rel=1e-6)


def test_without_labels_and_with_many_pixels() -> None:
    images = data.from_arrays(np.random.default_rng(0).integers(0, 4, (30, 33, 32)), num_states=4)
    judge = Judge(*data.split(images, 1 / 3), None)
    assert set(judge.floors) == {"position_entropy", "unigram_entropy"} == set(judge.measure(images.tokens))
    assert judge.accuracy is None
