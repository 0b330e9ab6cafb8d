"""What the samplers share: grids, keys, calls of a denoiser, and what is said when it gives nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser
from di4c_ext.ops import Logits
from di4c_ext.ops.truncation import nucleus
from di4c_ext.process import Process, rows
from di4c_ext.sampler.guidance import GuidedLogits

STEP, LATENTS = 0, 1  # sub-keys of an evaluation's key; further latents of it have the sub-keys after

# None for a teacher; keys (B,) -> (B, C), called with fresh keys at every evaluation; or (B, C), the same at each.
LatentSource: TypeAlias = Callable[[Tensor], Tensor] | Tensor | None
Callback: TypeAlias = Callable[[dict[str, Any]], None] | None


def as_grid(op: str, times: Tensor | Sequence[float], *, least: int, to_zero: bool) -> list[float]:
    """The times as numbers; ValueError unless there are `least` of them, falling strictly from at most 1."""
    grid = [float(time) for time in (times.tolist() if isinstance(times, Tensor) else times)]
    falling = all(1 >= t > s for t, s in pairwise([*grid, -1.0]))
    if len(grid) < least or not falling or grid[-1] < 0 or (grid[-1] == 0 and not to_zero):
        end = "to at least 0" if to_zero else "and end above 0"
        number = {1: "one of them or more", 2: "two of them or more"}[least]
        raise ValueError(f"{op}: times must fall strictly from at most 1 {end}, {number}, got {_shown(grid)}")
    return grid


def _shown(grid: list[float]) -> str:
    return str(grid) if len(grid) <= 8 else f"{str(grid[:8])[:-1]}, ...] ({len(grid)} of them)"


def evaluation_keys(keys: Tensor, i: int, uses: int = 2) -> Tensor:
    """keys (B,) -> (uses, B), those of evaluation i."""
    return random.fold_in(random.fold_in(keys, i), torch.arange(uses, device=keys.device)[:, None])


def ask(
    denoiser: Denoiser,
    x: Tensor,
    t: float,
    latents: LatentSource,
    key: Tensor,
    conditions: Mapping[str, Tensor] | None = None,
) -> Any:
    """The denoiser's logits of x (B, D) at time t, in whatever form; key (B,) is what latents are drawn from."""
    time, told = torch.full((x.shape[0],), t, device=x.device), dict(conditions or {})
    if latents is not None:
        told["latents"] = latents if isinstance(latents, Tensor) else latents(key)
    return denoiser(x, time, **told)


def has_masks(process: Process) -> bool:
    return getattr(process, "mask_id", None) is not None


def step_of(
    step: Any,
    masked: bool,
    t: float,
    s: float,
    temperature: float,
    top_p: float,
    logits: Logits,
    key: Tensor,
    x: Tensor,
) -> tuple[Tensor]:
    """A process's step in the form `in_pieces` takes. One with masks truncates the rows itself that it draws from."""
    if masked and top_p < 1:
        return (step(x, logits, t, s, key, temperature=temperature, top_p=top_p),)
    if top_p < 1:
        logits = nucleus(rows.wide(logits), top_p, temperature=temperature)
    return (step(x, logits, t, s, key, temperature=temperature),)


def check_levels(op: str, process: Process, x: Tensor, keys: Tensor) -> None:
    """ValueError unless x is a state (B, D) of a process without masks, with a key for each sample."""
    if has_masks(process):
        raise ValueError(f"{op}: {process!r} has masks, which only its own steps take away; use sample_ancestral")
    _check_state(op, x, keys)


def check_masked(op: str, process: Process, x: Tensor, keys: Tensor) -> None:
    """ValueError unless x is a state (B, D) of a process with masks, with a key for each sample."""
    if not has_masks(process):
        raise ValueError(f"{op}: {process!r} has no masks to take away; use sample_analytic")
    _check_state(op, x, keys)


def _check_state(op: str, x: Tensor, keys: Tensor) -> None:
    if x.ndim != 2 or x.dtype != torch.int64:
        raise ValueError(f"{op}: x must be int64 (B, D), got {x.dtype} {tuple(x.shape)}; see process.prior")
    if keys.shape != x.shape[:1]:
        raise ValueError(f"{op}: keys must be ({x.shape[0]},), one a sample of x, got {tuple(keys.shape)}")


def check_logits(op: str, process: Process, logits: Logits | GuidedLogits, x: Tensor) -> None:
    """ValueError unless logits are (B, D, S)."""
    expected = (*x.shape, process.num_states)
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"{op}: the denoiser must give logits (B, D, S) = {expected}, got {tuple(logits.shape)}; "
            "latents must be (B, C), one a sample"
        )


class Failures:
    """Positions whose logits held no distribution, told at the end: looking at every step would stop the host."""

    def __init__(self, op: str, x: Tensor) -> None:
        self._op = op
        self._at = torch.full(x.shape, torch.nan, dtype=torch.float64, device=x.device)  # the time of the first one

    def filled(self, x_s: Tensor, instead: Tensor, t: float | Tensor) -> Tensor:
        """x_s (b, D), of the first b samples, with the state of `instead` where its draw failed; t: one, or (b,)."""
        failed, before = x_s < 0, self._at[: len(x_s)]
        when = t[:, None] if isinstance(t, Tensor) else t
        self._at[: len(x_s)] = torch.where(failed & before.isnan(), when, before)
        return torch.where(failed, instead, x_s)

    def check(self, order: Tensor | None = None) -> None:
        """ValueError naming the first such position, of the samples in this order; waits for the device, once."""
        at = self._at if order is None else self._at[order]
        if not bool(at.isnan().all()):
            b, d = (~at.isnan()).nonzero()[0].tolist()
            raise ValueError(_nothing_drawn(self._op, at[b, d].item(), b, d))


def check_drawn(op: str, x_s: Tensor, t: float) -> None:
    """ValueError naming the first position whose logits held no distribution."""
    if bool((x_s < 0).any()):
        b, d = (x_s < 0).nonzero()[0].tolist()
        raise ValueError(_nothing_drawn(op, t, b, d))


def _nothing_drawn(op: str, t: float, b: int, d: int) -> str:
    return (
        f"{op}: the denoiser's logits hold no distribution (NaN or all -inf) at t = {t:.4g}, "
        f"first at sample {b}, position {d}; look at the weights, or sample in float32"
    )
