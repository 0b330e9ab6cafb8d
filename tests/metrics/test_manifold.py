"""Precision, recall, density and coverage against scikit-learn's nearest neighbours, and figures one can see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from di4c_ext.metrics.manifold import FIGURES, Manifold, manifold_figures


def _cloud(n: int, f: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _written_out(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """x real, y sampled. A point is the first of its own neighbours."""
    radius = {
        (name, k): NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, k]
        for name, points in (("x", x), ("y", y))
        for k in (3, 5)
    }
    distance = cdist(x, y)
    wide = distance <= radius["x", 5][:, None]
    return {
        "precision_k": float((distance <= radius["x", 3][:, None]).any(0).mean()),
        "recall_k": float((distance <= radius["y", 3][None]).any(1).mean()),
        "density": float(wide.sum(0).mean() / 5),
        "coverage": float(wide.any(1).mean()),
    }


@pytest.mark.parametrize(("f", "shift"), [(2, 0.0), (2, 1.0), (16, 0.4)])
def test_agrees_with_sklearn(f: int, shift: float) -> None:
    x, y = _cloud(150, f, 0), 1.2 * _cloud(90, f, 1, shift)
    found = manifold_figures(x + 100, y + 100)  # where the clouds lie is nothing to them
    assert list(found) == list(FIGURES)
    assert found == pytest.approx(_written_out(x.numpy(), y.numpy()), abs=1e-12)
    assert all(0 < value < 2 for value in found.values())


def test_figures_one_can_see() -> None:
    real = _cloud(200, 3, 0)
    far = manifold_figures(real, real + 1000)
    assert far == {"precision_k": 0, "recall_k": 0, "density": 0, "coverage": 0}
    collapsed = manifold_figures(real, real[:1] + 1e-3 * _cloud(200, 3, 1))
    assert collapsed["precision_k"] == 1 and collapsed["recall_k"] < 0.05 and collapsed["coverage"] < 0.2
    noisy = manifold_figures(real, 20 * _cloud(200, 3, 2))
    assert noisy["precision_k"] < 0.1 and noisy["recall_k"] > 0.9 and noisy["density"] < 0.1


def test_copies_of_real_images_are_in_their_place() -> None:
    """Each is within its own ball, and where images stand twice and thrice, balls of radius 0 hold their copies."""
    real = _cloud(60, 5, 0)
    thrice = torch.cat([real[:20]] * 6)
    assert manifold_figures(real, real)["precision_k"] == manifold_figures(real, real)["coverage"] == 1
    assert manifold_figures(thrice * 1e3 + 7, real[:20] * 1e3 + 7)["coverage"] == 1


def test_counts_are_how_often_samples_are_there() -> None:
    x, y = _cloud(80, 3, 0), _cloud(40, 3, 1, 0.8)
    figures = Manifold(x).of(y)
    counts = torch.tensor([0, 1, 2, 1] * 10)
    found, whole, part = figures(counts), figures(torch.ones(40)), figures((counts > 0).long())
    one_by_one = [figures(torch.eye(40)[i]) for i in range(40)]
    for name in ("precision_k", "density"):  # means over samples
        expected = sum(float(counts[i]) / 40 * one_by_one[i][name] for i in range(40))
        assert found[name] == pytest.approx(expected, abs=1e-12)
    for name in ("recall_k", "coverage"):  # what any of them reaches
        assert found[name] == part[name] and max(each[name] for each in one_by_one) < found[name] < whole[name]


def test_fewer_images_than_neighbours() -> None:
    x, y = _cloud(3, 2, 0), _cloud(2, 2, 1)
    found = manifold_figures(x, y)
    assert all(np.isfinite(value) for value in found.values())
    for bad, message in (
        ((x[:1], y), r"the reference have shape \(1, 2\)"),
        ((x, y[:, :1]), "1 features against 2"),
        ((x, y * torch.inf), "the samples hold NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            manifold_figures(*bad)
