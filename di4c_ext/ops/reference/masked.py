"""Losses of single rows, summed over the positions that count.

    loss[b, l] = sum_d w_d f(target^d, logits_l^d),   t = softmax target, p = softmax logits

    forward  KL(t || p) = sum t (log t - log p)        d/dx = p - t
    reverse  KL(p || t) = sum p (log p - log t)        d/dx = p (log p - log t - KL)
    js       (KL(t || m) + KL(p || m)) / 2, m = (t+p)/2  d/dx = p (h - sum p h) / 2, h = log p - log m
    tv       sum |t - p| / 2                           d/dx = p (sign - sum p sign) / 2, sign of p - t
    ce       -log p(x)                                 d/dx = p - [s = x]

The target is a constant: nothing flows into it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops.reference.mixture import at_tokens, row_log_prob, row_planes, unread, weighted, where_used

FORWARD, REVERSE, JENSEN_SHANNON, TOTAL_VARIATION, CROSS_ENTROPY = range(5)  # api.h: RowLoss


def _ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log q, 0 where p is 0 (such a class adds nothing to a divergence from q)."""
    return torch.where(p == 0, 0.0, log_p - log_q)


def _log_average(log_t: Tensor, log_p: Tensor) -> Tensor:
    """log m, m = (t + p) / 2, by adding in log space: right where both are below the smallest float."""
    dead = torch.isneginf(log_t) & torch.isneginf(log_p)
    return torch.logaddexp(torch.where(dead, 0.0, log_t), torch.where(dead, 0.0, log_p)) - math.log(2.0)


def _divergence(kind: int, log_t: Tensor, log_p: Tensor) -> Tensor:
    """The rows' divergences, (B, L, D)."""
    t, p = torch.exp(log_t), torch.exp(log_p)
    if kind == FORWARD:
        return (t * _ratio(t, log_t, log_p)).sum(-1)
    if kind == REVERSE:
        return (p * _ratio(p, log_p, log_t)).sum(-1)
    if kind == JENSEN_SHANNON:
        log_m = _log_average(log_t, log_p)
        return 0.5 * (t * _ratio(t, log_t, log_m) + p * _ratio(p, log_p, log_m)).sum(-1)
    return 0.5 * (t - p).abs().sum(-1)


def _slope_terms(kind: int, log_t: Tensor, log_p: Tensor) -> Tensor:
    """g with d f / dx = scale * p (g - sum p g): the log ratio, h or the sign of the kind."""
    p = torch.exp(log_p)
    if kind == REVERSE:
        return _ratio(p, log_p, log_t)
    if kind == JENSEN_SHANNON:
        return _ratio(p, log_p, _log_average(log_t, log_p))
    return torch.sign(p - torch.exp(log_t))


def row_loss(kind: int, target: Tensor | None, tokens: Tensor | None, logits: Tensor, weight: Tensor | None) -> Tensor:
    """target (B, D, S) or, for cross entropy, tokens (B, D); logits (B, L, D, S); weight (B, D) -> loss (B, L)."""
    log_p = torch.log_softmax(unread(logits, weight), -1)
    if target is None:
        rows = -at_tokens(log_p, _tokens(tokens)[:, None])[..., 0]
    else:
        log_t = torch.log_softmax(unread(target.detach(), weight), -1)[:, None]
        rows = _divergence(kind, log_t, log_p)
    return weighted(None if weight is None else weight[:, None], rows).sum(-1)


def _tokens(tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError("row_loss: a target (B, D, S) or tokens (B, D) must be given")
    return tokens


def row_loss_forward(
    kind: int, target: Tensor | None, tokens: Tensor | None, logits: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """loss (B, L) and stats (5, B, L, D): the logits' two planes (see mixture.py), the target's two, and sum p g of the
    kind; 0 in what a kind has not."""
    x = unread(logits, weight)
    lse = row_planes(x, weight)
    lse_target, scalar = torch.zeros_like(lse), torch.zeros_like(lse[:1])
    if target is not None:
        y = unread(target, weight)[:, None]
        lse_target = row_planes(y, weight).expand_as(lse)
        if kind in (REVERSE, JENSEN_SHANNON, TOTAL_VARIATION):
            log_t, log_p = torch.log_softmax(y, -1), torch.log_softmax(x, -1)
            scalar = where_used(weight, (torch.exp(log_p) * _slope_terms(kind, log_t, log_p)).sum(-1))[None]
    return row_loss(kind, target, tokens, logits, weight), torch.cat([lse, lse_target, scalar])


def row_loss_backward(
    grad_loss: Tensor,
    kind: int,
    target: Tensor | None,
    tokens: Tensor | None,
    logits: Tensor,
    weight: Tensor | None,
    stats: Tensor,
) -> Tensor:
    """The gradient of the logits, (B, L, D, S), from grad_loss (B, L) and the stats of the forward."""
    log_p = row_log_prob(unread(logits, weight), stats[:2])
    p = torch.exp(log_p)
    if target is None:
        token = _tokens(tokens)
        inside = (token >= 0) & (token < p.shape[-1])
        index = torch.where(inside, token, 0)[:, None, :, None].expand(*p.shape[:-1], 1)
        slope = p.scatter_add(-1, index, torch.full_like(p[..., :1], -1.0))
        slope = torch.where(inside[:, None, :, None], slope, math.nan)
    else:
        log_t = row_log_prob(unread(target, weight)[:, None], stats[2:4])
        if kind == FORWARD:
            slope = p - torch.exp(log_t)
        else:
            scale = 1.0 if kind == REVERSE else 0.5
            slope = scale * p * (_slope_terms(kind, log_t, log_p) - stats[4][..., None])
    slope = weighted(None if weight is None else weight[:, None, :, None], slope)
    return (grad_loss[:, :, None, None] * slope).to(logits.dtype)
