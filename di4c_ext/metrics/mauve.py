"""How near sampled text lies to real text: the area under the divergence frontier of two laws (MAUVE).

    mauve(features_of_real, features_of_samples).value

Features of both sides, the vectors that a model makes of a text, are scaled to length 1, cut to the principal axes that
hold 90% of their variance and put into C clusters together, so that the real texts become a histogram P and the samples
a histogram Q. A mixture R = w P + (1 - w) Q of the two is missed in two ways,

    x(w) = exp(-c KL(Q || R))      by samples that are like no real text
    y(w) = exp(-c KL(P || R))      by real texts that no sample is like

and the figure is the area under the curve (x, y), w from 0 to 1, closed by y = 1 on its left: 1 where P = Q, near 0 (at
c = 5: 0.004) where no cluster holds both.

It falls with the number of texts and hangs on C, on the model whose features they are, and a little on where k-means
starts, hence the mean over some starts. So it compares at one number of samples and beside what real text scores.

Reference: Pillutla et al., MAUVE: Measuring the Gap Between Neural Text and Human Text, arXiv 2102.01454, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from di4c_ext.metrics.clusters import k_means, main_components

SCALE = 5.0  # c
SHARE = 0.9  # of the variance that is kept
CLUSTERINGS = 5  # of which the mean is taken
_MIXTURES = 257  # at which the curve is known


@dataclass(frozen=True)
class Mauve:
    """value: the figure, in [0, 1]. It is the mean over some clusterings, histograms (clusterings, C) of counts.

    clusters (clusterings, M) int64: where each of the samples lies.
    """

    value: float
    real: Tensor
    samples: Tensor
    clusters: Tensor
    scale: float

    def without(self) -> Tensor:
        """(M,) float64 on the CPU: the figure of all samples but one, for each of them; the clusters stay."""
        total = torch.zeros(self.clusters.shape[1], dtype=torch.float64, device=self.clusters.device)
        for real, samples, own in zip(self.real, self.samples, self.clusters, strict=True):
            # Samples of one cluster are alike, so there are at most C different ways to leave one out.
            fewer = (samples - torch.eye(len(samples), dtype=torch.float64, device=samples.device)).clamp(min=0)
            p, q = real / real.sum(), fewer / (samples.sum() - 1)
            total += frontier_area(p.expand_as(q), q, self.scale)[own]
        return (total / len(self.clusters)).cpu()


def mauve(
    real: Tensor,
    samples: Tensor,
    *,
    num_clusters: int | None = None,
    scale: float = SCALE,
    clusterings: int = CLUSTERINGS,
    seed: int = 0,
) -> Mauve:
    """The figure of samples (M, F) held against real ones (N, F), each a vector of features; M at least 2.

    num_clusters: C; None: a tenth of the smaller side, at least 2, as published. scale: c. clusterings, seed: the mean
    of so many clusterings is taken, whose starts the seed draws.

    Raises ValueError for features of other shapes, or that are not finite, and settings out of range.
    """
    if real.ndim != 2 or samples.ndim != 2 or real.shape[1] != samples.shape[1] or len(real) < 1 or len(samples) < 2:
        raise ValueError(
            f"mauve: features (N, F) and (M, F) of one width are wanted, M of at least 2, got {tuple(real.shape)} and "
            f"{tuple(samples.shape)}"
        )
    if clusterings < 1 or not scale > 0:
        raise ValueError(f"mauve: clusterings {clusterings} and scale {scale}; must be at least 1, and positive")
    chosen = max(2, round(min(len(real), len(samples)) / 10)) if num_clusters is None else num_clusters
    both = torch.cat([real.double(), samples.double()])
    if not bool(both.isfinite().all()):
        raise ValueError("mauve: the features are not all finite; a model in float16 may overflow, take another dtype")
    x = main_components(torch.nn.functional.normalize(both, dim=1), SHARE)
    own = torch.stack([k_means(x, chosen, seed + i, starts=1) for i in range(clusterings)])
    counts = torch.nn.functional.one_hot(own, chosen).double()
    p, q = counts[:, : len(real)].sum(1), counts[:, len(real) :].sum(1)
    value = frontier_area(p / len(real), q / len(samples), scale).mean()
    return Mauve(float(value), p, q, own[:, len(real) :], scale)


def frontier_area(p: Tensor, q: Tensor, scale: float = SCALE) -> Tensor:
    """The area of histograms p and q (..., C) that sum to 1; (...), float64."""
    p, q = p.double(), q.double()
    w = torch.linspace(0, 1, _MIXTURES, dtype=torch.float64, device=p.device)[:, None]
    mixed = w * p[..., None, :] + (1 - w) * q[..., None, :]
    x, y = (torch.exp(-scale * _kl(law[..., None, :], mixed)) for law in (q, p))
    # x falls from 1 to its end as y rises to 1; left of its end the curve is flat.
    return -torch.trapezoid(y, x) + x[..., -1]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), infinite where q leaves out a cluster of p."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
