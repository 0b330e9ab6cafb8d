"""Kernel distance (KID): the squared maximum mean discrepancy of two clouds of features, unbiased.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    k(x, y) = (x.y / F + 1)^3

Its mean is 0 for two samples of one law, whatever their sizes, so figures of different numbers of samples compare, and
one of them may be below 0. It assumes no Gaussian. All in float64.

Reference: Binkowski, Sutherland, Arbel, Gretton, Demystifying MMD GANs, 2018 (arXiv 1801.01401), section 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from di4c_ext import random

AT_ONCE = 1000  # rows of a kernel's matrix of which only the sum is wanted


class KernelDistance:
    """The distance of any samples from one and the same reference, features (M, F), M >= 2."""

    def __init__(self, real: Tensor) -> None:
        self.real = checked_cloud(real, "kid", "the reference")
        m = len(self.real)
        sums = sum(float(_kernel(some, self.real).sum()) for some in self.real.split(AT_ONCE))
        self._within = (sums - float(_kernel_of_itself(self.real).sum())) / (m * (m - 1))

    def of(self, samples: Tensor) -> Callable[[Tensor], float]:
        """The distance of samples (N, F), N >= 2, as a function of counts (N,): how often each of them is there.

        All ones is the sample as it is; pairs of one and the same sample never count. (N, N) float64 are held.
        """
        x = checked_cloud(samples, "kid", "the samples")
        if x.shape[1] != self.real.shape[1]:
            raise ValueError(f"kid: {x.shape[1]} features against {self.real.shape[1]}; use one feature space")
        kernel = _kernel(x, x).fill_diagonal_(0)
        across = torch.cat([_kernel(some, self.real).mean(1) for some in x.split(AT_ONCE)])

        def distance(counts: Tensor) -> float:
            w = counts.double()
            n = w.sum()
            pairs = (n * n - w @ w).clamp_min(1)  # none where all are copies of one
            return float(w @ (kernel @ w) / pairs + self._within - 2 * (w @ across) / n)

        return distance


def kernel_distance(real: Tensor, samples: Tensor) -> float:
    """The unbiased estimate from all pairs of features (M, F) and (N, F); ValueError for fewer than 2 of a side."""
    return KernelDistance(real).of(samples)(torch.ones(len(samples)))


def kid(
    real: Tensor, samples: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the distances of random subsets, the published way for sets of any size.

    Args:
        real, samples: features (M, F) and (N, F).
        num_subsets: pairs of subsets, each of subset_size rows of either side, or of all where there are fewer.
        seed: which rows; a function of (seed, number of the subset).

    Raises:
        ValueError: for num_subsets below 1, subset_size below 2, and what `kernel_distance` refuses.
    """
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f"kid: num_subsets {num_subsets}, subset_size {subset_size}; give at least 1 subset of 2 or more"
        )
    found = []
    for i in range(num_subsets):
        chosen = [
            x[random.fold_in(random.keys(seed, len(x)), 2 * i + side).argsort()[:subset_size]]
            for side, x in enumerate((real, samples))
        ]
        found.append(kernel_distance(*chosen))
    distances = torch.tensor(found, dtype=torch.float64)
    return float(distances.mean()), float(distances.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _kernel_of_itself(x: Tensor) -> Tensor:
    return x.square().sum(1).div_(x.shape[1]).add_(1).pow_(3)


def checked_cloud(features: Tensor, op: str, which: str) -> Tensor:
    """features (N, F) in float64 on the CPU; ValueError naming op and side for another shape, N < 2, or NaN."""
    x = features.detach().to("cpu", torch.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"{op}: {which} have shape {tuple(features.shape)}; give features (N, F) with N >= 2")
    if not torch.isfinite(x).all():
        raise ValueError(f"{op}: {which} hold NaN or infinity; look at the images they were computed from")
    return x
