"""The divergence frontier: areas known in closed form, and clouds that agree, lie apart, or leave something out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from di4c_ext.metrics.clusters import k_means, main_components
from di4c_ext.metrics.mauve import frontier_area, mauve


def clouds(sizes: list[int], seed: int, width: int = 6) -> Tensor:
    """A cloud about each of as many directions, so many points of each."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.eye(width)[: len(sizes)] * 5
    return torch.cat([c + 0.3 * torch.randn(n, width, generator=g) for c, n in zip(centres, sizes, strict=True)])


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_areas_in_closed_form(scale: float) -> None:
    """Equal laws 1; laws apart: x = (1 - w)^c and y = w^c, c B(c + 1, c) in all."""
    one, other = torch.tensor([0.2, 0.8, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    apart = scale * math.gamma(scale + 1) * math.gamma(scale) / math.gamma(2 * scale + 1)
    found = frontier_area(torch.stack([one, one]), torch.stack([one, other]), scale)
    assert found.tolist() == pytest.approx([1.0, apart], abs=1e-5)


def test_area_is_that_under_the_curve() -> None:
    """By a finer and independent sum over the curve, y as a function of x."""
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), torch.tensor([0.1, 0.3, 0.3, 0.3]).double()
    assert float(frontier_area(p, q)) == pytest.approx(float(frontier_area(q, p)), rel=1e-4)
    points = [
        [math.exp(-5 * _kl(law, (w * p + (1 - w) * q).tolist())) for law in (q.tolist(), p.tolist())]
        for w in (i / 5000 for i in range(1, 5000))
    ]
    points = [[1.0, 0.0], *points, [0.0, 1.0]]
    area = sum((x - x_next) * (y + y_next) / 2 for (x, y), (x_next, y_next) in itertools.pairwise(points))
    assert float(frontier_area(p, q)) == pytest.approx(area, abs=1e-4)


def test_agreement_omission_and_distance() -> None:
    real = clouds([60, 60, 60], 0)
    like, few = mauve(real, clouds([60, 60, 60], 1), num_clusters=6), mauve(real, clouds([180], 2), num_clusters=6)
    apart = mauve(real, -real, num_clusters=6)
    assert like.value > 0.9 > 0.5 > few.value > apart.value == pytest.approx(0.004, abs=1e-4)
    assert mauve(real, real).value == pytest.approx(1.0)
    assert mauve(3 * real, clouds([60, 60, 60], 1), num_clusters=6).value == pytest.approx(like.value, abs=1e-6)


def test_of_separated_clouds_it_is_the_area_of_their_shares() -> None:
    """k-means finds three clouds, and nothing else matters."""
    real, samples = clouds([50, 30, 20], 3), clouds([10, 60, 30], 4)
    wanted = frontier_area(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3]))
    found = mauve(real, samples, num_clusters=3)
    assert found.value == pytest.approx(float(wanted), abs=1e-6)
    without = found.without()
    for i, left in ((0, [9, 60, 30]), (10, [10, 59, 30]), (99, [10, 60, 29])):
        one_less = frontier_area(torch.tensor([0.5, 0.3, 0.2]), torch.tensor(left) / 99)
        assert float(without[i]) == pytest.approx(float(one_less), abs=1e-6)
    assert without.shape == (100,)


def test_the_number_of_clusters_and_the_seed() -> None:
    real, samples = torch.randn(2, 80, 5, generator=torch.Generator().manual_seed(5)).unbind()
    assert mauve(real, samples).real.shape == (5, 8), "a tenth of the smaller side"
    assert mauve(real[:9], samples).real.shape == (5, 2)
    assert mauve(real, samples, seed=1).value != mauve(real, samples).value == mauve(real, samples, seed=0).value


def test_bad_features_are_refused() -> None:
    x = torch.randn(8, 3)
    for real, samples, told, message in (
        (x, torch.randn(8, 4), {}, r"of one width are wanted, M of at least 2, got \(8, 3\) and \(8, 4\)"),
        (x, x[:1], {}, r"got \(8, 3\) and \(1, 3\)"),
        (x, x, {"clusterings": 0}, "clusterings 0 and scale 5"),
        (x, x, {"scale": 0.0}, "scale 0.0; must be at least 1, and positive"),
        (x, x, {"num_clusters": 0}, "num_clusters 0, starts 1"),
        (x * math.nan, x, {}, "features are not all finite"),
    ):
        with pytest.raises(ValueError, match=message):
            mauve(real, samples, **told)


def test_k_means_is_scikit_learns() -> None:
    """Of clouds that lie apart the same clusters; of one cloud sums of squares as small as theirs."""
    cluster = pytest.importorskip("sklearn.cluster")
    x = clouds([20, 30, 40], 6)
    own = k_means(x, 3)
    assert sorted(own.bincount().tolist()) == [20, 30, 40] and (own[:20] == own[0]).all()
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(7)).double()
    wanted = cluster.KMeans(8, n_init=5, random_state=0).fit(x.numpy()).inertia_
    own = k_means(x, 8)
    found = sum(float(((x[own == i] - x[own == i].mean(0)) ** 2).sum()) for i in range(8))
    assert found < 1.03 * wanted
    with pytest.raises(ValueError, match=r"x must be \(N, F\), finite, .* got \(4,\)"):
        k_means(x[:4, 0], 2)
    assert torch.equal(own, k_means(x, 8)) and int(k_means(x[:1].expand(9, -1), 3).max()) == 0


def test_main_components_keep_the_share() -> None:
    g = torch.Generator().manual_seed(8)
    x = torch.randn(300, 3, generator=g).double() * torch.tensor([3.0, 1.0, 0.3])
    x = x @ torch.linalg.qr(torch.randn(3, 3, generator=g).double())[0]
    total = float(x.var(0).sum())
    for share, width in ((0.5, 1), (0.95, 2), (1.0, 3)):
        kept = main_components(x, share)
        assert kept.shape == (300, width) and float(kept.var(0).sum()) >= share * total * (1 - 1e-9)
    assert torch.allclose(torch.cdist(main_components(x, 1.0), main_components(x, 1.0)), torch.cdist(x, x), atol=1e-6)
    assert main_components(torch.ones(4, 3), 0.9).shape == (4, 1)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        main_components(x, 0)
