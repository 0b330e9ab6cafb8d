"""Entropy of sampled tokens in nats: a collapsed model has less than the data, a noisy one more."""

from __future__ import annotations

import torch
from torch import Tensor


def position_entropy(tokens: Tensor, num_states: int) -> float:
    """Mean over positions of the entropy of that position's states; tokens (N, D), from N >= 1 samples."""
    return float(_entropy(_counts(tokens, num_states)).mean())


def unigram_entropy(tokens: Tensor, num_states: int) -> float:
    """Entropy of the states of all positions pooled; tokens (N, D)."""
    return float(_entropy(_counts(tokens, num_states).sum(0)))


def _counts(tokens: Tensor, num_states: int) -> Tensor:
    """(D, S) float64: how often each state stands at each position."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"entropy: tokens have shape {tuple(tokens.shape)}; give (N, D) with N and D at least 1")
    x = tokens.long()
    if int(x.min()) < 0 or int(x.max()) >= num_states:
        raise ValueError(f"entropy: tokens span {int(x.min())}..{int(x.max())}, outside 0..{num_states - 1}")
    length = x.shape[1]
    flat = x + torch.arange(length, device=x.device) * num_states
    return torch.bincount(flat.flatten(), minlength=length * num_states).view(length, num_states).double()


def _entropy(counts: Tensor) -> Tensor:
    p = counts / counts.sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1)
