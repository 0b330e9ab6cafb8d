"""How well a denoiser of levels knows the clean image: the cross-entropy of x_0 given x_t, in nats, at uniform times.

    H(t) = E[ -sum_d log p(x_0^d | x_t) ],   x_t ~ q(x_t | x_0)

It is what such teachers are trained by, and no bound on the likelihood. Under uniform noise a denoiser predicts x_0^d
from the other positions of x_t, and what x_t^d itself tells is the process's to add:

    p(x_0^d | x_t) = q(x_t^d | x_0^d) p(x_0^d) / Z,   Z = alpha(t) p(x_t^d) + (1 - alpha(t)) / S
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.ops import Hidden, Logistic, Logits
from di4c_ext.process import Process, UniformProcess


def denoising_cross_entropy(
    denoiser: Denoiser,
    process: Process,
    x_0: Tensor,
    keys: Tensor,
    *,
    time_min: float,
    level: Tensor | None = None,
    conditions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One-draw estimate (B,) of the mean of H(t) for x_0 (B, D), with a graph.

    level (B,) float64 in [0, 1) says where between time_min and 1 the times lie; left out, the keys draw it. The noise
    comes from the keys. conditions: further arguments of the denoiser. Nothing of size (B, D, S) is made of a Logistic.
    """
    level = random.uniform(keys, 1)[:, 0] if level is None else level.to(keys.device)
    t = 1 - (1 - time_min) * level.double()  # in (time_min, 1]: at full noise exactly, where samplers begin
    x_t = process.corrupt(x_0, t, keys, stream=1)
    logits: Logits = denoiser(x_t, t.float(), **(conditions or {}))
    if isinstance(process, UniformProcess):
        return _given_others(process, logits, x_0, x_t, t)
    joint, _ = ops.mixture_log_prob(_reshaped(logits, lambda x: x[:, None]), x_0[:, None])
    return -joint[:, 0]


def mean_denoising_cross_entropy(
    denoiser: Denoiser, process: Process, x_0: Tensor, keys: Tensor, *, time_min: float, batch_size: int = 128
) -> float:
    """The mean of H(t) over x_0 (N, D), N >= 1, one time each; the times are stratified over the samples."""
    n = len(x_0)
    if n < 1:
        raise ValueError("mean_denoising_cross_entropy: no samples; at least 1 is needed")
    level = (keys.argsort().argsort().double() + 0.5) / n
    total = 0.0
    with inference(denoiser, x_0.device):
        for rows in torch.arange(n, device=x_0.device).split(batch_size):
            found = denoising_cross_entropy(
                denoiser, process, x_0[rows], keys[rows], time_min=time_min, level=level[rows]
            )
            total += float(found.double().sum())
    return total / n


def _given_others(process: UniformProcess, logits: Logits, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """-sum_d log p(x_0^d | x_t), where the logits leave out what x_t^d tells."""
    batch, length = x_0.shape
    each = _reshaped(logits, lambda x: x.flatten(0, 1)[:, None, None])  # every position a sample of its own
    both = torch.stack([x_0, x_t], -1).flatten(0, 1)[..., None]
    log_p, _ = ops.mixture_log_prob(each, both)
    at_x_0, at_x_t = log_p.view(batch, length, 2).unbind(-1)
    alpha = process.alpha(t)[:, None].to(x_0.device)
    noise = (1 - alpha) / process.num_states
    seen = torch.where(x_t == x_0, alpha + noise, noise).log().to(log_p.dtype)
    total = torch.logaddexp(at_x_t + alpha.log().to(log_p.dtype), noise.log().to(log_p.dtype))
    return -(at_x_0 + seen - total).sum(-1)


def _reshaped(logits: Logits, change: Callable[[Tensor], Tensor]) -> Logits:
    """The same rows of logits, their leading dimensions changed."""
    if isinstance(logits, Logistic):
        return logits._replace(mean=change(logits.mean), log_scale=change(logits.log_scale))
    return logits.mapped(change) if isinstance(logits, Hidden) else change(logits)
