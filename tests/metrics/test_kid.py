"""The kernel distance against scikit-learn's kernel, and what makes it unbiased."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import polynomial_kernel

from di4c_ext.metrics import kid
from di4c_ext.metrics.kid import KernelDistance, kernel_distance


def _cloud(n: int, f: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _by_sklearn(real: np.ndarray, samples: np.ndarray) -> float:
    """mean_{i != j} k(x, x) + mean_{i != j} k(y, y) - 2 mean k(x, y)."""
    inside = [polynomial_kernel(x, degree=3, coef0=1) for x in (real, samples)]
    means = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in inside]
    return float(sum(means) - 2 * polynomial_kernel(real, samples, degree=3, coef0=1).mean())


def test_agrees_with_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    real, samples = _cloud(120, 7, 0), _cloud(50, 7, 1, 0.3)
    expected = _by_sklearn(real.numpy(), samples.numpy())
    assert kernel_distance(real, samples) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(sys.modules["di4c_ext.metrics.kid"], "AT_ONCE", 17)
    assert kernel_distance(real, samples) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(real.float(), samples.float()) == pytest.approx(expected, rel=1e-5)


def test_samples_of_one_law_have_distance_0_in_the_mean() -> None:
    """Whatever their number, and on both sides of 0: that is what unbiased means."""
    found = torch.tensor([kernel_distance(_cloud(40, 4, 2 * i), _cloud(9, 4, 2 * i + 1)) for i in range(300)])
    assert abs(float(found.mean())) < 3 * float(found.std()) / 300**0.5
    assert 0.3 < float((found < 0).float().mean()) < 0.8


def test_counts_are_copies_whose_pairs_do_not_count() -> None:
    """By the written-out sum over pairs of different samples, each as often as both are there."""
    real, samples = _cloud(30, 3, 0), _cloud(5, 3, 1, 0.5)
    counts = torch.tensor([2, 0, 1, 3, 0])
    k = polynomial_kernel(samples.numpy(), degree=3, coef0=1)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    among = sum(int(counts[i] * counts[j]) * k[i, j] for i, j in pairs)
    within = polynomial_kernel(real.numpy(), degree=3, coef0=1)
    across = polynomial_kernel(samples.numpy(), real.numpy(), degree=3, coef0=1).mean(1) @ counts.numpy() / 6
    expected = among / sum(int(counts[i] * counts[j]) for i, j in pairs)
    expected += (within.sum() - np.trace(within)) / (30 * 29) - 2 * across
    distance = KernelDistance(real).of(samples)
    assert distance(counts) == pytest.approx(expected, rel=1e-10)
    assert distance(torch.ones(5)) == pytest.approx(_by_sklearn(real.numpy(), samples.numpy()), rel=1e-10)
    assert np.isfinite(distance(torch.tensor([5, 0, 0, 0, 0])))  # no pair at all


def test_subsets_by_their_seed() -> None:
    real, samples = _cloud(300, 4, 0), _cloud(200, 4, 1, 0.5)
    mean, spread = kid(real, samples, num_subsets=40, subset_size=50, seed=3)
    assert (mean, spread) == kid(real, samples, num_subsets=40, subset_size=50, seed=3)
    assert (mean, spread) != kid(real, samples, num_subsets=40, subset_size=50, seed=4)
    assert spread > 0 and mean == pytest.approx(kernel_distance(real, samples), abs=4 * spread / 40**0.5)
    whole, none = kid(real[:200], samples, num_subsets=2)  # 1,000 are more than there are: all of them
    assert whole == pytest.approx(kernel_distance(real[:200], samples)) and none == pytest.approx(0, abs=1e-12)


def test_refusals() -> None:
    x = _cloud(5, 3, 0)
    for bad, message in (
        ((x, x[:, :2]), "2 features against 3"),
        ((x[:1], x), r"the reference have shape \(1, 3\); give features \(N, F\) with N >= 2"),
        ((x, x[0]), r"the samples have shape \(3,\)"),
        ((x, x * torch.nan), "the samples hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_distance(*bad)
    with pytest.raises(ValueError, match="num_subsets 0, subset_size 1"):
        kid(x, x, num_subsets=0, subset_size=1)
