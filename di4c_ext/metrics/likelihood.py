"""The likelihood bound of a masked-diffusion denoiser, in nats a sample.

    -log p(x_0) <= sum_{k=1..D} (1/k) E_{sets of k masked positions} [ -sum_{d masked} log p^d(x_0^d | x_k) ]

It is the continuous-time bound of any masking schedule with the time integrated out given the number k of masked
positions, so no weight 1/t appears: drawing k uniformly, one term costs weight D/k.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.process import AbsorbingProcess

_GRID = torch.linspace(0, 1, 1025, dtype=torch.float64)


def likelihood_bound(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x_0: Tensor,
    keys: Tensor,
    *,
    level: Tensor | None = None,
    stream: int = 0,
    conditions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One-draw estimate (B,) of the bound for x_0 (B, D), with a graph; the mean over draws is the bound.

    level (B,) float64 in [0, 1) chooses k = 1 + floor(level * D); left out, the keys draw it. The positions come
    from the keys. conditions: further arguments of the denoiser.
    """
    length = x_0.shape[1]
    draws = random.uniform(keys, length + 1, stream=stream)
    level = draws[:, 0] if level is None else level.to(draws)
    k = (level * length).long().clamp_max(length - 1) + 1
    masked = draws[:, 1:].argsort(-1).argsort(-1) < k[:, None]
    x_t = torch.where(masked, process.mask_id, x_0)
    t = _time_at(process, k.double() / length)
    logits = denoiser(x_t, t.to(torch.float32), **(conditions or {}))
    weight = process.weight(x_t) * (length / k.to(torch.float32))[:, None]
    if isinstance(logits, ops.Hidden):  # as a mixture of one component, whose logits are made a few at a time
        return -ops.mixture_log_prob(logits.mapped(lambda x: x[:, None]), x_0[:, None], weight)[0][:, 0]
    return ops.masked_cross_entropy(logits, x_0, weight)


def mean_likelihood_bound(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x_0: Tensor,
    keys: Tensor,
    *,
    draws: int = 8,
    batch_size: int = 512,
    conditions: Mapping[str, Tensor] | None = None,
) -> float:
    """The bound averaged over x_0 (N, D) and `draws` draws; k is stratified over the samples within a draw.

    conditions: further arguments of the denoiser, (N, ...) each.
    """
    n = len(x_0)
    if n < 1 or draws < 1:
        raise ValueError(f"mean_likelihood_bound: {n} samples and {draws} draws; both must be at least 1")
    total = 0.0
    with inference(denoiser, x_0.device):
        for draw in range(draws):
            drawn = random.fold_in(keys, draw)
            level = (drawn.argsort().argsort().double() + 0.5) / n
            for rows in torch.arange(n, device=x_0.device).split(batch_size):
                told = {name: value[rows] for name, value in (conditions or {}).items()}
                bound = likelihood_bound(denoiser, process, x_0[rows], drawn[rows], level=level[rows], conditions=told)
                total += float(bound.double().sum())
    return total / (n * draws)


def _time_at(process: AbsorbingProcess, mask_prob: Tensor) -> Tensor:
    """The t at which a position is masked with this probability, by interpolation; (B,) float64."""
    grid = _GRID.to(mask_prob.device)
    levels = process.mask_prob(grid)
    right = torch.searchsorted(levels, mask_prob).clamp(1, len(grid) - 1)
    low, high = levels[right - 1], levels[right]
    return torch.lerp(grid[right - 1], grid[right], ((mask_prob - low) / (high - low)).clamp(0, 1))
