"""Everything that one step of Di4C asks of a mixture, and forward and backward of the op that computes it.

With p_l = softmax of logits[b, l, d], pbar = mean_l p_l, gbar = mean_t softmax target[b, t, d]:

    distillation     = mean_l sum_d w KL(teacher || p_l)     0 for samples outside
    marginal_teacher = sum_d w KL(teacher || pbar)
    marginal_target  = sum_d w KL(gbar || pbar)              0 for samples inside, whose target is not looked at
    information      = sum_d w KL(p_0 || pbar)               0 unless asked for; without a gradient

and joint and correlation of the data and of every sampled sequence as in mixture.py. Without `inside` every part is
computed for every sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from di4c_ext.ops.reference.logistic import logistic_logits, logistic_pull
from di4c_ext.ops.reference.masked import FORWARD, row_loss
from di4c_ext.ops.reference.mixture import (
    accumulation_dtype,
    at_tokens,
    divergence,
    log_marginal,
    log_mean_exp,
    mixture_kl,
    mixture_log_prob,
    row_log_prob,
    row_planes,
    sums_over_positions,
    unread,
    weighted,
    where_used,
)

DISTILLATION, MARGINAL_TEACHER, MARGINAL_TARGET, INFORMATION = range(4)  # api.h: Part


class MixtureObjective(NamedTuple):
    """Per sample and in nats, float32 (float64 for float64 logits); what was not asked for is 0."""

    distillation: Tensor  # (B,)
    marginal_teacher: Tensor  # (B,)
    marginal_target: Tensor  # (B,)
    joint_data: Tensor  # (B,)
    correlation_data: Tensor  # (B,)
    joint_samples: Tensor  # (B, K)
    correlation_samples: Tensor  # (B, K)
    information: Tensor  # (B,)


def mixture_objective(
    logits: Tensor,
    *,
    teacher: Tensor,
    data: Tensor | None = None,
    samples: Tensor | None = None,
    target: Tensor | None = None,
    weight: Tensor | None = None,
    inside: Tensor | None = None,
    information: bool = False,
) -> MixtureObjective:
    """logits (B, L, D, S), teacher (B, D, S), data (B, D), samples (B, K, D), target (B, T, D, S), weight (B, D),
    inside (B,) bool: the parts one by one, differentiable by autograd."""
    weight_inside, weight_outside = split_weight(logits, weight, inside)
    nothing = logits.new_zeros(logits.shape[0], dtype=accumulation_dtype(logits))
    joint_data = correlation_data = nothing
    if data is not None:
        joint, correlation = mixture_log_prob(logits, data[:, None], weight)
        joint_data, correlation_data = joint[:, 0], correlation[:, 0]
    joint_samples = correlation_samples = nothing.new_zeros((logits.shape[0], 0))
    if samples is not None:
        joint_samples, correlation_samples = mixture_log_prob(logits, samples, weight)
    return MixtureObjective(
        distillation=row_loss(FORWARD, teacher, None, logits, weight_inside).mean(1),
        marginal_teacher=mixture_kl(teacher[:, None], logits, weight),
        marginal_target=nothing if target is None else mixture_kl(target, logits, weight_outside),
        joint_data=joint_data,
        correlation_data=correlation_data,
        joint_samples=joint_samples,
        correlation_samples=correlation_samples,
        information=mixture_kl(logits[:, :1].detach(), logits.detach(), weight) if information else nothing,
    )


def split_weight(logits: Tensor, weight: Tensor | None, inside: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The weights (B, D) of samples inside and of samples outside; both are `weight` without `inside` (B,)."""
    if inside is None:
        return weight, weight
    within = (inside != 0)[:, None].expand(-1, logits.shape[2])
    if weight is None:
        weight = torch.ones_like(within, dtype=accumulation_dtype(logits))
    return torch.where(within, weight, 0.0), torch.where(within, 0.0, weight)


def unpacked(packed: Tensor, logistic_states: int) -> Tensor:
    """The logits (..., S) of logistic rows (..., 2)."""
    return logistic_logits(packed[..., 0], packed[..., 1], logistic_states)


def packed_gradient(packed: Tensor, grad: Tensor, logistic_states: int | None) -> Tensor:
    """The gradient of the logits as that of what they came as."""
    return grad if logistic_states is None else logistic_pull(packed[..., 0], packed[..., 1], grad)


