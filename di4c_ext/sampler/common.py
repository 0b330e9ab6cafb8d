"""What the samplers share: grids, keys, calls of a denoiser, and what is said when it gives nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser
from di4c_ext.ops import Logits
from di4c_ext.process import Process
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
        raise ValueError(f"{op}: times must fall strictly from at most 1 {end}, {number}, got {grid}")
    return grid


def evaluation_keys(keys: Tensor, i: int, uses: int = 2) -> Tensor:
    """keys (B,) -> (uses, B), those of evaluation i."""
    return random.fold_in(random.fold_in(keys, i), torch.arange(uses, device=keys.device)[:, None])


def ask(denoiser: Denoiser, x: Tensor, t: float, latents: LatentSource, key: Tensor) -> Any:
    """The denoiser's logits of x (B, D) at time t, in whatever form; key (B,) is what latents are drawn from."""
    time = torch.full((x.shape[0],), t, device=x.device)
    if latents is None:
        return denoiser(x, time)
    return denoiser(x, time, latents=latents if isinstance(latents, Tensor) else latents(key))


def step_of(step: Any, t: float, s: float, temperature: float, logits: Logits, key: Tensor, x: Tensor) -> tuple[Tensor]:
    """A process's step in the form `in_pieces` takes."""
    return (step(x, logits, t, s, key, temperature=temperature),)


def check_levels(op: str, process: Process, x: Tensor, keys: Tensor) -> None:
    """ValueError unless x is a state (B, D) of a process without masks, with a key for each sample."""
    if getattr(process, "mask_id", None) is not None:
        raise ValueError(f"{op}: {process!r} has masks, which only its own steps take away; use sample_ancestral")
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


def check_drawn(op: str, x_s: Tensor, t: float) -> None:
    """ValueError naming the first position whose logits held no distribution."""
    if bool((x_s < 0).any()):
        b, d = (x_s < 0).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: the denoiser's logits hold no distribution (NaN or all -inf) at t = {t:.4g}, "
            f"first at sample {b}, position {d}; look at the weights, or sample in float32"
        )
