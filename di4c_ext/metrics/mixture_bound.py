"""A bound on the likelihood of what a few ancestral steps make, for teachers and mixture students of masked diffusion.

The sampler of k steps has the law p_k(x_0) = E over paths; with x_t ~ q(x_t | x_0), one path of coins, and R_i the
positions that the step from t_i to t_{i+1} unmasks,

    -log p_k(x_0) <= E [ -sum_i log E_lambda prod_{d in R_i} p^d(x_0^d | x_{t_i}; lambda) ]

for the coins of q are those of the sampler, and cancel. A teacher, whose product has no lambda, pays here for all that
the positions of one step owe to each other; a mixture pays less. The mean over lambda is estimated by importance
sampling with L latents drawn from their law: -log of an estimate is at least, in the mean, -log of what it estimates
(Jensen), so the value stays a bound and falls towards the above as L grows. At k = 1 the first bound is an equality.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import times

_COINS, _LATENTS = 0, 1  # sub-keys of a draw


def few_step_bound(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x_0: Tensor,
    keys: Tensor,
    *,
    num_steps: int,
    latents: Latents | None = None,
    num_latents: int = 64,
) -> Tensor:
    """One-draw estimate (B,) float64 of the bound of x_0 (B, D) in nats a sample, by k = num_steps evaluations.

    latents: keys (B,), L -> (B, L, C) of a student, None for a teacher. The mean over draws of the keys is the bound.
    """
    if num_steps < 1 or num_latents < 1:
        raise ValueError(f"few_step_bound: num_steps {num_steps}, num_latents {num_latents}; each must be at least 1")
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    own = random.fold_in(keys, _COINS)
    for i, (t, s) in enumerate(pairwise(times(num_steps).tolist())):
        x_t = process.corrupt(x_0, t, own)  # equal coins: what is masked at s is masked at t
        revealed = process.weight(x_t) - (process.weight(process.corrupt(x_0, s, own)) if s > 0 else 0.0)
        if not bool(revealed.any()):
            continue
        time = torch.full((len(x_0),), t, device=x_0.device)
        if latents is None:
            logits = denoiser(x_t, time)[:, None]
        else:
            drawn = random.fold_in(random.fold_in(keys, _LATENTS), i)
            logits = denoiser(x_t, time, latents=latents(drawn, num_latents))
        joint, _ = ops.mixture_log_prob(logits, x_0[:, None], revealed)
        total -= joint[:, 0].double()
    return total


def mean_few_step_bound(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x_0: Tensor,
    keys: Tensor,
    *,
    num_steps: int,
    latents: Latents | None = None,
    num_latents: int = 64,
    draws: int = 1,
    batch_size: int = 16,
) -> float:
    """The bound averaged over x_0 (N, D) and `draws` draws of coins and latents, in nats a sample."""
    if len(x_0) < 1 or draws < 1:
        raise ValueError(f"mean_few_step_bound: {len(x_0)} samples and {draws} draws; both must be at least 1")
    total = 0.0
    with inference(denoiser, x_0.device):
        for draw in range(draws):
            for rows in torch.arange(len(x_0), device=x_0.device).split(batch_size):
                found = few_step_bound(
                    denoiser,
                    process,
                    x_0[rows],
                    random.fold_in(keys[rows], draw),
                    num_steps=num_steps,
                    latents=latents,
                    num_latents=num_latents,
                )
                total += float(found.sum())
    return total / (len(x_0) * draws)
