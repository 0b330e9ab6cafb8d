"""The pixel systems' sampler: posterior steps down to a last time above 0, and one denoising from there.

Near the data little noise is left (at t = 0.01 six of 256 levels, one standard deviation); published samples stop there
and take the likeliest level of every position. Of masked diffusion a posterior step is the process's own (for its
schedules the published analytic update is the same law); at the last time, 1e-5 as published, hardly a mask is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.ops import Hidden, Logistic, Logits, mixture_log_prob, sample_categorical
from di4c_ext.process import Process
from di4c_ext.sampler.common import (
    LATENTS,
    STEP,
    Callback,
    Failures,
    LatentSource,
    as_grid,
    ask,
    check_levels,
    check_logits,
    check_masked,
    evaluation_keys,
    has_masks,
    step_of,
)
from di4c_ext.sampler.guidance import LOGITS_BYTES, in_pieces

Final = Literal["argmax", "draw"]


def analytic_times(num_evaluations: int, last: float = 0.01) -> Tensor:
    """The published grid 1 = t_0 > ... > t_{n-1} = last, even, float64 (n,): a time for each evaluation. n = 1: [1]."""
    if num_evaluations < 1:
        raise ValueError(f"analytic_times: num_evaluations must be at least 1, got {num_evaluations}")
    if not 0 < last < 1:
        raise ValueError(f"analytic_times: last must lie in (0, 1), the time of the final denoising, got {last}")
    return torch.linspace(1, last, num_evaluations, dtype=torch.float64)


def sample_analytic(
    denoiser: Denoiser,
    process: Process,
    x: Tensor,
    times: Tensor | Sequence[float],
    keys: Tensor,
    *,
    latents: LatentSource = None,
    last_latents: int = 1,
    final: Final = "argmax",
    marginal: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    conditions: Mapping[str, Tensor] | None = None,
    logits_bytes: int = LOGITS_BYTES,
    callback: Callback = None,
) -> Tensor:
    """x_0 (B, D) by n evaluations at the n `times` (`analytic_times`): n - 1 steps and the final denoising.

    x (B, D) int64 is the state at times[0], process.prior(...). A step draws x_0 from the denoiser and x_s from the
    posterior given it; marginal=True draws x_s in one go from the posterior averaged over x_0, which is the same law.
    With masks x may hold known states among them, which are kept; the final denoising fills the masks that are left,
    and where there are none it is not made, for which the host waits for the device.
    final: "argmax" takes the likeliest state of every position at the last time, "draw" draws it.

    latents: None for a teacher; for a student keys (B,) -> (B, C), called at every evaluation with fresh keys, or
    (B, C), the same at every one. last_latents: K > 1 evaluates K latents at the last time, one after the other, and
    keeps of each sample the x_0 whose likeliest states have the largest sum of log-probabilities; n - 1 + K
    evaluations; not with masks. temperature, top_p: of the draws of x_0. conditions: (B, ...) each, what the denoiser
    is told of the samples, by the names of its arguments.

    keys (B,): a sample depends on its own key alone, whatever the batch. logits_bytes: where logits
    have to be made, those of a `GuidedDenoiser` and of a Logistic without kernels, then of no more samples at a time
    than take so many bytes, one at least. callback gets a dict at
    every evaluation: i, t, s, x_t, logits, x_s, with s = 0 at the last; under K > 1 the last has `score` (B,) and
    `chosen` (B,), 0..K-1, in place of logits.

    Raises ValueError for arguments that do not fit, and logits that hold no distribution.
    """
    op = "sample_analytic"
    grid = as_grid(op, times, least=1, to_zero=False)
    if isinstance(last_latents, bool) or not isinstance(last_latents, int) or last_latents < 1:
        raise ValueError(f"{op}: last_latents must be an integer of at least 1, got {last_latents!r}")
    if last_latents > 1 and not callable(latents):
        raise ValueError(
            f"{op}: last_latents {last_latents} needs latents to choose from, a function keys (B,) -> (B, C), "
            f"got {'none' if latents is None else 'fixed ones'}"
        )
    if last_latents > 1 and has_masks(process):
        raise ValueError(f"{op}: last_latents {last_latents} is for processes without masks, got {process!r}")
    cast = [(denoiser, latents)] * len(grid)
    settings = _Settings(final, marginal, temperature, top_p, logits_bytes, last_latents, conditions)
    return _run(op, cast, process, x, grid, keys, settings, callback)


def sample_hybrid(
    student: Denoiser,
    teacher: Denoiser,
    process: Process,
    x: Tensor,
    times: Tensor | Sequence[float],
    keys: Tensor,
    *,
    latents: LatentSource,
    teacher_evaluations: int,
    final: Final = "argmax",
    marginal: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    logits_bytes: int = LOGITS_BYTES,
    callback: Callback = None,
) -> Tensor:
    """`sample_analytic` with the student for the first evaluations and its teacher for the last `teacher_evaluations`.

    A student pays where steps are long; near the data its teacher knows what it was taught from. With 0 of the
    teacher's this is sample_analytic of the student, with all it is that of the teacher, number by number.

    Raises ValueError as sample_analytic, and unless 0 <= teacher_evaluations <= len(times).
    """
    op = "sample_hybrid"
    grid = as_grid(op, times, least=1, to_zero=False)
    if isinstance(teacher_evaluations, bool) or not isinstance(teacher_evaluations, int):
        raise TypeError(f"{op}: teacher_evaluations must be an integer, got {teacher_evaluations!r}")
    if not 0 <= teacher_evaluations <= len(grid):
        raise ValueError(
            f"{op}: teacher_evaluations must lie between 0 and the {len(grid)} evaluations, got {teacher_evaluations}"
        )
    cast = [(student, latents)] * (len(grid) - teacher_evaluations) + [(teacher, None)] * teacher_evaluations
    return _run(
        op, cast, process, x, grid, keys, _Settings(final, marginal, temperature, top_p, logits_bytes), callback
    )


class _Settings(NamedTuple):
    """What both samplers are told; the names are those of `sample_analytic`."""

    final: Final
    marginal: bool
    temperature: float
    top_p: float
    logits_bytes: int
    last_latents: int = 1
    conditions: Mapping[str, Tensor] | None = None


def _run(
    op: str,
    cast: list[tuple[Denoiser, LatentSource]],
    process: Any,
    x: Tensor,
    grid: list[float],
    keys: Tensor,
    settings: _Settings,
    callback: Callback,
) -> Tensor:
    """cast: the denoiser of each evaluation, and its latents."""
    final, marginal, temperature, top_p, logits_bytes, last_latents, conditions = settings
    masked = has_masks(process)
    (check_masked if masked else check_levels)(op, process, x, keys)
    if final not in ("argmax", "draw"):
        raise ValueError(f"{op}: final must be 'argmax' or 'draw', got {final!r}")
    step = getattr(process, "step_marginal", None) if marginal else process.step
    if step is None:
        raise ValueError(f"{op}: {process!r} has no step_marginal; leave marginal False")
    coolest = temperature if final == "draw" else 0.0
    last: Callable[..., tuple[Tensor, ...]] = partial(_denoise, coolest, top_p)
    if masked:
        last = partial(step_of, process.step, masked, grid[-1], 0.0, coolest, top_p)
    failures, made = Failures(op, x), top_p < 1
    with ExitStack() as modes:
        for denoiser in {id(denoiser): denoiser for denoiser, _ in cast}.values():
            modes.enter_context(inference(denoiser, x.device))
        for i, (t, s) in enumerate(pairwise([*grid, 0.0])):
            if s == 0 and masked and not bool((x == process.mask_id).any()):
                break
            key = evaluation_keys(keys, i, LATENTS + last_latents)

            def logits_of(k: int, i: int = i, t: float = t, x: Tensor = x, key: Tensor = key) -> Any:
                logits = ask(cast[i][0], x, t, cast[i][1], key[LATENTS + k], conditions)
                check_logits(op, process, logits, x)
                return logits

            if s == 0 and last_latents > 1:
                x_s, seen = _best(last, [partial(logits_of, k) for k in range(last_latents)], key[STEP], logits_bytes)
            else:
                logits = logits_of(0)
                draw = last if s == 0 else partial(step_of, step, masked, t, s, temperature, top_p)
                (x_s,) = in_pieces(draw, logits, logits_bytes, key[STEP], x, made=made)
                seen = {"logits": logits}
            if callback is not None:
                callback({"i": i, "t": t, "s": s, "x_t": x, "x_s": x_s, **seen})
            x = failures.filled(x_s, x, t)
    failures.check()
    return x


def _denoise(temperature: float, top_p: float, logits: Logits, key: Tensor, *_: Tensor) -> tuple[Any]:
    return (sample_categorical(logits, key, temperature=temperature, top_p=top_p),)


def _best(
    denoise: Any, evaluations: list[Callable[[], Any]], key: Tensor, logits_bytes: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """x_0 (B, D) of the evaluation whose likeliest states score highest, the first of equals; its score and number."""

    def scored(logits: Logits, key: Tensor) -> tuple[Tensor, Tensor]:
        (likeliest,) = _denoise(0.0, 1.0, logits, key)
        # A row without a distribution has likeliest state -1, which has no probability to look up.
        score = mixture_log_prob(_one_component(logits), likeliest.clamp(min=0)[:, None])[0][:, 0]
        (x_0,) = denoise(logits, key)
        bad = (likeliest < 0).any(1)
        return torch.where(bad[:, None], likeliest, x_0), torch.where(bad, torch.inf, score)

    x_0, best = in_pieces(scored, evaluations[0](), logits_bytes, key)
    chosen = torch.zeros_like(key)
    for k, evaluation in enumerate(evaluations[1:], 1):
        other, score = in_pieces(scored, evaluation(), logits_bytes, key)
        better = score > best
        x_0, best = torch.where(better[:, None], other, x_0), torch.where(better, score, best)
        chosen = torch.where(better, k, chosen)
    return x_0, {"score": best, "chosen": chosen}


def _one_component(logits: Logits) -> Logits:
    """(B, D, S) as (B, 1, D, S)."""
    if isinstance(logits, Logistic):
        return logits._replace(mean=logits.mean[:, None], log_scale=logits.log_scale[:, None])
    return logits.mapped(lambda x: x[:, None]) if isinstance(logits, Hidden) else logits[:, None]
