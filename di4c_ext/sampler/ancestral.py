"""The ancestral sampler: the process's own steps down a grid of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Failures,
    LatentSource,
    as_grid,
    ask,
    evaluation_keys,
    has_masks,
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
    top_p: float = 1.0,
    skip_idle: bool = False,
    conditions: Mapping[str, Tensor] | None = None,
    logits_bytes: int = LOGITS_BYTES,
    callback: Callback = None,
) -> Tensor:
    """x at the last of `times`, (B, D), by steps x_s ~ p(x_s | x_t) down the grid, one call of the denoiser each.

    x (B, D) int64 is the state at times[0]: process.prior(...), or masks among known states, which are kept
    (infilling). The grid falls strictly within [1, 0]; where it ends in 0 no mask is left, where it ends above, x at
    that time comes back, ready for another denoiser. latents: None for a teacher; for a student keys (B,) -> (B, C),
    called at every step with fresh keys, so that each step mixes anew, or (B, C), the same at every step. keys (B,): a
    sample depends on its own key alone, whatever the batch. temperature, top_p: of the draws of tokens.

    skip_idle: ask the denoiser only for the samples of which a step unmasks something. Which those are the coins say,
    whatever the logits, so the samples stay what they are (up to a draw that falls within the rounding of a network on
    another batch); a sample costs at most as many evaluations as it has masks, however many the steps. The host then
    waits for the device at every step; by default it waits once, at the end.

    conditions: (B, ...) each, what the denoiser is told of the samples, by the names of its arguments. logits_bytes:
    for guided logits, see `GuidedDenoiser`. callback gets a dict at every step: i, t, s, x_t, logits, x_s; under
    skip_idle also rows (B',), the samples that the logits are of, which are None where no sample was asked for.

    Raises ValueError for a grid that does not fall, for logits that hold no distribution at a masked position, and for
    skip_idle with a process whose steps draw everywhere.
    """
    op = "sample_ancestral"
    grid = as_grid(op, times, least=2, to_zero=True)
    unmasked = getattr(process, "unmasked", None)
    if skip_idle and unmasked is None:
        raise ValueError(f"{op}: skip_idle is for processes that say what a step unmasks, got {process!r}")
    failures, masked = Failures(op, x), has_masks(process)
    told = dict(conditions or {})
    with inference(denoiser, x.device):
        for i, (t, s) in enumerate(pairwise(grid)):
            key = evaluation_keys(keys, i)
            logits, x_s, seen = None, x, {}
            rows: slice | Tensor = slice(None)
            if skip_idle:
                rows = unmasked(x, t, s, key[STEP]).any(1).nonzero()[:, 0]  # type: ignore[misc]  # checked above
                seen = {"rows": rows}
            if isinstance(rows, slice) or len(rows):
                fixed = latents[rows] if isinstance(latents, Tensor) else latents
                mine = {name: value[rows] for name, value in told.items()}
                logits = ask(denoiser, x[rows], t, fixed, key[LATENTS][rows], mine)
                draw = partial(step_of, process.step, masked, t, s, temperature, top_p)
                (x_s,) = in_pieces(draw, logits, logits_bytes, key[STEP][rows], x[rows], made=top_p < 1)
                if not isinstance(rows, slice):
                    x_s = x.index_copy(0, rows, x_s)
            if callback is not None:
                callback({"i": i, "t": t, "s": s, "x_t": x, "logits": logits, "x_s": x_s, **seen})
            x = failures.filled(x_s, x, t)
    failures.check()
    return x