def mixture_forward(
    logits: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    information: bool,
) -> tuple[Tensor, ...]:
    """joint, correlation (B, K), parts (4, B), and what backward needs: lse (2, B, L, D), lse_teacher (2, B, 1, D),
    lse_target (2, B, T, D), share (B, L, K) = softmax over l of sum_d w a (dead positions left out), and pull
    (., B, L, D) = sum_s t_s p_l(s) / sum_l' p_l'(s), a plane with t the teacher and one with t the target. What belongs
    to an absent input is left out."""
    B, L, D, _ = logits.shape
    weight_inside, weight_outside = split_weight(logits, weight, inside)
    x = unread(logits, weight)
    log_p = torch.log_softmax(x, -1)
    parts, pull = [x.new_zeros(B)] * 4, list[Tensor]()
    joint, correlation = x.new_empty((B, 0)), x.new_empty((B, 0))
    share, lse_teacher, lse_target = x.new_empty((B, L, 0)), x.new_empty((2, B, 0, D)), x.new_empty((2, B, 0, D))
    if tokens is not None:
        total, alive, centred = sums_over_positions(at_tokens(log_p, tokens), weight)
        joint, correlation = log_mean_exp(total, 1), log_mean_exp(centred, 1)
        most = log_mean_exp(alive, 1)[:, None]
        none = torch.isneginf(most)  # of the components has the sequence: no shares
        share = torch.where(none, 0.0, torch.softmax(alive - torch.where(none, 0.0, most), 1))
    if teacher is not None or target is not None or information:
        log_pbar, r = log_mean_exp(log_p, 1), _responsibility(log_p)
    if teacher is not None:
        y = unread(teacher, weight)[:, None]
        lse_teacher, log_t = row_planes(y, weight), torch.log_softmax(y, -1)
        parts[DISTILLATION] = divergence(log_t, log_p, _per_row(weight_inside)).mean(1)
        parts[MARGINAL_TEACHER] = divergence(log_t[:, 0], log_pbar, weight)
        pull.append(where_used(weight, (torch.exp(log_t) * r).sum(-1)))
    if target is not None:
        y = unread(target, weight_outside)
        lse_target, log_g = row_planes(y, weight_outside), log_marginal(y)
        parts[MARGINAL_TARGET] = divergence(log_g, log_pbar, weight_outside)
        pull.append(where_used(weight_outside, (torch.exp(log_g)[:, None] * r).sum(-1)))
    if information:
        parts[INFORMATION] = divergence(log_p[:, 0], log_pbar, weight)
    kept = row_planes(x, weight), lse_teacher, lse_target, share
    pulls = torch.stack(pull) if pull else x.new_empty((0, B, L, D))
    return joint, correlation, torch.stack(parts), *kept, pulls


def _per_row(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight[:, None]


def _responsibility(log_p: Tensor) -> Tensor:
    """r_ls = p_l(s) / sum_l' p_l'(s), of log p (B, L, D, S) and alike; 0 where no p_l' is > 0."""
    total = torch.logsumexp(log_p, 1, keepdim=True)
    return torch.exp(log_p - torch.where(torch.isneginf(total), 0.0, total))


def mixture_backward(
    grad_joint: Tensor,
    grad_correlation: Tensor,
    grad_parts: Tensor,
    logits: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    joint: Tensor,
    correlation: Tensor,
    lse: Tensor,
    lse_teacher: Tensor,
    lse_target: Tensor,
    share: Tensor,
    pull: Tensor,
) -> Tensor:
    """The gradient of the logits, (B, L, D, S), by what `mixture_forward` kept.

    A value of -inf has no gradient: grad_joint and grad_correlation are 0 where joint and correlation are -inf.
    With r = softmax over l of a and c_ldk = w (g^joint_k share_lk + g^corr_k (share_lk - r_ldk)), d/dx_lds is
    sum_k c_ldk ([s = x_k^d] - p_l(s)) for the sequences, w g (p_l(s) - t(s)) / L for the distillation and
    w g (p_l(s) pull_l - t(s) r_ls) for each marginal divergence.
    """
    weight_inside, weight_outside = split_weight(logits, weight, inside)
    log_p = row_log_prob(unread(logits, weight), lse)
    p = torch.exp(log_p)

    def part(which: int, slope: Tensor, w: Tensor | None) -> Tensor:
        return grad_parts[which][:, None, None, None] * weighted(None if w is None else w[:, None, :, None], slope)

    grad = torch.zeros_like(p)
    if tokens is not None:
        # 0 at weight 0, where p is 1, of a row and planes of zeros: no NaN of an unread row can come in.
        gj, gc = (
            torch.where(torch.isneginf(v), 0.0, g) for v, g in ((joint, grad_joint), (correlation, grad_correlation))
        )
        c = _coefficients(gj, gc, log_p, tokens, weight, share)
        known = (tokens >= 0) & (tokens < logits.shape[-1])
        index = torch.where(known, tokens, 0).transpose(1, 2)[:, None].expand(c.shape)
        grad = (-c.sum(-1, keepdim=True) * p).scatter_add(-1, index, c)
    if teacher is not None or target is not None:
        r = _responsibility(log_p)
    if teacher is not None:
        t = torch.exp(row_log_prob(unread(teacher, weight)[:, None], lse_teacher))
        grad = grad + part(DISTILLATION, (p - t) / logits.shape[1], weight_inside)
        grad = grad + part(MARGINAL_TEACHER, p * pull[0][..., None] - t * r, weight)
    if target is not None:
        g = torch.exp(row_log_prob(unread(target, weight_outside), lse_target)).mean(1, keepdim=True)
        grad = grad + part(MARGINAL_TARGET, p * pull[-1][..., None] - g * r, weight_outside)
    return grad.to(logits.dtype)


def _coefficients(
    grad_joint: Tensor, grad_correlation: Tensor, log_p: Tensor, tokens: Tensor, weight: Tensor | None, share: Tensor
) -> Tensor:
    """c (B, L, D, K); 0 where no component has the token."""
    a = at_tokens(log_p, tokens)
    marginal = torch.logsumexp(a, 1, keepdim=True)
    dead = torch.isneginf(marginal)
    r = torch.exp(a - torch.where(dead, 0.0, marginal))
    shares = share[:, :, None]  # (B, L, 1, K)
    c = grad_joint[:, None, None] * shares + grad_correlation[:, None, None] * (shares - r)
    return weighted(None if weight is None else weight[:, None, :, None], torch.where(dead, 0.0, c))
