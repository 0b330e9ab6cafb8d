"""The language system's draws and training step the published way, in plain torch: `torch, published` in the tables.

Written from a description of the published program, with its costs: x_t is repeated for every latent before the teacher
steps, whose rows are then all alike; a token is drawn by a race of exponentials over all states, in float32; teacher
and student are normalised to log-probabilities that are kept beside their logits, and normalised once more; the
teacher is evaluated a second time at x_t; the target's probabilities are made and renormalised for the draw; log pbar
is taken twice; and the positions that x_t tells are computed like all others.
Shapes: N latents of one sequence, S states with the mask as the last one; logits (N, D, S), tokens (N, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from plain import log_mean_exp
from torch import Tensor

NEVER = -1e6
Network = Callable[..., Tensor]  # (x (N, D), latents (N, C) | None) -> logits (N, D, S)
Draw = Callable[[Tensor], Tensor]  # weights (..., S) -> states (...)


def log_probabilities(logits: Tensor, x: Tensor) -> Tensor:
    """SUBS: the mask is never predicted, what is clean is certain. Writes into the logits."""
    mask_id = logits.shape[-1] - 1
    logits[..., mask_id] += NEVER
    log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
    clean = x != mask_id
    log_p[clean] = NEVER
    log_p[clean, x[clean]] = 0.0
    return log_p


def race(weights: Tensor) -> Tensor:
    """One state of every row of weights (..., S), the first of exponential arrivals; float32, as published."""
    return (weights / (1e-10 - torch.log(torch.rand_like(weights) + 1e-10))).argmax(-1)


def ancestral_step(log_p: Tensor, x: Tensor, m_t: float, m_s: float, draw: Draw = race) -> Tensor:
    """x_s (N, D) from log-probabilities (N, D, S) at x_t."""
    weights = log_p.exp() * (m_t - m_s)
    weights[..., -1] = m_s
    return torch.where(x == log_p.shape[-1] - 1, draw(weights), x)


class Terms(NamedTuple):
    """Scalars of one sequence; one of distillation and consistency is 0."""

    distillation: Tensor
    data: Tensor
    consistency: Tensor


def terms(
    student: Network,
    teacher: Network,
    x_0: Tensor,
    x_t: Tensor,
    t: float,
    latents: Tensor,
    *,
    window: float = 0.02,
    dt: float = 1 / 1024,
    draw: Draw = race,
) -> Terms:
    """The loss of one sequence: x_0 and x_t (D,), latents (2, N, C) of the targets and of x_t.

    draw is asked for the teacher's step and for the targets' tokens, in this order.
    """
    N, device = latents.shape[1], x_t.device
    repeated = x_t.expand(N, -1)
    dt = min(dt, t / 2)
    with torch.no_grad():
        # The teacher's step: N rows of logits, all the same.
        log_p = log_probabilities(teacher(repeated), repeated)
        x_s = ancestral_step(log_p, repeated, t, t - dt, draw)
        log_psi = log_probabilities(teacher(x_t[None]), x_t[None])[0]
        psi = log_psi.exp()
        log_q = log_probabilities(student(x_s, latents[0]), x_s)
    log_p = log_probabilities(student(repeated, latents[1]), repeated).log_softmax(-1)

    def correlation(x: Tensor) -> Tensor:
        joint = log_p.gather(-1, x.expand(N, -1)[..., None])[..., 0].sum(-1)
        marginal = log_mean_exp(log_p, 0).gather(-1, x[:, None])[..., 0].sum()
        return marginal - log_mean_exp(joint, 0)

    log_mean = log_mean_exp(log_p, 0)
    a = 0.1 * torch.sigmoid(torch.tensor(20 * (t - 0.5)))
    data = a * correlation(x_0) + (psi * (log_psi - log_mean)).sum()
    nothing = torch.zeros((), device=device)
    if t < window:
        each = psi.expand(N, -1, -1).clone() * (log_psi.expand(N, -1, -1).clone() - log_p)
        return Terms(each.sum((1, 2)).mean(), data, nothing)
    q = log_q.exp()
    log_q_mean = log_mean_exp(log_q, 0)
    consistency = (log_q_mean.exp() * (log_q_mean - log_mean)).sum()
    for x in draw(q / q.sum(-1, keepdim=True)).unbind(0):
        consistency = consistency + correlation(x) / N
    return Terms(nothing, data, consistency)
