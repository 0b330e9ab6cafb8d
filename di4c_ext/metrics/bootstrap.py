"""How far a figure of N samples may be from that of N others: the bootstrap, over samples drawn anew with replacement.

    low, high = bootstrap(lambda chosen: float(nats[chosen].mean()), len(nats), 200, seed=0)
    row |= bootstrap_figures(lambda chosen: judge_of(features[chosen]), len(features), 200, seed=0)

What is drawn anew are the places of samples, so no network is evaluated again. A set with repeated members is less
varied than the one it is drawn from, which moves a distance between clouds, or an entropy, to one side. So the interval
is that of the deviations from their own mean, laid around the figure itself: it says how the figure at N samples
scatters, not where it would lie at infinitely many.

Reference: Efron, Tibshirani, An Introduction to the Bootstrap, 1993, sections 12 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from di4c_ext import random

LEVEL = 0.95  # share of the deviations between both ends


def resamples(size: int, num_bootstraps: int, seed: int) -> Iterator[Tensor]:
    """num_bootstraps times the places (size,) int64 of `size` samples drawn anew, a function of (size, seed, number).

    Raises ValueError for a size or num_bootstraps below 1.
    """
    if size < 1 or num_bootstraps < 1:
        raise ValueError(f"bootstrap: {size} samples and num_bootstraps {num_bootstraps}; both must be at least 1")
    for key in random.keys(seed, num_bootstraps).split(1):
        yield (random.uniform(key, size)[0] * size).long().clamp(max=size - 1)


def bootstrap(
    statistic: Callable[[Tensor], float], size: int, num_bootstraps: int, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """The two ends of a statistic's interval. statistic: places (size,) int64, repeated ones too, -> a number.

    It is called num_bootstraps + 1 times, first on the samples as they are. NaN for a statistic that has any. Raises
    ValueError for a size or num_bootstraps below 1, and a level that does not lie between 0 and 1.
    """
    found = bootstrap_figures(lambda chosen: {"x": statistic(chosen)}, size, num_bootstraps, seed, level)
    return found["x_low"], found["x_high"]


def bootstrap_figures(
    statistics: Callable[[Tensor], Mapping[str, float]],
    size: int,
    num_bootstraps: int,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, float]:
    """`bootstrap` of several figures of the same resamples: {"<figure>_low": ..., "<figure>_high": ...}."""
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: level must lie between 0 and 1, got {level}")
    itself = dict(statistics(torch.arange(size)))
    drawn = [statistics(chosen) for chosen in resamples(size, num_bootstraps, seed)]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    found: dict[str, float] = {}
    for name, value in itself.items():
        values = torch.tensor([each[name] for each in drawn], dtype=torch.float64)
        low, high = (value + (values - values.mean()).quantile(ends)).tolist()
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found
