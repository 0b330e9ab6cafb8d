"""Tau-leaping: the reverse jump process with its rates held still over each step, as the pixel teachers were sampled.

With base rate R, beta(t) and q = q_{t|0} of the process, a position at x_t jumps to s' != x_t at the rate

    r(s') = beta(t) R[s', x_t] sum_{x_0} p(x_0 | x_t) q[x_0, s'] / (q[x_0, x_t] + 1e-9)

and over a step of length h takes N(s') ~ Poisson(h r(s')) jumps of s' - x_t each, all added up and clamped to 0..S-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.ops import Logits, sample_categorical
from di4c_ext.process import Process
from di4c_ext.sampler.common import (
    LATENTS,
    STEP,
    Callback,
    as_grid,
    ask,
    check_drawn,
    check_levels,
    check_logits,
    evaluation_keys,
)
from di4c_ext.sampler.guidance import LOGITS_BYTES, GuidedLogits, bytes_per_logit, cuts_of, dense, in_pieces

_RATIO = 1e-9  # keeps the published ratio finite where q[x_0, x_t] vanishes
_BYTES_PER_DRAW = 160  # of memory, at the peak of drawing jumps by the reference; kernels take less
_MAX_JUMPS = 512  # mean number of jumps from which their sum is taken as Gaussian
_DRAWS = 64  # jumps drawn at a time


class JumpProcess(Process, Protocol):
    """A process that says by which rates it jumps."""

    @property
    def rate(self) -> Tensor:
        """R (S, S), from row to column, before beta."""

    def beta(self, t: float) -> float | Tensor:
        """What R is multiplied by at time t."""

    def transition(self, t: float, s: float = 0.0) -> Tensor:
        """q_{t|s} (S, S), row = earlier state."""


def sample_tau_leaping(
    teacher: Denoiser,
    process: JumpProcess,
    x: Tensor,
    times: Tensor | Sequence[float],
    keys: Tensor,
    *,
    logits_bytes: int = LOGITS_BYTES,
    callback: Callback = None,
) -> Tensor:
    """x_0 (B, D) of a teacher by leaps down `times` and the likeliest state of every position at the end.

    One evaluation for each of the n times: a leap between each two, then the final argmax at the last. With
    `analytic_times(n)` it costs what `sample_analytic` costs on that grid. A grid that ends in 0 leaps on to 0 and
    takes the argmax there at the last time above it (the published grid: linspace(1, 0.01, n) and 0).

    The jumps of a position are drawn as their number, Poisson, and then one target each in proportion to the rates,
    which is the same law; from a mean of 512 jumps on, their sum is drawn as a Gaussian of its mean and variance.
    logits_bytes: rates are made for as many samples at a time as take so many bytes, one at least. keys, callback:
    as for `sample_analytic`.

    Raises ValueError for arguments that do not fit, and logits that hold no distribution.
    """
    op = "sample_tau_leaping"
    grid = as_grid(op, times, least=1, to_zero=True)
    check_levels(op, process, x, keys)
    if grid == [0.0]:
        raise ValueError(f"{op}: times must begin above 0, got {grid}")
    above = [t for t in grid if t > 0]
    with inference(teacher, x.device):
        for i, (t, s) in enumerate([*pairwise(grid), (above[-1], 0.0)]):
            last = i == len(grid) - 1
            key = evaluation_keys(keys, i)
            logits = ask(teacher, x, t, None, key[LATENTS])
            check_logits(op, process, logits, x)
            if last:
                x_s: Tensor = in_pieces(_argmax, logits, logits_bytes, key[STEP])[0]
            else:
                x_s = _leap(process, logits, x, t, s, key[STEP], logits_bytes)
            check_drawn(op, x_s, t)
            if callback is not None:
                callback({"i": i, "t": t, "s": s, "x_t": x, "logits": logits, "x_s": x_s})
            x = x_s
    return x


def _argmax(logits: Logits, key: Tensor) -> tuple[Tensor]:
    tokens = sample_categorical(logits, key, temperature=0.0)
    assert isinstance(tokens, Tensor)
    return (tokens,)


def _leap(
    process: JumpProcess,
    logits: Logits | GuidedLogits,
    x: Tensor,
    t: float,
    s: float,
    key: Tensor,
    logits_bytes: int,
) -> Tensor:
    """x_s (B, D); -1 where the logits hold no distribution."""
    batch, length, num_states = logits.shape
    flow = (process.rate * (float(process.beta(t)) * (t - s))).to(x.device)
    q = process.transition(t).to(x.device)
    if tuple(flow.shape) != (num_states, num_states) or q.shape != flow.shape:
        raise ValueError(
            f"sample_tau_leaping: rate and transition(t) of {process!r} must be {(num_states, num_states)}, "
            f"got {tuple(flow.shape)} and {tuple(q.shape)}"
        )
    each = length * (bytes_per_logit(x.device) * num_states + _BYTES_PER_DRAW * _DRAWS)
    cuts = cuts_of(batch, each, logits_bytes)
    return torch.cat([_leap_samples(dense(logits, cut), q, flow, x[cut], key[cut]) for cut in cuts])


def _leap_samples(logits: Tensor, q: Tensor, flow: Tensor, x: Tensor, key: Tensor) -> Tensor:
    """One leap of some samples; flow = h beta(t) R."""
    states = torch.arange(flow.shape[0], device=x.device)
    q, flow = q.to(logits.dtype), flow.to(logits.dtype)
    p = torch.softmax(logits, -1).div_(q.t()[x] + _RATIO)
    mean = (p @ q).mul_(flow.t()[x]).masked_fill_(states == x[..., None], 0.0)  # of the jumps to each state
    total = mean.sum(-1, dtype=torch.float64)
    bad, many = ~torch.isfinite(total), total > _MAX_JUMPS
    few = torch.where(bad | many, 0.0, total)
    number = _poisson(few, random.uniform(key, x.shape[1]))
    away = (states - states[:, None]).to(mean.dtype)  # from row to column
    drift = torch.einsum("bds,bds->bd", mean, away[x]).double()
    spread = torch.einsum("bds,bds->bd", mean, away.square()[x]).double().sqrt()
    shift = torch.where(many, drift + spread * random.normal(key, x.shape[1], stream=1), 0.0).round()
    weights = mean.log_()
    for start in range(0, int(number.max()) if number.numel() else 0, _DRAWS):
        drawn = sample_categorical(weights, key, draws=_DRAWS, stream=start // _DRAWS)
        assert isinstance(drawn, Tensor)
        counted = torch.arange(start, start + _DRAWS, device=x.device)[:, None] < number[:, None]
        shift = shift + torch.where(counted, drawn - x[:, None], 0).sum(1)
    x_s = (x + shift).clamp(0, flow.shape[0] - 1).long()
    return torch.where(bad, -1, x_s)


def _poisson(mean: Tensor, u: Tensor) -> Tensor:
    """The smallest k whose distribution function exceeds u, float64, for means up to _MAX_JUMPS."""
    k = torch.zeros_like(mean)
    width = 2 * _MAX_JUMPS  # 22 standard deviations above the largest mean
    while width > 1:
        width //= 2
        # P(N <= k + width - 1), as a regularised incomplete gamma function.
        k = torch.where(torch.special.gammaincc(k + width, mean) > u, k, k + width)
    return k.long()
