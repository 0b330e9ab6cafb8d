"""k-means of feature vectors: what turns two clouds of points into two histograms that can be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext import random

STARTS = 5
ITERATIONS = 100


def k_means(x: Tensor, num_clusters: int, seed: int = 0, starts: int = STARTS) -> Tensor:
    """The cluster (N,) int64 in 0..num_clusters - 1 of each row of x (N, F), the best of some starts.

    Lloyd's iterations until nothing moves, or 100 of them, from centres chosen by k-means++ (Arthur and Vassilvitskii,
    2007). In float64, a function of the seed. A cluster may be empty where rows are equal.

    Raises ValueError for an x that is no matrix of finite numbers, and numbers of clusters or starts below 1.
    """
    if x.ndim != 2 or x.shape[0] < 1 or not bool(x.isfinite().all()):
        raise ValueError(f"k_means: x must be (N, F), finite, with N of at least 1, got {tuple(x.shape)}")
    if num_clusters < 1 or starts < 1:
        raise ValueError(f"k_means: num_clusters {num_clusters}, starts {starts}; both must be at least 1")
    x = x.double()
    found = [_lloyd(x, _spread(x, num_clusters, key)) for key in random.keys(seed, starts).to(x.device).split(1)]
    return min(found, key=lambda pair: pair[1])[0]


def main_components(x: Tensor, share: float) -> Tensor:
    """x (N, F) about its mean, along the fewest principal axes that hold this share of its variance: (N, F'), float64.

    At least one axis is kept. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"main_components: share must lie in (0, 1], got {share}")
    centred = x.double() - x.double().mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred)  # rising
    held = variances.clamp(min=0).flip(0).cumsum(0)
    kept = int((held < share * held[-1]).sum()) + 1
    return centred @ axes.flip(1)[:, :kept]


def _spread(x: Tensor, num_clusters: int, key: Tensor) -> Tensor:
    """Rows of x as centres (C, F): each in turn likely by its squared distance to those there are."""
    draws = random.uniform(key, num_clusters)[0]
    chosen = [int(draws[0] * len(x))]
    nearest = _distances(x, x[chosen])[:, 0]
    for draw in draws[1:]:
        mass = nearest.cumsum(0)
        chosen.append(int((mass <= draw * mass[-1]).sum().clamp(max=len(x) - 1)))
        nearest = torch.minimum(nearest, _distances(x, x[chosen[-1:]])[:, 0])
    return x[chosen]


def _lloyd(x: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """The clusters, and the sum of squared distances to their centres."""
    own = torch.full((len(x),), -1, device=x.device)
    for _ in range(ITERATIONS):
        distances = _distances(x, centres)
        before, own = own, distances.argmin(1)
        if torch.equal(before, own):
            break
        sums = torch.zeros_like(centres).index_add_(0, own, x)
        counts = torch.bincount(own, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return own, float(_distances(x, centres).gather(1, own[:, None]).sum())


def _distances(x: Tensor, centres: Tensor) -> Tensor:
    """Squared, (N, C)."""
    products = (x**2).sum(1)[:, None] - 2 * x @ centres.T + (centres**2).sum(1)
    return products.clamp(min=0)
