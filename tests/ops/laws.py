"""Whether counts follow a law."""

from __future__ import annotations

from scipy.stats import chi2
from torch import Tensor, cat


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """The p-value of counts (S,) under probs (S,); cells expected fewer than 5 times are pooled into one.

    A cell of probability 0 that was hit fails at once.
    """
    assert (counts[probs == 0] == 0).all(), "a class of probability 0 was drawn"
    expected = probs.double() * counts.sum()
    rare = expected < 5
    observed = cat([counts[rare].sum()[None].double(), counts[~rare].double()])
    expected = cat([expected[rare].sum()[None], expected[~rare]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum().item()
    return float(chi2.sf(statistic, max(1, len(expected) - 1)))
