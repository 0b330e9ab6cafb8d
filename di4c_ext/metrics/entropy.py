"""Entropy of sampled tokens in nats: a collapsed model has less than the data, a noisy one more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_AT_ONCE = 1000  # samples whose states are looked up together


def position_entropy(tokens: Tensor, num_states: int) -> float:
    """Mean over positions of the entropy of that position's states; tokens (N, D), from N >= 1 samples."""
    return float(_entropy(_counts(tokens, num_states)).mean())


def unigram_entropy(tokens: Tensor, num_states: int) -> float:
    """Entropy of the states of all positions pooled; tokens (N, D)."""
    return float(_entropy(_counts(tokens, num_states).sum(0)))


def unigram_entropy_without(tokens: Tensor, num_states: int) -> Tensor:
    """(N,) float64: `unigram_entropy` without each of the samples, N at least 2: what an interval is made of."""
    if len(tokens) < 2:
        raise ValueError("unigram_entropy_without: of one sample nothing is left; give 2 or more")
    x = tokens.cpu()
    pooled = _counts(x, num_states).sum(0)
    every, left = torch.special.xlogy(pooled, pooled).sum(), pooled.sum() - x.shape[1]
    found = []
    for sample in x:
        # H = log T - sum c log c / T, where only the sample's own states change their counts c.
        states, own = sample.long().unique(return_counts=True)
        before, after = pooled[states], pooled[states] - own
        changed = torch.special.xlogy(after, after).sum() - torch.special.xlogy(before, before).sum()
        found.append(left.log() - (every + changed) / left)
    return torch.stack(found)


def entropies_of(tokens: Tensor, num_states: int) -> Callable[[Tensor], dict[str, float]]:
    """Both entropies of tokens (N, D), to first order functions of counts (N,): how often each sample is there.

    All ones is the sample as it is. To first order an entropy changes by the cross-entropies -log p of the samples that
    are added, so one number for each of them is enough, whatever S and D are.
    """
    counts = _counts(tokens, num_states)
    values, surprises = {}, {}
    for name, law in (("position_entropy", counts), ("unigram_entropy", counts.sum(0, keepdim=True))):
        log_p = (law / law.sum(1, keepdim=True)).log().expand(len(counts), -1)
        parts = [log_p.gather(1, some.long().T).mean(0) for some in tokens.split(_AT_ONCE)]
        values[name], surprises[name] = float(_entropy(law).mean()), -torch.cat(parts)

    def entropies(times: Tensor) -> dict[str, float]:
        w = times.to(counts.device, torch.float64) / times.sum()
        return {name: values[name] + float(w @ (surprises[name] - surprises[name].mean())) for name in values}

    return entropies


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
