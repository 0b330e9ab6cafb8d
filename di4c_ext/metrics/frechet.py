"""Fréchet distance between two Gaussians fitted to feature vectors, in float64.

    d^2 = |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^{1/2})

The distance of two finite samples of one and the same distribution is above 0 and falls with their sizes, so no
distance should be read without the sizes and a real-against-real floor beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of a stream of feature vectors (N, F), merged batch by batch without cancellation."""

    def __init__(self, features: Tensor | None = None) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)
        self._root: Tensor | None = None
        if features is not None:
            self.update(features)

    def update(self, features: Tensor) -> Moments:
        """Adds features (N, F); raises ValueError for another shape, another F, or a value that is not finite."""
        x = features.detach().to("cpu", torch.float64)
        if x.ndim != 2 or (self.n and x.shape[1] != len(self.mean)):
            wanted = f"(N, {len(self.mean)})" if self.n else "(N, F)"
            raise ValueError(f"Moments: features have shape {tuple(features.shape)}; give {wanted}")
        if not torch.isfinite(x).all():
            raise ValueError("Moments: features hold NaN or infinity; look at the samples they were computed from")
        if len(x) == 0:
            return self
        if self.n == 0:
            self.mean = torch.zeros(x.shape[1], dtype=torch.float64)
            self._scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        mean = x.mean(0)
        self._root = None
        total, delta, centred = self.n + len(x), mean - self.mean, x - mean
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.n * len(x) / total)
        self.mean += delta * (len(x) / total)
        self.n = total
        return self

    @classmethod
    def of(cls, n: int, mean: Tensor, scatter: Tensor) -> Moments:
        """Of n vectors whose mean (F,) and sum of centred outer products (F, F), float64, are known."""
        moments = cls()
        moments.n, moments.mean, moments._scatter = n, mean, scatter
        return moments

    @property
    def scatter(self) -> Tensor:
        """Sum of the centred vectors' outer products, (F, F)."""
        return self._scatter

    def without(self, part: Moments) -> Moments:
        """The moments of what was seen here and not in `part`, whose vectors were all seen here."""
        if part.n > self.n or (part.n and len(part.mean) != len(self.mean)):
            raise ValueError(f"Moments.without: {part.n} vectors cannot be part of these {self.n}")
        rest = Moments()
        rest.n = self.n - part.n
        if rest.n and part.n:
            rest.mean = self.mean + (self.mean - part.mean) * (part.n / rest.n)
            delta = part.mean - rest.mean
            rest._scatter = self._scatter - part._scatter - torch.outer(delta, delta) * (part.n * rest.n / self.n)
        elif rest.n:
            rest.mean, rest._scatter = self.mean.clone(), self._scatter.clone()
        return rest

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (F, F)."""
        if self.n < 2:
            raise ValueError(f"Moments: {self.n} vector(s) seen; a covariance needs at least 2")
        return self._scatter / (self.n - 1)

    @property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance (F, F), computed once."""
        if self._root is None:
            value, vector = torch.linalg.eigh(self.covariance)
            self._root = (vector * value.clamp_min(0).sqrt()) @ vector.T
        return self._root


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance, never below 0; exact for singular covariances too.

    tr((C_a C_b)^{1/2}) is the sum of the square roots of the eigenvalues of the symmetric R C_b R, R = C_a^{1/2}; the
    root stays with `a`, so let that be the one of several distances.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"frechet_distance: {len(a.mean)} features against {len(b.mean)}; use one feature space")
    cov_a, cov_b = a.covariance, b.covariance
    cross = torch.linalg.eigvalsh(a.root @ cov_b @ a.root).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def frechet_of(reference: Moments, features: Tensor) -> Callable[[Tensor], float]:
    """The distance of samples (N, F) from a reference, to first order a function of counts (N,), how often each of
    them is there; all ones is the sample as it is.

    With C and m the samples' covariance and mean, R the root of the reference's, T = R (R C R)^{-1/2} R the linear map
    that carries one Gaussian to the other, a sample y = x - m moves the distance by 2 (m - m_ref).y + y (I - T) y, less
    the mean of that. A bootstrap that draws the covariance anew instead takes the bias of copied samples for scatter,
    and F^3 operations a draw.

    Raises ValueError for N < 2 F, where the covariance of samples has next to no inverse.
    """
    n, size = features.shape
    if n < 2 * size:
        raise ValueError(f"frechet_of: {n} samples of {size} features; give {2 * size} samples or more")
    moments = Moments(features)
    distance = frechet_distance(reference, moments)
    value, vector = torch.linalg.eigh(reference.root @ moments.covariance @ reference.root)
    kept = value > value[-1] * size * torch.finfo(torch.float64).eps
    inverse_root = (vector[:, kept] * value[kept].rsqrt()) @ vector[:, kept].T
    form = torch.eye(size, dtype=torch.float64) - reference.root @ inverse_root @ reference.root
    y = features.detach().to("cpu", torch.float64) - moments.mean
    moved = 2 * y @ (moments.mean - reference.mean) + ((y @ form) * y).sum(1)
    moved -= moved.mean()
    return lambda counts: distance + float(counts.double() @ moved / counts.sum())
