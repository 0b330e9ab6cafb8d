"""Precision, recall, density and coverage: how much of what is sampled looks real, and how much of the real is sampled.

A cloud of features stands for the region within the balls around its members, each as far as its k-th nearest neighbour
among the others. With x_i real and y_j sampled, N_k the radius,

    precision   share of the y_j within any ball of a real x_i                     k = 3
    recall      share of the x_i within any ball of a sampled y_j                  k = 3
    density     mean over j of the number of real balls that hold y_j, over k      k = 5; may be above 1
    coverage    share of the real balls that hold any y_j                          k = 5

The first two judge a Fréchet distance's two faults, poor images and missing ones, apart; one real image that stands
alone makes a ball in which anything is precise, which the other two weigh less. All of them move with the numbers of
images on both sides, so they are read beside those of real images.

References: Kynkäänniemi et al., Improved precision and recall metric, 2019 (arXiv 1904.06991), k = 3; Naeem et al.,
Reliable fidelity and diversity metrics, 2020 (arXiv 2002.09797), k = 5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from di4c_ext.metrics.kid import checked_cloud

PRECISION_K, DENSITY_K = 3, 5  # neighbours, as the two papers have them; of fewer images, all the others
FIGURES = ("precision_k", "recall_k", "density", "coverage")
_ROUNDING = 1e-12  # of the largest norm: distances this close are equal, so that copies of images are counted as such


class Manifold:
    """The region of real images, features (M, F), M >= 2; ValueError for fewer, or features that are not finite."""

    def __init__(self, real: Tensor) -> None:
        x = checked_cloud(real, "manifold", "the reference")
        self._centre = x.mean(0)  # distances are differences of inner products: small ones keep their digits
        self._real = x - self._centre
        self._radii = _radii(self._real)

    def of(self, samples: Tensor) -> Callable[[Tensor], dict[str, float]]:
        """The figures of samples (N, F), N >= 2, as a function of counts (N,): how often each of them is there.

        All ones is the sample as it is. The balls around samples stay those of the whole sample: copies would make
        them vanish.
        """
        y = checked_cloud(samples, "manifold", "the samples")
        if y.shape[1] != self._real.shape[1]:
            raise ValueError(f"manifold: {y.shape[1]} features against {self._real.shape[1]}; use one feature space")
        y = y - self._centre
        distance = _squared_distances(y, self._real)  # (N, M)
        slack = _slack(y, self._real)
        narrow, wide = (distance <= radii + slack for radii in self._radii)
        reached = distance <= _radii(y)[0][:, None] + slack
        precise, held = narrow.any(1).double(), wide.sum(1).double() / min(DENSITY_K, len(self._real) - 1)

        def figures(counts: Tensor) -> dict[str, float]:
            n, w, there = counts.sum(), counts.double(), counts > 0
            recalled, covered = (balls[there].any(0).double().mean() for balls in (reached, wide))
            return dict(zip(FIGURES, map(float, (w @ precise / n, recalled, w @ held / n, covered)), strict=True))

        return figures


def manifold_figures(real: Tensor, samples: Tensor) -> dict[str, float]:
    """precision_k, recall_k, density and coverage of samples (N, F) against real features (M, F)."""
    return Manifold(real).of(samples)(torch.ones(len(samples)))


def _radii(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of each row from its nearest among the others that the two k name, (N,) each."""
    distance = _squared_distances(x, x).fill_diagonal_(torch.inf)
    nearest = distance.topk(min(max(PRECISION_K, DENSITY_K), len(x) - 1), largest=False).values
    narrow, wide = (nearest[:, min(k, nearest.shape[1]) - 1] for k in (PRECISION_K, DENSITY_K))
    return narrow, wide


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    products = (x @ y.T).mul_(-2)
    return products.add_(x.square().sum(1)[:, None]).add_(y.square().sum(1)).clamp_min_(0)


def _slack(x: Tensor, y: Tensor) -> float:
    return _ROUNDING * max(float(side.square().sum(1).max()) for side in (x, y))
