"""The Fréchet distance against scipy's matrix square root, and its corner cases."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from di4c_ext.metrics import Moments, frechet_distance
from di4c_ext.metrics.frechet import frechet_of


def _features(n: int, f: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(f, f, generator=generator, dtype=torch.float64)
    return torch.randn(n, f, generator=generator, dtype=torch.float64) @ mix + shift


@pytest.mark.parametrize("f", [1, 2, 32])
def test_agrees_with_scipy(f: int) -> None:
    a, b = _features(500, f, 1), _features(300, f, 2, shift=0.7)
    cov_a, cov_b = (np.atleast_2d(np.cov(x.numpy().T)) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    mean_term = float((a.mean(0) - b.mean(0)).square().sum())
    expected = mean_term + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real
    assert frechet_distance(Moments(a), Moments(b)) == pytest.approx(expected, rel=1e-9)


def test_streaming_is_one_pass_even_far_from_zero() -> None:
    x = _features(1000, 8, 3) + 1e6
    parts = Moments()
    for some in x.split([1, 7, 0, 500, 492]):
        parts.update(some)
    whole = Moments(x)
    assert parts.n == whole.n == 1000
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.covariance, torch.cov(x.T), rtol=1e-8, atol=1e-8)


def test_equal_samples_are_at_distance_zero_and_a_shift_costs_its_square() -> None:
    x = _features(200, 5, 4)
    assert frechet_distance(Moments(x), Moments(x)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(Moments(x), Moments(x + 3)) == pytest.approx(45, rel=1e-9)


def test_singular_covariances() -> None:
    """A pixel that is always white has variance 0; two such sets differ by their means alone."""
    x = _features(50, 4, 5)
    x[:, 2] = 1.0
    y = x.clone()
    y[:, 2] = 0.0
    assert frechet_distance(Moments(x), Moments(y)) == pytest.approx(1, rel=1e-9)


def test_refuses_what_has_no_distance() -> None:
    x = _features(10, 3, 6)
    with pytest.raises(ValueError, match="needs at least 2"):
        frechet_distance(Moments(x[:1]), Moments(x))
    with pytest.raises(ValueError, match="3 features against 2"):
        frechet_distance(Moments(x), Moments(x[:, :2]))
    with pytest.raises(ValueError, match=r"shape \(10, 2\); give \(N, 3\)"):
        Moments(x).update(x[:, :2])
    with pytest.raises(ValueError, match="NaN or infinity"):
        Moments(torch.full((3, 2), torch.nan))


def test_without_a_part_is_the_rest() -> None:
    x = _features(400, 6, 7) + 10
    whole, part, rest = Moments(x), Moments(x[:150]), Moments(x[150:])
    left = whole.without(part)
    assert left.n == 250
    torch.testing.assert_close(left.mean, rest.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(left.covariance, rest.covariance, rtol=1e-10, atol=1e-10)
    same = whole.without(Moments())
    assert same.n == 400 and torch.equal(same.covariance, whole.covariance)
    with pytest.raises(ValueError, match="400 vectors cannot be part of these 150"):
        part.without(whole)


def test_the_root_follows_what_is_added() -> None:
    x = _features(100, 3, 8)
    moments = Moments(x[:50])
    first = moments.root
    torch.testing.assert_close(first @ first, moments.covariance)
    moments.update(x[50:])
    torch.testing.assert_close(moments.root @ moments.root, torch.cov(x.T))


def test_counts_are_how_often_samples_are_there() -> None:
    """Exact for all ones, its derivative the difference quotient of the distance of so weighted samples."""
    reference, x = Moments(_features(600, 5, 9)), _features(300, 5, 10, 0.4)
    distance = frechet_of(reference, x)
    assert distance(torch.ones(300)) == pytest.approx(frechet_distance(reference, Moments(x)), rel=1e-12)

    def weighted(share: float, i: int) -> float:
        w = torch.full((300,), (1 - share) / 300, dtype=torch.float64)
        w[i] += share
        mean = w @ x
        scatter = ((x - mean).T * w) @ (x - mean) * 300
        return frechet_distance(reference, Moments.of(300, mean, scatter * 299 / 300))

    for i in (0, 17, 299):
        slope = (weighted(1e-5, i) - weighted(-1e-5, i)) / 2e-5
        counts = torch.zeros(300)
        counts[i] = 1
        assert distance(counts) - distance(torch.ones(300)) == pytest.approx(slope, rel=1e-2), i


def test_as_wide_as_other_samples_scatter() -> None:
    reference = Moments(_features(5000, 4, 11))
    sets = [_features(6000, 4, 11, 0.3)[300 * i : 300 * (i + 1)] for i in range(20)]
    scatter = torch.tensor([frechet_distance(reference, Moments(x)) for x in sets]).std()
    drawn = torch.randint(0, 300, (200, 300), generator=torch.Generator().manual_seed(0))
    distance = frechet_of(reference, sets[0])
    spread = torch.tensor([distance(torch.bincount(places, minlength=300)) for places in drawn]).std()
    assert 0.6 < float(spread / scatter) < 1.6
    with pytest.raises(ValueError, match="7 samples of 4 features; give 8 samples or more"):
        frechet_of(reference, sets[0][:7])
