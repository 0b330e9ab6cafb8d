"""The losses in plain torch: a chain that shares what it can, and the published way, which shares nothing.

The first takes one log_softmax, one gather for all K sequences and one mixture, and is what `torch` stands for in the
tables. The second takes them anew for every term, loops over the drawn sequences and repeats the teacher for every
latent, as the published training code does: `torch, published` in the tables.
Shapes: logits (B, L, D, S), tokens (B, K, D), teacher (B, D, S), target (B, T, D, S), weight (B, D), inside (B,) bool.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_p(logits: Tensor) -> Tensor:
    """log softmax in float32, whatever the logits are in."""
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def log_mean_exp(x: Tensor, dim: int = 1) -> Tensor:
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def _sum(positions: Tensor, weight: Tensor | None, dim: int = -1) -> Tensor:
    """Sum over positions, the second dimension after the batch's or the last one; weight (B, D)."""
    if weight is None:
        return positions.sum(dim)
    shape = [weight.shape[0]] + [1] * (positions.dim() - 1)
    shape[dim] = weight.shape[1]
    return (positions * weight.view(shape)).sum(dim)


def _kl(log_t: Tensor, log_q: Tensor) -> Tensor:
    return (log_t.exp() * (log_t - log_q)).sum(-1)


def _score(log_p: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """joint and correlation (B, K): all sequences in one gather, the marginal taken of the gathered alone."""
    index = tokens.transpose(1, 2)[:, None].expand(-1, log_p.shape[1], -1, -1)
    a = log_p.gather(-1, index)  # (B, L, D, K)
    centred = a - log_mean_exp(a)[:, None]
    return log_mean_exp(_sum(a, weight, 2)), log_mean_exp(_sum(centred, weight, 2))


def mixture_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """joint and correlation, (B, K) each."""
    return _score(log_p(logits), tokens, weight)


def mixture_kl(target: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """(B,); the target a product (B, D, S) or a mixture (B, T, D, S)."""
    log_t = log_p(target) if target.dim() == 3 else log_mean_exp(log_p(target))
    return _sum(_kl(log_t, log_mean_exp(log_p(logits))), weight)


def mixture_objective(
    logits: Tensor,
    teacher: Tensor,
    data: Tensor,
    samples: Tensor,
    target: Tensor | None,
    weight: Tensor | None = None,
    inside: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """distillation, both marginal divergences (B,), that to the target 0 without one, correlation of the data (B,) and
    of the samples (B, K)."""
    log_p_l, log_t = log_p(logits), log_p(teacher)
    log_pbar = log_mean_exp(log_p_l)
    distillation = _sum(_kl(log_t[:, None], log_p_l), weight).mean(1)
    to_teacher = _sum(_kl(log_t, log_pbar), weight)
    to_target = to_teacher.new_zeros(to_teacher.shape)
    if target is not None:
        to_target = _sum(_kl(log_mean_exp(log_p(target)), log_pbar), weight)
    _, correlation = _score(log_p_l, torch.cat([data[:, None], samples], 1), weight)
    if inside is not None:
        distillation, to_target = distillation * inside, to_target * ~inside
    return distillation, to_teacher, to_target, correlation[:, 0], correlation[:, 1:]


def published_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """joint and correlation, a sequence at a time, the marginal's log-probability subtracted at the end."""
    log_p_l = log_p(logits)
    log_pbar = log_mean_exp(log_p_l)
    joint, correlation = [], []
    for sequence in tokens.unbind(1):
        index = sequence[:, None, :, None].expand(*log_p_l.shape[:3], 1)
        joint.append(log_mean_exp(_sum(log_p_l.gather(-1, index).squeeze(-1), weight)))
        marginal = _sum(log_pbar.gather(-1, sequence[..., None]).squeeze(-1), weight)
        correlation.append(joint[-1] - marginal)
    return torch.stack(joint, 1), torch.stack(correlation, 1)


def published_objective(
    logits: Tensor,
    teacher: Tensor,
    data: Tensor,
    samples: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    inside: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`mixture_objective` with a chain of its own for every term and the teacher repeated for every latent."""
    repeated = teacher.repeat_interleave(logits.shape[1], 0).view_as(logits)
    distillation = _sum(_kl(log_p(repeated), log_p(logits)), weight).mean(1)
    to_teacher, to_target = mixture_kl(teacher, logits, weight), mixture_kl(target, logits, weight)
    _, of_data = published_log_prob(logits, data[:, None], weight)
    _, of_samples = published_log_prob(logits, samples, weight)
    if inside is not None:
        distillation, to_target = distillation * inside, to_target * ~inside
    return distillation, to_teacher, to_target, of_data[:, 0], of_samples


def race(logits: Tensor) -> Tensor:
    """argmax of p / E, E exponential: one draw from every row, the published samplers' way."""
    p = torch.softmax(logits, -1, dtype=torch.float32)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def multinomial(logits: Tensor, draws: int = 1) -> Tensor:
    p = torch.softmax(logits, -1, dtype=torch.float32)
    return torch.multinomial(p.flatten(0, -2), draws, replacement=True)


def absorbing_step(logits: Tensor, x_t: Tensor, unmask_prob: Tensor | float, mask_id: int) -> Tensor:
    """One step as published: a tensor of probabilities over S + 1 states, and a race in it. logits (B, D, S)."""
    p = torch.softmax(logits, -1, dtype=torch.float32) * unmask_prob
    p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp(min=0)], -1)
    x_s = (p / torch.empty_like(p).exponential_()).argmax(-1)
    return torch.where(x_t == mask_id, x_s, x_t)
