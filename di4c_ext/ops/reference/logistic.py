"""The logistic head: S logits of a row from two numbers, mean mu and log-scale, as the published pixel network has it.

A logistic distribution of scale exp(log_scale - 2) cut into S bins of [-1, 1], bin i between the edges e_i = -1 + 2i/S
and e_{i+1}. With kappa = exp(2 - log_scale), r_i = (e_{i+1} - mu) kappa, l_i = (e_i - mu) kappa, w = 2/S, eps = 1e-6:

    x_i = log sigma(r_i) + log(sigma(-l_i) q + eps),   q = 1 - exp(-w kappa)

which is log((1 + eps) sigma(r_i) - sigma(l_i)) without its cancellation. The floor eps is the published one: bins right
of the mean keep a probability of about 1e-6, bins left of it fall to 0. Log-scales below -64, where a row is one-hot
long since, count as -64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

FLOOR = 1e-6
MIN_LOG_SCALE = -64.0  # logistic.h: kMinLogScale


def _edges(mean: Tensor, log_scale: Tensor, num_states: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scaled edges l and r (..., S), and w kappa (..., 1); rounded last, as kappa may be large."""
    kappa = torch.exp(2 - log_scale.double().clamp(min=MIN_LOG_SCALE))[..., None]
    numbers = torch.arange(-num_states, num_states + 1, 2, dtype=torch.float64, device=mean.device)
    scaled = ((numbers / num_states - mean.double()[..., None]) * kappa).to(mean.dtype)
    return scaled[..., :-1], scaled[..., 1:], (2 / num_states * kappa).to(mean.dtype)


def logistic_logits(mean: Tensor, log_scale: Tensor, num_states: int) -> Tensor:
    """mean, log_scale (...) -> logits (..., S) in their dtype, differentiable in both."""
    left, right, width = _edges(mean, log_scale, num_states)
    return logsigmoid(right) + torch.log(torch.sigmoid(-left) * -torch.expm1(-width) + FLOOR)


def logistic_pull(mean: Tensor, log_scale: Tensor, grad: Tensor) -> Tensor:
    """What the gradient (..., S) of the logits is to mean and log_scale: (..., 2). A row without gradient has none
    whatever it holds: it may be one that is not to be looked at."""
    left, right, width = _edges(mean, log_scale, grad.shape[-1])
    q, above = -torch.expm1(-width), torch.sigmoid(-left)
    share = above / (above * q + FLOOR)
    by_right, by_left = torch.sigmoid(-right), -q * torch.sigmoid(left) * share
    kappa = width[..., 0] * (grad.shape[-1] / 2)
    to_mean = -kappa * (grad * (by_right + by_left)).sum(-1)
    to_scale = -(grad * (by_right * right + by_left * left + share * (width * torch.exp(-width)))).sum(-1)
    pull = torch.stack([to_mean, torch.where(log_scale < MIN_LOG_SCALE, 0.0, to_scale)], -1)
    return torch.where((grad == 0).all(-1, keepdim=True), 0.0, pull)
