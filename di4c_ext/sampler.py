"""Samplers: one plain function per algorithm."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.process import Process

_STEP, _LATENTS = 0, 1  # sub-keys of a step's key


def times(num_steps: int) -> Tensor:
    """The even grid 1 = t_0 > t_1 > ... > t_num_steps = 0, float64 (num_steps + 1,)."""
    if num_steps < 1:
        raise ValueError(f"times: num_steps must be at least 1, got {num_steps}; one step goes from noise to data")
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def sample_ancestral(
    denoiser: Denoiser,
    process: Process,
    x: Tensor,
    times: Tensor | Sequence[float],
    keys: Tensor,
    *,
    latents: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """x at the last of `times`, (B, D), by steps x_s ~ p(x_s | x_t) down the grid, one call of the denoiser each.

    x (B, D) int64 is the state at times[0]: process.prior(...), or masks among known states, which are kept
    (infilling). The grid falls strictly within [1, 0]; where it ends in 0 no mask is left, where it ends above, x at
    that time comes back, ready for another denoiser. latents: None for a teacher; for a student keys (B,) -> (B, C),
    called at every step with fresh keys, so that each step mixes anew. keys (B,): a sample depends on its own key
    alone, whatever the batch. callback gets a dict at every step: i, t, s, x_t, logits, x_s.

    Raises ValueError for a grid that does not fall, and for logits that hold no distribution at a masked position.
    """
    grid = times.tolist() if isinstance(times, Tensor) else [float(time) for time in times]
    if len(grid) < 2 or not all(1 >= t > s >= 0 for t, s in pairwise(grid)):
        raise ValueError(
            f"sample_ancestral: times must fall strictly from at most 1 to at least 0, two of them or more, got {grid}"
        )
    uses = torch.arange(2, device=keys.device)[:, None]
    with inference(denoiser, x.device):
        for i, (t, s) in enumerate(pairwise(grid)):
            key = random.fold_in(random.fold_in(keys, i), uses)  # (2, B)
            time = torch.full((x.shape[0],), t, device=x.device)
            mixture = {} if latents is None else {"latents": latents(key[_LATENTS])}
            logits = denoiser(x, time, **mixture)
            x_s = process.step(x, logits, t, s, key[_STEP], temperature=temperature)
            if bool((x_s < 0).any()):
                b, d = (x_s < 0).nonzero()[0].tolist()
                raise ValueError(
                    f"sample_ancestral: the denoiser's logits hold no distribution (NaN or all -inf) at t = {t:.4g}, "
                    f"first at sample {b}, position {d}; look at the weights, or sample in float32"
                )
            if callback is not None:
                callback({"i": i, "t": t, "s": s, "x_t": x, "logits": logits, "x_s": x_s})
            x = x_s
    return x
