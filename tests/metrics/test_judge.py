"""The judge's figures and floors, against the same written out, and from sets larger than it looks at at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from di4c_ext import data, random
from di4c_ext.metrics import Moments, entropy, frechet_distance, kernel_distance, label_score, manifold_figures
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
        "label_score": label_score(model.seen(samples).probabilities),  # type: ignore[arg-type]
        "kid": kernel_distance(model.features(real), model.features(samples)),
        **manifold_figures(model.features(real), model.features(samples)),
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
    real = torch.cat([train.tokens, heldout.tokens])
    features, pixels = short(train, cache).features(real), real.double() / 16
    found = []
    for cut in range(10):
        order = random.keys(cut, len(real)).argsort()
        chosen, others = order[:200], order[200:]
        distance = frechet_distance(Moments(pixels[chosen]), Moments(pixels[others]))
        regions = manifold_figures(features[others], features[chosen])
        kernel = kernel_distance(features[others], features[chosen])
        found.append({"frechet_pixels": distance, "kid": kernel, **regions})
    for figure in found[0]:
        assert judge.floors[figure] == pytest.approx(sum(row[figure] for row in found) / 10, rel=1e-8), figure
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
    monkeypatch.setattr("di4c_ext.metrics.reference._FORMAT", 0)  # computed anew
    again = Judge(*digits, cache, num_samples=200)
    assert again.floors == pytest.approx(judge.floors, rel=1e-6)
    samples = digits[0].tokens[:300]
    assert again.measure(samples) == pytest.approx(judge.measure(samples), rel=1e-6)


def test_real_images_are_looked_at_once(
    digits: tuple[data.ImageTokens, data.ImageTokens], cache: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of them comes from the cache; other images, or another network, ask for more."""
    train, heldout = digits
    looked: list[int] = []
    look = Judge._look
    monkeypatch.setattr(Judge, "_look", lambda self, real: looked.append(len(real)) or look(self, real))
    again = Judge(train, heldout, cache, num_samples=200)
    samples = train.tokens[:50]
    assert not looked and again.floors == judge.floors and again.measure(samples) == judge.measure(samples)
    Judge(train, heldout.subset(torch.arange(200)), cache, num_samples=200)
    monkeypatch.setattr("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20))
    Judge(train, heldout, cache, num_samples=200)
    assert looked == [1697, 1797]


def test_intervals(judge: Judge, digits: tuple[data.ImageTokens, data.ImageTokens]) -> None:
    """Around the figures, as wide as those of other samples of the same law scatter, and a function of the seed."""
    real, n = digits[0].tokens, 250
    keys = random.keys(0, len(real))
    noisy = torch.where(random.uniform(keys, 64) < 0.15, (random.uniform(keys, 64, stream=1) * 17).byte(), real)
    sets = [random.keys(cut, len(real)).argsort()[:n] for cut in range(24)]
    figures = [judge.measure(noisy[chosen]) for chosen in sets]
    found = judge.measure(noisy[sets[0]], num_bootstraps=100, seed=1)
    assert {name: found[name] for name in figures[0]} == figures[0]
    assert set(found) == set(figures[0]) | {f"{name}{end}" for name in figures[0] for end in ("_low", "_high")}
    share = 1 - n / len(real)  # sets drawn without replacement from so few scatter less
    for name, value in figures[0].items():
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        scatter = float(torch.tensor([row[name] for row in figures]).std()) / share**0.5
        ratio = (high - low) / (4 * scatter)
        assert low <= value <= high and 0.5 < ratio < 2, (name, low, value, high, ratio)
    assert found == judge.measure(noisy[sets[0]], num_bootstraps=100, seed=1)
    assert found != judge.measure(noisy[sets[0]], num_bootstraps=100, seed=2)
    few = judge.measure(real[:40], num_bootstraps=3)
    assert "frechet_features_low" not in few and "kid_low" in few  # 40 samples of 32 features have no inverse
    assert 0 <= few["precision_k_low"] <= few["precision_k_high"] <= 1


def test_without_labels_and_with_many_pixels() -> None:
    images = data.from_arrays(np.random.default_rng(0).integers(0, 4, (30, 33, 32)), num_states=4)
    judge = Judge(*data.split(images, 1 / 3), None)
    assert set(judge.floors) == {"position_entropy", "unigram_entropy"} == set(judge.measure(images.tokens))
    assert judge.accuracy is None
