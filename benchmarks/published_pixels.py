"""The pixel system's draws and training step the published way, in plain torch: `torch, published` in the tables.

Written from a description of the published program, with its costs: every row of x_t or x_0 has a transition matrix of
its own, made of a general eigendecomposition; a draw is made from a tensor of all states; the head's other form is
computed though unused; logits, softmax and log-softmax of every forward are kept; the teacher's graph is made, and its
logits at the distillation rows twice; the targets are scored one by one in a loop.
Shapes: x (N, D) int64, rows of a sample together, N = B L; times (N,), latents (N, C); probabilities (N, D, S).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from plain import log_mean_exp
from torch import Tensor
from torch.nn.functional import logsigmoid

from di4c_ext.ops import Logistic

EPSILON, CUTOFF = 1e-9, 1e-8
_GUARD = 1e-6

Draw = Callable[[Tensor], Tensor]  # probabilities (..., S), not yet normalised -> states (...)


def draw(weights: Tensor) -> Tensor:
    """One state of every row, by torch.multinomial."""
    p = weights / weights.sum(-1, keepdim=True)
    return torch.multinomial(p.flatten(0, -2), 1, replacement=True).view(p.shape[:-1])


def head(x: Logistic, least: bool = False) -> Tensor:
    """The logits (..., S) of a truncated logistic; `least` takes the smaller of its two forms, which are both made."""
    inverse = torch.exp(-(x.log_scale - 2))[..., None]
    half = 1 / x.num_states
    centres = torch.linspace(-1 + half, 1 - half, x.num_states, dtype=x.dtype, device=x.device)
    left, right = ((centres + side * half - x.mean[..., None]) * inverse for side in (-1, 1))
    log_left, log_right = logsigmoid(left), logsigmoid(right)
    lower = _log_difference(log_right, log_left)
    upper = _log_difference(-left + log_left, -right + log_right)
    return torch.minimum(lower, upper) if least else lower


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a - e^b), kept from minus infinity."""
    return a + torch.log1p(-torch.exp(b - a) + _GUARD)


