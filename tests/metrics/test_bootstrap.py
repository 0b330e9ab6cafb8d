"""The bootstrap against what is known of means, and of statistics that repetition moves."""

from __future__ import annotations

import math

import pytest
import torch

from di4c_ext import random
from di4c_ext.metrics.bootstrap import bootstrap, bootstrap_figures, resamples


def test_a_mean_has_the_interval_of_the_normal_law() -> None:
    x = random.normal(random.keys(1, 1), 400)[0]
    low, high = bootstrap(lambda chosen: float(x[chosen].mean()), len(x), 1000, seed=0)
    half = 1.96 * float(x.std(unbiased=False)) / math.sqrt(len(x))
    assert (low + high) / 2 == pytest.approx(float(x.mean()), abs=0.1 * half)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    narrow = bootstrap(lambda chosen: float(x[chosen].mean()), len(x), 1000, seed=0, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.1)


def test_it_covers_what_it_says() -> None:
    """Of 200 means of 60 numbers each, about 95% of the intervals hold the mean of the law they came from."""
    held = 0
    for x in random.normal(random.keys(2, 200), 60):
        low, high = bootstrap(lambda chosen, x=x: float(x[chosen].mean()), len(x), 200, seed=3)
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_the_interval_holds_a_figure_that_repetition_moves() -> None:
    """The number of different values falls by a third in any resample; its interval still lies around it."""
    x = torch.arange(300)
    low, high = bootstrap(lambda chosen: float(len(set(x[chosen].tolist()))), len(x), 100, seed=0)
    assert low < 300 < high and high - low < 60


def test_figures_share_their_resamples_and_hang_on_the_seed_alone() -> None:
    x = random.normal(random.keys(1, 1), 50)[0]
    found = bootstrap_figures(lambda chosen: {"a": float(x[chosen].mean()), "b": -float(x[chosen].mean())}, 50, 40, 7)
    assert list(found) == ["a_low", "a_high", "b_low", "b_high"]
    assert found["a_low"] == pytest.approx(-found["b_high"]) and found["a_high"] == pytest.approx(-found["b_low"])
    alone = bootstrap(lambda chosen: float(x[chosen].mean()), 50, 40, 7)
    assert alone == (found["a_low"], found["a_high"])
    assert alone != bootstrap(lambda chosen: float(x[chosen].mean()), 50, 40, 8)


def test_resamples_draw_every_place_alike() -> None:
    counts = torch.stack([chosen.bincount(minlength=8) for chosen in resamples(8, 2000, 0)]).sum(0)
    assert counts.sum() == 16000
    chi_square = float(((counts - 2000.0) ** 2 / 2000).sum())
    assert chi_square < 24.3  # 7 degrees of freedom, 0.1%
    some = next(resamples(8, 1, 5))
    assert some.shape == (8,) and some.dtype == torch.int64
    assert torch.equal(some, next(resamples(8, 9, 5))), "the first of any longer run"


def test_refusals() -> None:
    for size, number in ((0, 10), (10, 0)):
        with pytest.raises(ValueError, match=f"{size} samples and num_bootstraps {number}"):
            bootstrap(lambda chosen: 0.0, size, number)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        bootstrap(lambda chosen: 0.0, 10, 10, level=95)
