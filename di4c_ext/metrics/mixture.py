"""What a student's latents carry: correlation between positions, in nats, and information about single positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.ops import Logits
from di4c_ext.process import Process
from di4c_ext.sampler.guidance import cuts_of, dense

_MOST_BYTES = 256 << 20  # of logits made at a time
_BYTES_EACH = 12  # logits, their logarithms of probabilities, and these


def correlation_gain(
    student: Denoiser,
    process: Process,
    x_0: Tensor,
    keys: Tensor,
    latents: Latents,
    *,
    num_latents: int,
    t: float = 1.0,
    batch_size: int = 32,
    conditions: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Means over x_0 (N, D) at time t, in nats a sample; with num_latents components to the mixture:

    joint        log of the mixture's probability of the positions still noised
    correlation  how much of it the positions owe to one another: joint - log of the product of its marginals.
                 0 for a model without latents, or one that ignores them
    information  summed over those positions, what the latent tells about each: H(mean over latents) - mean H

    conditions: further arguments of the student, (N, ...) each.
    """
    total = {"joint": 0.0, "correlation": 0.0, "information": 0.0}
    with inference(student, x_0.device):
        for rows in torch.arange(len(x_0), device=x_0.device).split(batch_size):
            x_t = process.corrupt(x_0[rows], t, keys[rows])
            time = torch.full((len(rows),), t, device=x_0.device)
            told = {name: value[rows] for name, value in (conditions or {}).items()}
            logits = student(x_t, time, latents(keys[rows], num_latents), **told)
            weight = process.weight(x_t)
            joint, correlation = ops.mixture_log_prob(logits, x_0[rows, None], weight)
            total["joint"] += float(joint.double().sum())
            total["correlation"] += float(correlation.double().sum())
            total["information"] += float((_information(logits) * weight).sum())
    return {name: value / len(x_0) for name, value in total.items()}


def _information(logits: Logits) -> Tensor:
    """(B, L, D, S) -> (B, D): mutual information of the latent and the state at each position, piece by piece."""
    batch, *rest = logits.shape
    cuts = cuts_of(batch, _BYTES_EACH * torch.Size(rest).numel(), _MOST_BYTES)
    return torch.cat([_information_of(dense(logits, cut)) for cut in cuts])


def _information_of(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(1)
    return torch.special.xlogy(p, p).sum(-1).mean(1) - torch.special.xlogy(mean, mean).sum(-1)