class Transitions:
    """q(x_t | x_s) of the generator `rate` (S, S), float32, a matrix to every row that asks."""

    def __init__(self, rate: Tensor, interval: Callable[..., Tensor], device: torch.device) -> None:
        w, v = torch.linalg.eig(rate.double().cpu())
        self._w, self._v, self._inverse = (part.real.float().to(device) for part in (w, v, torch.linalg.inv(v)))
        self._interval = interval

    def __call__(self, t: Tensor, s: Tensor | float = 0.0) -> Tensor:
        """(N,) -> (N, S, S), rows the earlier state."""
        tau = self._interval(t, s).float().to(self._w.device)
        q = self._v @ torch.diag_embed(torch.exp(tau[:, None] * self._w)) @ self._inverse
        return torch.where(q < CUTOFF, 0.0, q)

    def corrupted(self, x_0: Tensor, t: Tensor) -> Tensor:
        """The law of x_t, (N, D, S)."""
        return _rows(self(t), x_0)

    def posterior(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The law of x_s, (N, D, S), given x_t and x_0."""
        from_s, to_s, to_t = self(t, s) + EPSILON, self(s) + EPSILON, self(t) + EPSILON
        over = _rows(to_t, x_0).gather(-1, x_t[..., None])
        weights = _rows(from_s.mT, x_t) * _rows(to_s, x_0) / over + EPSILON
        return weights / weights.sum(-1, keepdim=True)

    def step(self, x_t: Tensor, p: Tensor, t: Tensor, s: Tensor, draw: Draw = draw) -> Tensor:
        """x_s (N, D): x_0 of the denoiser's p (N, D, S), then x_s of the posterior."""
        return draw(self.posterior(x_t, draw(p), t, s))


def _rows(matrices: Tensor, x: Tensor) -> Tensor:
    """matrices (N, S, S), x (N, D) -> row x of each, (N, D, S)."""
    return matrices[torch.arange(len(x), device=x.device)[:, None], x]


@dataclass(frozen=True)
class Chances:
    """What a step draws beside states: t, u (B,), tau (B L,), and the latents (B L, C) of the three forwards."""

    t: Tensor
    u: Tensor
    tau: Tensor
    latents: Tensor
    target_latents: Tensor
    row_latents: Tensor

    @classmethod
    def drawn(cls, batch: int, num_latents: int, device: torch.device) -> Chances:
        """A log-uniform step, a time uniform above it, rows near the data."""
        u, v = torch.rand(2, batch, dtype=torch.float64, device=device)
        coin, place = torch.rand(2, batch * num_latents, dtype=torch.float64, device=device)
        step = 0.001 * 10**u
        t = 0.01 + step + v * (0.99 - step)
        latents = torch.rand(3, batch * num_latents, 1, device=device)
        return cls(t, t - step, 0.01 + 0.01 * place * (coin < 0.5), *latents)


class Terms(NamedTuple):
    """(B,) each: distillation, data and consistency."""

    distillation: Tensor
    data: Tensor
    consistency: Tensor


def terms(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    transitions: Transitions,
    x_0: Tensor,
    chances: Chances,
    draw: Draw = draw,
) -> Terms:
    """One step's loss on x_0 (B, D). Networks: (x (N, D), t (N,)[, latents (N, C)]) -> Logistic (N, D).

    draw is asked for x_t, x_tau, the teacher's x_0, x_u and the targets, in this order.
    """
    t, u, tau = chances.t, chances.u, chances.tau
    B, N = len(x_0), len(tau)
    L = N // B

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(L, 0)

    def by_sample(x: Tensor) -> Tensor:
        return x.unflatten(0, (B, L))

    # At x_t. The student's probabilities are made beside their logarithms, and never used.
    x_t = draw(transitions.corrupted(x_0, t))
    teacher_logits = head(teacher(x_t, t.float()))
    p_teacher, log_p_teacher = (f(teacher_logits, -1).detach() for f in (torch.softmax, torch.log_softmax))
    logits = head(student(repeated(x_t), repeated(t).float(), chances.latents))
    p = by_sample(torch.softmax(logits, -1))  # noqa: F841
    log_p = by_sample(torch.log_softmax(logits, -1))
    log_mean = log_mean_exp(log_p)

    def gain(x: Tensor) -> Tensor:
        index = x[:, None, :, None].expand(-1, L, -1, 1)
        joint = log_p.gather(-1, index).squeeze(-1).sum(-1)
        return log_mean_exp(joint) - log_mean.gather(-1, x[..., None]).squeeze(-1).sum(-1)

    data = -torch.sigmoid(20 * (t - 0.5)) * gain(x_0) + (p_teacher * (log_p_teacher - log_mean)).sum((1, 2))

    # Distillation, each row with a time and noise of its own.
    x_tau = draw(transitions.corrupted(repeated(x_0), tau))
    p_rows = torch.softmax(head(teacher(x_tau, tau.float())), -1).detach()
    log_p_rows = torch.log_softmax(head(teacher(x_tau, tau.float())), -1).detach()
    log_q_rows = torch.log_softmax(head(student(x_tau, tau.float(), chances.row_latents)), -1)
    distillation = by_sample((p_rows * (log_p_rows - log_q_rows)).sum((1, 2))).mean(1)

    # Consistency, the target by a forward with a graph that nothing uses.
    x_u = transitions.step(repeated(x_t), repeated(p_teacher), repeated(t), repeated(u), draw)
    target_logits = head(student(x_u, repeated(u).float(), chances.target_latents))
    g, log_g = (by_sample(f(target_logits, -1)) for f in (torch.softmax, torch.log_softmax))
    targets = draw(g.detach())
    log_g_mean = log_mean_exp(log_g.detach())
    consistency = (log_g_mean.exp() * (log_g_mean - log_mean)).sum((1, 2))
    for x in targets.unbind(1):
        consistency = consistency - gain(x) / L
    return Terms(distillation, data, consistency)
