"""The mixture of L components: log-probabilities of whole sequences, and divergence from its marginal.

With p_l^d = softmax of logits[b, l, d] and LME the log of a mean of exponentials over l:

    joint       = LME_l sum_d w_d log p_l^d(x^d)
    correlation = LME_l sum_d w_d (log p_l^d(x^d) - log pbar^d(x^d)),   pbar^d = mean_l p_l^d
    kl          = sum_d w_d KL(mean_t softmax target[b, t, d] || pbar^d)

Forward keeps every row's log-sum-exp as two planes, [0] its maximum m and [1] log sum exp(x - m), so that backward's
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


def _sums(logits: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """sum_d w a (B, L, K); the same over the living positions; sum_d w (a - LME_l a) over them."""
    a = at_tokens(torch.log_softmax(unread(logits, weight), -1), tokens)
    w = None if weight is None else weight[:, None, :, None]
    marginal = log_mean_exp(a, 1)[:, None]
    dead = torch.isneginf(marginal)
    alive = torch.where(dead, 0.0, a)
    centred = alive - torch.where(dead, 0.0, marginal)
    return weighted(w, a).sum(2), weighted(w, alive).sum(2), weighted(w, centred).sum(2)


def mixture_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits (B, L, D, S), tokens (B, K, D), weight (B, D) -> joint (B, K), correlation (B, K)."""
    total, _, centred = _sums(logits, tokens, weight)
    return log_mean_exp(total, 1), log_mean_exp(centred, 1)


def mixture_log_prob_forward(
    logits: Tensor, tokens: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """joint, correlation, lse (2, B, L, D), share (B, L, K) = softmax over l of sum_d w a (dead positions left out)."""
    total, alive, centred = _sums(logits, tokens, weight)
    lse = row_planes(unread(logits, weight), weight)
    share = torch.softmax(alive - log_mean_exp(alive, 1)[:, None], 1)
    return log_mean_exp(total, 1), log_mean_exp(centred, 1), lse, share


def mixture_log_prob_backward(
    grad_joint: Tensor,
    grad_correlation: Tensor,
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    share: Tensor,
) -> Tensor:
    """The gradient of the logits, (B, L, D, S).

    With c_ldk = w_d (g^joint_k share_lk + g^corr_k (share_lk - r_ldk)) and r = softmax over l of a:
    d/dx_lds = sum_k c_ldk ([s = x_k^d] - p_ld(s)).
    """
    log_p = row_log_prob(unread(logits, weight), lse)
    a = at_tokens(log_p, tokens)
    marginal = torch.logsumexp(a, 1, keepdim=True)
    dead = torch.isneginf(marginal)
    r = torch.exp(a - torch.where(dead, 0.0, marginal))
    shares = share[:, :, None]  # (B, L, 1, K)
    c = grad_joint[:, None, None] * shares + grad_correlation[:, None, None] * (shares - r)
    c = weighted(None if weight is None else weight[:, None, :, None], torch.where(dead, 0.0, c))
    inside = (tokens >= 0) & (tokens < logits.shape[-1])
    index = torch.where(inside, tokens, 0).transpose(1, 2)[:, None].expand(c.shape)
    # c is 0 at weight 0, and p there is 1, of a row and planes of zeros: no NaN of an unread row can come in.
    return (-c.sum(-1, keepdim=True) * torch.exp(log_p)).scatter_add(-1, index, c).to(logits.dtype)


def _log_marginal(logits: Tensor) -> Tensor:
    """log pbar (B, D, S) of logits (B, L, D, S)."""
    return log_mean_exp(torch.log_softmax(logits, -1), 1)


def mixture_kl(target: Tensor, logits: Tensor, weight: Tensor | None) -> Tensor:
    """target (B, T, D, S), logits (B, L, D, S), weight (B, D) -> kl (B,)."""
    log_t, log_p = _log_marginal(unread(target, weight)), _log_marginal(unread(logits, weight))
    t = torch.exp(log_t)
    terms = t * torch.where(t == 0, 0.0, log_t - log_p)
    return weighted(weight, terms.sum(-1)).sum(-1)


def mixture_kl_forward(target: Tensor, logits: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl (B,), lse_target (2, B, T, D), lse (2, B, L, D), pull (B, L, D) = sum_s t_s p_l(s) / sum_l' p_l'(s)."""
    y, x = unread(target, weight), unread(logits, weight)
    lse_target, lse = row_planes(y, weight), row_planes(x, weight)
    t, r = torch.softmax(y, -1).mean(1), _responsibility(torch.log_softmax(x, -1))
    pull = where_used(weight, (t[:, None] * r).sum(-1))
    return mixture_kl(target, logits, weight), lse_target, lse, pull


def _responsibility(log_p: Tensor) -> Tensor:
    """r_ls = p_l(s) / sum_l' p_l'(s), of log p (B, L, D, S) and alike; 0 where no p_l' is > 0."""
    total = torch.logsumexp(log_p, 1, keepdim=True)
    return torch.exp(log_p - torch.where(torch.isneginf(total), 0.0, total))


def mixture_kl_backward(
    grad_kl: Tensor,
    target: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    lse_target: Tensor,
    lse: Tensor,
    pull: Tensor,
) -> Tensor:
    """The gradient of the logits, (B, L, D, S): g_b w_d (p_l(s) pull_l - t_s r_ls)."""
    log_t, log_p = row_log_prob(unread(target, weight), lse_target), row_log_prob(unread(logits, weight), lse)
    t = torch.exp(log_t).mean(1)
    slope = torch.exp(log_p) * pull[..., None] - t[:, None] * _responsibility(log_p)
    slope = weighted(None if weight is None else weight[:, None, :, None], slope)
    return (grad_kl[:, None, None, None] * slope).to(logits.dtype)
