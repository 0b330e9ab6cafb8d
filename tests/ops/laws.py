"""Whether counts follow a law."""

from __future__ import annotations

import torch
from scipy.stats import chi2
from torch import Tensor

_FEWEST = 5  # times a cell must be expected for the statistic to be chi-square's


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """The two-sided p-value of counts (S,) under probs (S,): small as well where they follow the law too closely.

    Cells expected fewer than 5 times are pooled with their neighbours in the order of the classes, so that a tail whose
    mass lies in the wrong place is seen. A cell of probability 0 that was hit fails at once.
    """
    assert counts.shape == probs.shape, (counts.shape, probs.shape)
    assert (counts[probs == 0] == 0).all(), "a class of probability 0 was drawn"
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    expected = probs / probs.sum() * counts.sum()
    cell = _cells(expected)
    expected, counts = (torch.zeros(int(cell.max()) + 1).double().index_add_(0, cell, v) for v in (expected, counts))
    if len(expected) == 1:
        return 1.0
    below = float(chi2.cdf(((counts - expected).square() / expected).sum().item(), len(expected) - 1))
    return 2 * min(below, 1 - below)


def _cells(expected: Tensor) -> Tensor:
    """The cell each class is counted in: its own, or one it shares with other rare classes."""
    rare = expected < _FEWEST
    mass = expected[rare]
    pools = max(1, int(mass.sum() / (2 * _FEWEST)))  # each takes in classes until it is expected 5 to 15 times
    if 0 < mass.sum() < _FEWEST and not rare.all():  # too little for a cell: the rarest of the others joins
        rare[torch.where(rare, torch.inf, expected).argmin()] = True
        mass = expected[rare]
    cell = torch.empty_like(expected, dtype=torch.int64)
    cell[rare] = ((mass.cumsum(0) - mass) / (2 * _FEWEST)).long().clamp(max=pools - 1)
    cell[~rare] = torch.arange(len(expected) - len(mass)) + (pools if len(mass) else 0)
    return cell
