"""The first-hitting sampler of masked diffusion (arXiv 2409.02908): from one unmasking straight to the next.

Of n masked positions at time t none has been unmasked down to time s with probability (m(s) / m(t))^n. So the time of
the next unmasking is drawn at once, with u uniform on (0, 1]:

    m(s) = m(t) u^(1/n),    the position any of the n alike,    its token from the denoiser at x_t and time s

That is the limit of infinitely many ancestral steps, without their error and with as many evaluations of the network
as there are masks: the exact baseline of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.ops import Hidden, Logistic
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler.common import (
    LATENTS,
    STEP,
    Callback,
    Failures,
    LatentSource,
    check_logits,
    check_masked,
    evaluation_keys,
)
from di4c_ext.sampler.guidance import GuidedLogits

_OP = "sample_first_hitting"
_TIME = LATENTS + 1  # sub-key of the time and the position


def sample_first_hitting(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x: Tensor,
    keys: Tensor,
    *,
    latents: LatentSource = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    callback: Callback = None,
) -> Tensor:
    """x_0 (B, D) by one token an evaluation: as many evaluations as the most masked sample of x has masks.

    x (B, D) int64 is the state at time 1: masks, or masks among known states, which are kept. Evaluation i sees only
    the samples that have more than i masks, in an order of its own. latents: None for a teacher; a student is asked
    with a fresh one at every evaluation, from which it draws a single token: its correlations stay unused. keys (B,): a
    sample depends on its own key alone, whatever the batch. temperature, top_p: of the draw of a token. conditions:
    (B, ...) each, what the denoiser is told of the samples, by the names of its arguments.

    callback gets a dict at every evaluation: i, rows (B',) the samples that it sees, t (B',) float64 the time of their
    unmasking, position (B',), x_t and x_s (B', D), logits.

    Raises ValueError for a process without masks, arguments that do not fit, and logits that hold no distribution.
    """
    check_masked(_OP, process, x, keys)
    if not isinstance(process, AbsorbingProcess):
        raise ValueError(f"{_OP}: process must be an AbsorbingProcess, whose schedule gives the times, got {process!r}")
    masks = (x == process.mask_id).sum(1)
    # The most masked first: those that still have masks are then always the first ones, and nobody waits for a device.
    order = masks.argsort(descending=True, stable=True)
    left = masks[order].tolist()
    x, keys = x[order], keys[order]
    told = {name: value[order] for name, value in (conditions or {}).items()}
    fixed = latents[order] if isinstance(latents, Tensor) else None
    log_m = process.mask_prob(1.0).log().to(x.device).expand(len(x)).clone()
    failures = Failures(_OP, x)
    with inference(denoiser, x.device):
        for i in range(max(left, default=0)):
            b = sum(n > i for n in left)
            key = evaluation_keys(keys[:b], i, _TIME + 1)
            x_t = x[:b]
            t, position = _next(process, x_t, log_m, masks[order[:b]] - i, key[_TIME])
            asked: dict[str, Tensor] = {name: value[:b] for name, value in told.items()}
            if latents is not None:
                asked["latents"] = fixed[:b] if fixed is not None else latents(key[LATENTS])  # type: ignore[operator]
            logits = denoiser(x_t, t.float(), **asked)
            check_logits(_OP, process, logits, x_t)
            token: Any = ops.absorbing_step(
                _row(logits, position),
                torch.full_like(x_t[:, :1], process.mask_id),
                key[STEP],
                unmask_prob=1.0,
                mask_id=process.mask_id,
                temperature=temperature,
                top_p=top_p,
            )
            x_s = x_t.scatter(1, position[:, None], token)
            if callback is not None:
                seen = {"i": i, "rows": order[:b], "t": t, "position": position}
                callback({**seen, "x_t": x_t, "logits": logits, "x_s": x_s})
            # A failed draw is given any token: there are as many evaluations as masks.
            x = torch.cat([failures.filled(x_s, torch.zeros_like(x_s), t), x[b:]])
    back = order.argsort()
    failures.check(back)
    return x[back]


def _next(process: AbsorbingProcess, x: Tensor, log_m: Tensor, n: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Time (b,) float64 and position (b,) of the next unmasking; log_m[:b] = log m(t) goes on to that time."""
    u, place = random.uniform(key, 2).unbind(1)
    log_m[: len(x)] += torch.log1p(-u) / n
    masked = x == process.mask_id
    rank = torch.minimum((place * n).floor().long(), n - 1)
    position = (masked & (masked.cumsum(1) == rank[:, None] + 1)).int().argmax(1)
    return process.time_of(log_m[: len(x)].exp()), position


def _row(logits: Any, position: Tensor) -> Tensor | Hidden:
    """The logits (b, 1, S) of one position of each sample."""

    def at(x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), position][:, None]

    if isinstance(logits, GuidedLogits):
        student, teacher = _row(logits.student, position), _row(logits.teacher, position)
        return GuidedLogits(teacher, student, logits.scale).logits()
    if isinstance(logits, Logistic):
        return logits._replace(mean=at(logits.mean), log_scale=at(logits.log_scale)).logits()
    return logits.mapped(at) if isinstance(logits, Hidden) else at(logits)
