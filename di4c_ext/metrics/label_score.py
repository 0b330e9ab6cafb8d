"""An inception-style score by the classifier of one's own labels: sharp and varied images score high.

    exp( E_x KL(p(y | x) || p(y)) ),   p(y) = E_x p(y | x)

The Inception network of the score's name knows ImageNet, not digits or clothes; here p(y | x) is what a classifier
trained on the images' own labels says, so its values compare with those of real images beside it and with nothing
else. It is 1 where all images look alike or say nothing, and the number of labels where each is certain and all occur
equally often.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def label_score(probabilities: Tensor) -> float:
    """The score of p(y | x) (N, Y), rows that sum to 1, from N >= 1 samples; ValueError for anything else."""
    return label_score_of(probabilities)(torch.ones(len(probabilities)))


def label_score_of(probabilities: Tensor) -> Callable[[Tensor], float]:
    """The score as a function of counts (N,), how often each of the samples is there.

    The mean divergence is E_x sum_y p(y | x) log p(y | x) - sum_y p(y) log p(y): of the samples one number each.
    """
    p = probabilities.detach().double()
    if p.ndim != 2 or len(p) == 0:
        raise ValueError(f"label_score: probabilities have shape {tuple(probabilities.shape)}; give (N, Y) with N >= 1")
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-3)).all()):
        raise ValueError("label_score: a row is no distribution; give the softmax of a classifier's logits")
    own = torch.special.xlogy(p, p).sum(1)

    def score(counts: Tensor) -> float:
        w = counts.double() / counts.sum()
        mean = w @ p
        return float((w @ own - torch.special.xlogy(mean, mean).sum()).exp())

    return score
