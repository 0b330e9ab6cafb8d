"""What a student's latents carry: correlation between positions, in nats, and information about single positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.ops import Hidden, Logistic, Logits
from di4c_ext.process import Process
from di4c_ext.sampler.guidance import cuts_of, dense

_DRAWN, _HELD = 0, 1  # sub-keys: of what is drawn, and of the latents it is held against
_MOST_BYTES = 256 << 20  # of logits made at a time
_BYTES_EACH = 20  # logits, their logarithms of probabilities, these, and two differences


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
    """The means over x_0 (N, D) of `mixture_figures`, whose arguments these are."""
    found = mixture_figures(
        student,
        process,
        x_0,
        keys,
        latents,
        num_latents=num_latents,
        t=t,
        batch_size=batch_size,
        conditions=conditions,
    )
    return {name: float(values.mean()) for name, values in found.items()}


def mixture_figures(
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
) -> dict[str, Tensor]:
    """Of each of x_0 (N, D) noised to time t, with num_latents components to the mixture, (N,) float64:

    joint        log of the mixture's probability of the positions still noised, in nats
    correlation  how much of it the positions owe to one another: joint - log of the product of its marginals.
                 0 for a model without latents, or one that ignores them
    information  summed over those positions, what the latent tells about each: H(mean over latents) - mean H, in nats
    variation    the mean over them of how far the law of one latent is from that of all, in total variation: from 0,
                 where the prediction does not hang on the latent, to 1

    The latents are drawn from keys, apart from what x_0 was made with. Of a student that knows the sum over all of them
    (`is_exact`) the joint is that sum, and the correlation is it above the marginals of the drawn ones. conditions:
    further arguments of the student, (N, ...) each.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("joint", "correlation", "information", "variation")}
    with inference(student, x_0.device):
        for rows in torch.arange(len(x_0), device=x_0.device).split(batch_size):
            x_t = process.corrupt(x_0[rows], t, keys[rows])
            time = torch.full((len(rows),), t, device=x_0.device)
            told = {name: value[rows] for name, value in (conditions or {}).items()}
            logits = student(x_t, time, latents(keys[rows], num_latents), **told)
            weight = process.weight(x_t)
            estimated = ops.mixture_log_prob(logits, x_0[rows, None], weight)
            joint, correlation = _summed(student, x_t, time, x_0[rows], told, *estimated)
            information, variation = _use(logits)
            noised = (weight > 0).sum(1).clamp(min=1)
            for name, values in (
                ("joint", joint),
                ("correlation", correlation),
                ("information", (information * weight).sum(1)),
                ("variation", (variation * (weight > 0)).sum(1) / noised),
            ):
                found[name].append(values.double().cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def total_correlation(
    student: Denoiser,
    process: Process,
    length: int,
    keys: Tensor,
    latents: Latents,
    *,
    num_latents: int,
    batch_size: int = 32,
    conditions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Of each of N samples that one step makes of noise, what its D = length positions owe to one another (N,) float64.

    That is log p(x) - sum_d log p^d(x^d) of the student's mixture p at x_1, in nats; the mean over samples is the total
    correlation of p. x is drawn with one latent, and p is estimated by num_latents others: of a student that carries
    much, few of them rarely agree with x, and less than there is, or even less than 0, is seen; one that `is_exact`
    tells log p(x) itself. keys (N,); conditions as for `mixture_figures`.
    """
    found = []
    own, others = random.fold_in(keys, _DRAWN), random.fold_in(keys, _HELD)
    with inference(student, keys.device):
        for rows in torch.arange(len(keys), device=keys.device).split(batch_size):
            x_1 = process.prior((len(rows), length), keys[rows])
            time = torch.ones(len(rows), device=keys.device)
            told = {name: value[rows] for name, value in (conditions or {}).items()}
            x_0: Any = ops.sample_categorical(student(x_1, time, latents(own[rows], 1)[:, 0], **told), own[rows])
            logits = student(x_1, time, latents(others[rows], num_latents), **told)
            estimated = ops.mixture_log_prob(logits, x_0[:, None], process.weight(x_1))
            _, correlation = _summed(student, x_1, time, x_0, told, *estimated)
            found.append(correlation.cpu())
    return torch.cat(found)


def is_exact(student: Denoiser) -> bool:
    """Whether a student knows the probability of its mixture, all latents summed over: one whose latent is a chain."""
    return bool(getattr(getattr(student, "config", None), "has_chain", False))


def _summed(
    student: Denoiser,
    x_t: Tensor,
    time: Tensor,
    x_0: Tensor,
    told: Mapping[str, Tensor],
    joint: Tensor,
    correlation: Tensor,
) -> tuple[Tensor, Tensor]:
    """Joint and correlation (B,) float64 of the estimates (B, 1) of some latents, the joint exactly if it is known."""
    joint, correlation = joint[:, 0].double(), correlation[:, 0].double()
    if not is_exact(student):
        return joint, correlation
    known = student(x_t, time, x_s=x_0, **told).double()
    return known, known - (joint - correlation)


def _use(logits: Logits) -> tuple[Tensor, Tensor]:
    """(B, L, D, S) -> (B, D) each, piece by piece: the mutual information of latent and state, and the mean over
    latents of the total variation between the law of one and that of all."""
    batch, num_latents, length, num_states = logits.shape
    each = _BYTES_EACH * num_latents * num_states
    pieces = []
    for positions in cuts_of(length, each, _MOST_BYTES):
        part = _at(logits, positions)
        cuts = cuts_of(batch, each * part.shape[2], _MOST_BYTES)
        information, variation = zip(*(_use_of(dense(part, cut)) for cut in cuts), strict=True)
        pieces.append((torch.cat(information), torch.cat(variation)))
    information, variation = zip(*pieces, strict=True)
    return torch.cat(information, 1), torch.cat(variation, 1)


def _at(logits: Logits, positions: slice) -> Logits:
    """The logits of some positions, in the form they have."""
    if isinstance(logits, Logistic):
        mean, log_scale = (x[:, :, positions] for x in (logits.mean, logits.log_scale))
        return logits._replace(mean=mean, log_scale=log_scale)
    return logits.mapped(lambda x: x[:, :, positions]) if isinstance(logits, Hidden) else logits[:, :, positions]


def _use_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(1)
    information = torch.special.xlogy(p, p).sum(-1).mean(1) - torch.special.xlogy(mean, mean).sum(-1)
    return information, 0.5 * (p - mean[:, None]).abs().sum(-1).mean(1)
