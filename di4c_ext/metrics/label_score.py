"""An inception-style score by the classifier of one's own labels: sharp and varied images score high.

    exp( E_x KL(p(y | x) || p(y)) ),   p(y) = E_x p(y | x)

The Inception network of the score's name knows ImageNet, not digits or clothes; here p(y | x) is what a classifier
trained on the images' own labels says, so its values compare with those of real images beside it and with nothing
else. It is 1 where all images look alike or say nothing, and the number of labels where each is certain and all occur
equally often.
"""

from __future__ import annotations

import torch
from torch import Tensor


def label_score(probabilities: Tensor) -> float:
    """The score of p(y | x) (N, Y), rows that sum to 1, from N >= 1 samples; ValueError for anything else."""
    p = probabilities.detach().double()
    if p.ndim != 2 or len(p) == 0:
        raise ValueError(f"label_score: probabilities have shape {tuple(probabilities.shape)}; give (N, Y) with N >= 1")
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 1e-3)).all()):
        raise ValueError("label_score: a row is no distribution; give the softmax of a classifier's logits")
    divergence = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, p.mean(0)).sum(1)
    return float(divergence.mean().exp())
