"""The ancestral sampler: the process's own steps down a grid of times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.process import Process
from di4c_ext.sampler.common import (
    LATENTS,
    STEP,
    Callback,
    LatentSource,
    as_grid,
    ask,
    check_drawn,
    evaluation_keys,
    step_of,
)
from di4c_ext.sampler.guidance import LOGITS_BYTES, in_pieces


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
    latents: LatentSource = None,
    temperature: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
    callback: Callback = None,
) -> Tensor:
    """x at the last of `times`, (B, D), by steps x_s ~ p(x_s | x_t) down the grid, one call of the denoiser each.

    x (B, D) int64 is the state at times[0]: process.prior(...), or masks among known states, which are kept
    (infilling). The grid falls strictly within [1, 0]; where it ends in 0 no mask is left, where it ends above, x at
    that time comes back, ready for another denoiser. latents: None for a teacher; for a student keys (B,) -> (B, C),
    called at every step with fresh keys, so that each step mixes anew, or (B, C), the same at every step. keys (B,): a
    sample depends on its own key alone, whatever the batch. logits_bytes: for guided logits, see `GuidedDenoiser`.
    callback gets a dict at every step: i, t, s, x_t, logits, x_s.

    Raises ValueError for a grid that does not fall, and for logits that hold no distribution at a masked position.
    """
    op = "sample_ancestral"
    grid = as_grid(op, times, least=2, to_zero=True)
    with inference(denoiser, x.device):
        for i, (t, s) in enumerate(pairwise(grid)):
            key = evaluation_keys(keys, i)
            logits = ask(denoiser, x, t, latents, key[LATENTS])

            draw = partial(step_of, process.step, t, s, temperature)
            (x_s,) = in_pieces(draw, logits, logits_bytes, key[STEP], x)
            check_drawn(op, x_s, t)
            if callback is not None:
                callback({"i": i, "t": t, "s": s, "x_t": x, "logits": logits, "x_s": x_s})
            x = x_s
    return x
