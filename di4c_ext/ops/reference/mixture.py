"""The mixture of L components: log-probabilities of whole sequences, and divergence from its marginal.

With p_l^d = softmax of logits[b, l, d] and LME the log of a mean of exponentials over l:

    joint       = LME_l sum_d w_d log p_l^d(x^d)
    correlation = LME_l sum_d w_d (log p_l^d(x^d) - log pbar^d(x^d)),   pbar^d = mean_l p_l^d
    kl          = sum_d w_d KL(mean_t softmax target[b, t, d] || pbar^d)

Kernels keep every row's log-sum-exp as two planes, [0] its maximum m and [1] log sum exp(x - m), so that backward's
log-probabilities (x - m) - log_sum lose nothing where m is large. Rows of weight 0 hold 0 in both; a bad row (NaN,
+inf, -inf throughout) has NaN in [1] and anything in [0].

A position of weight 0 is not looked at. Where x^d has probability 0 under every component, joint is -inf and the
position counts as 0 in correlation and in every gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def unread(logits: Tensor, weight: Tensor | None) -> Tensor:
    """Logits (B, ..., D, S) in the accumulation dtype, rows of weight 0 replaced by zeros: NaN there is never seen.

    Contiguous: the order in which torch sums depends on strides, and results must not.
    """
    x = logits.to(accumulation_dtype(logits)).contiguous()
    if weight is None:
        return x
    shape = (weight.shape[0], *[1] * (x.dim() - 3), weight.shape[1], 1)
    return torch.where(weight.view(shape) == 0, 0.0, x)


def weighted(weight: Tensor | None, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0 whatever the value; shapes broadcast."""
    if weight is None:
        return value
    weight = weight.to(value.dtype)
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, value))


def log_mean_exp(x: Tensor, dim: int) -> Tensor:
    """LME; -inf where every term is, with gradient 0 there. NaN stays NaN."""
    dead = torch.isneginf(x).all(dim, keepdim=True)
    lse = torch.logsumexp(torch.where(dead, 0.0, x), dim) - math.log(x.shape[dim])
    return torch.where(dead.squeeze(dim), -math.inf, lse)


def where_used(weight: Tensor | None, value: Tensor) -> Tensor:
    """value (..., B, L, D) of rows, 0 where the weight (B, D) is."""
    return value if weight is None else torch.where(weight[:, None] == 0, 0.0, value)


def row_planes(logits: Tensor, weight: Tensor | None) -> Tensor:
    """The two planes (2, B, L, D) of logits (B, L, D, S) in the accumulation dtype; 0 where the weight is."""
    top = logits.amax(-1)
    planes = torch.stack([top, torch.exp(logits - top[..., None]).sum(-1).log()])
    return where_used(weight, planes)


def row_log_prob(logits: Tensor, planes: Tensor) -> Tensor:
    """log softmax of logits (B, L, D, S) by their planes (2, B, L, D); NaN throughout a bad row."""
    return (logits - planes[0][..., None]) - planes[1][..., None]


def at_tokens(log_p: Tensor, tokens: Tensor) -> Tensor:
    """a = log p_l^d(x_k^d), (B, L, D, K), of log p (B, L, D, S); NaN for a token outside [0, S)."""
    inside = (tokens >= 0) & (tokens < log_p.shape[-1])
    index = torch.where(inside, tokens, 0).transpose(1, 2)[:, None]  # (B, 1, D, K)
    a = log_p.gather(-1, index.expand(-1, log_p.shape[1], -1, -1))
    return torch.where(inside.transpose(1, 2)[:, None], a, math.nan)


def sums_over_positions(a: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of a (B, L, D, K): sum_d w a (B, L, K); the same over the living positions; sum_d w (a - LME_l a) over them."""
    w = None if weight is None else weight[:, None, :, None]
    marginal = log_mean_exp(a, 1)[:, None]
    dead = torch.isneginf(marginal)
    alive = torch.where(dead, 0.0, a)
    centred = alive - torch.where(dead, 0.0, marginal)
    return weighted(w, a).sum(2), weighted(w, alive).sum(2), weighted(w, centred).sum(2)


def mixture_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits (B, L, D, S), tokens (B, K, D), weight (B, D) -> joint (B, K), correlation (B, K)."""
    a = at_tokens(torch.log_softmax(unread(logits, weight), -1), tokens)
    total, _, centred = sums_over_positions(a, weight)
    return log_mean_exp(total, 1), log_mean_exp(centred, 1)


def divergence(log_t: Tensor, log_p: Tensor, weight: Tensor | None) -> Tensor:
    """sum_d w KL(t || p) of logs (B, ..., D, S); a class without mass in t adds nothing."""
    t = torch.exp(log_t)
    terms = t * torch.where(t == 0, 0.0, log_t - log_p)
    return weighted(weight, terms.sum(-1)).sum(-1)


def log_marginal(logits: Tensor) -> Tensor:
    """log pbar (B, D, S) of logits (B, L, D, S)."""
    return log_mean_exp(torch.log_softmax(logits, -1), 1)


def mixture_kl(target: Tensor, logits: Tensor, weight: Tensor | None) -> Tensor:
    """target (B, T, D, S), logits (B, L, D, S), weight (B, D) -> kl (B,)."""
    return divergence(log_marginal(unread(target, weight)), log_marginal(unread(logits, weight)), weight)
