"""Exact laws where the state space can be written down: every sequence, every step, a whole sampler. All in float64.

A process has N states: its S clean ones and, where it has one, its mask; the N^D sequences of D of them come in the
order of `sequences`. A denoiser's step t -> s is a matrix over them, a mixture's the mean over its latents, and a
sampler's law a row of their product. So a few-step student and its many-step teacher are compared without a sample:

    distance_to_teacher(student, teacher, process, length, num_steps=1, teacher_steps=64, latents=latents)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.process import Process
from di4c_ext.process.rows import whole
from di4c_ext.sampler import times

MOST_SEQUENCES = 4096  # whose matrix of one step takes 128 MiB


def sequences(num_states: int, length: int) -> Tensor:
    """All sequences (N^D, D) int64, the last position running fastest."""
    if num_states**length > MOST_SEQUENCES:
        raise ValueError(
            f"sequences: {num_states} states at {length} positions are {num_states**length} sequences, more than the "
            f"{MOST_SEQUENCES} that can be written down; take fewer of either"
        )
    return torch.tensor(list(itertools.product(range(num_states), repeat=length))).view(-1, length)


def index(x: Tensor, num_states: int) -> Tensor:
    """The place of x (..., D) among `sequences(num_states, D)`."""
    place = num_states ** torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    return (x * place).sum(-1)


def product_law(p: Tensor) -> Tensor:
    """The joint law (..., S^D) of independent positions with marginals p (..., D, S)."""
    law = p.new_ones((*p.shape[:-2], 1))
    for marginal in p.unbind(-2):
        law = (law[..., :, None] * marginal[..., None, :]).flatten(-2)
    return law


def total_variation(p: Tensor, q: Tensor) -> float:
    """sum |p - q| / 2 of two laws."""
    return 0.5 * (p - q).abs().sum().item()


def num_all_states(process: Process) -> int:
    """N: the clean states and, where it is one more, the mask."""
    mask_id = getattr(process, "mask_id", None)
    return process.num_states if mask_id is None else max(process.num_states, int(mask_id) + 1)


def transition(
    process: Any, denoiser: Denoiser, length: int, t: float, s: float, *, latents: Tensor | None = None
) -> Tensor:
    """p(x_s | x_t) of a denoiser's step, row by row over all sequences, (N^D, N^D).

    process: one with a `posterior`. latents: None for a product; for a mixture its (M, C) equally likely latents, all
    of them where these are finitely many, else draws that stand for them.
    """
    states = sequences(num_all_states(process), length)
    time = torch.full((len(states),), t)
    with inference(denoiser, states.device):
        if latents is None:
            return product_law(process.posterior(states, whole(denoiser(states, time)).double(), t, s))
        total: Any = 0.0
        for latent in latents:
            told = latent.expand(len(states), -1)
            total = total + product_law(
                process.posterior(states, whole(denoiser(states, time, latents=told)).double(), t, s)
            )
        return total / len(latents)


def sampler_law(
    process: Any,
    denoiser: Denoiser,
    length: int,
    grid: Tensor | Sequence[float],
    *,
    latents: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """The law (N^D,) of x at the last of the times `grid` (`sampler.times`), by a denoiser's steps down them.

    latents: as for `transition`; a fresh one at every step. start: the law (N^D,) at grid[0]; default all masks, which
    a process without any has to be given.
    """
    if start is None:
        mask_id: Any = getattr(process, "mask_id", None)
        if mask_id is None:
            raise ValueError(
                f"sampler_law: {process!r} has no masks to start from; give start, a law over all sequences"
            )
        states = num_all_states(process)
        start = torch.zeros(states**length, dtype=torch.float64)
        start[index(torch.full((length,), mask_id), states)] = 1
    law = start
    for t, s in pairwise(float(time) for time in grid):
        law = law @ transition(process, denoiser, length, t, s, latents=latents)
    return law


def of_clean(process: Process, law: Tensor, length: int) -> Tensor:
    """The part (S^D,) of a law over all sequences that lies on clean ones."""
    return law[index(sequences(process.num_states, length), num_all_states(process))]


def distance_to_teacher(
    student: Denoiser,
    teacher: Denoiser,
    process: Any,
    length: int,
    *,
    num_steps: int,
    teacher_steps: int,
    latents: Tensor | None = None,
    teacher_latents: Tensor | None = None,
    start: Tensor | None = None,
) -> float:
    """Total variation between the student's law in num_steps even steps and its teacher's in teacher_steps, in [0, 1].

    Arguments as for `sampler_law`; teacher_latents for a teacher that is a mixture.
    """
    laws = [
        sampler_law(process, denoiser, length, times(number), latents=own, start=start)
        for denoiser, number, own in ((student, num_steps, latents), (teacher, teacher_steps, teacher_latents))
    ]
    return total_variation(*laws)


class ExactTeacher(nn.Module):
    """The best product denoiser there is of a known law (S^D,): the true p(x_0^d | x_t) under masks, whose id is S.

    denoiser(x_t (..., D), t) -> logits (..., D, S), float64; -inf for what cannot be, 0 at an x_t that cannot.
    """

    table: Tensor

    def __init__(self, law: Tensor, num_states: int, length: int) -> None:
        super().__init__()
        clean, noised = sequences(num_states, length), sequences(num_states + 1, length)
        if law.shape != (len(clean),):
            raise ValueError(
                f"ExactTeacher: law must be (S^D,) = ({len(clean)},), a probability to each of the sequences, "
                f"got {tuple(law.shape)}"
            )
        self.num_states = num_states
        fits = ((noised[:, None] == clean) | (noised[:, None] == num_states)).all(-1)
        joint = (law * fits) @ nn.functional.one_hot(clean, num_states).to(law).flatten(1)  # (N^D, D S)
        possible = (law * fits).sum(1) > 0
        logits = torch.where(possible[:, None], joint, 1.0).log().unflatten(1, (length, num_states))
        self.register_buffer("table", logits)  # (N^D, D, S)

    def forward(self, x_t: Tensor, t: Tensor | None = None) -> Tensor:
        return self.table[index(x_t, self.num_states + 1)]


class TableStudent(nn.Module):
    """A mixture over M latents, each with a free table: logits (M, (S+1)^D, D, S). Latent m is the number m, (..., 1).

    denoiser(x_t, t, latents) -> logits (B, [L,] D, S).
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.num_states = table.shape[-1]

    def forward(self, x_t: Tensor, t: Tensor | None, latents: Tensor) -> Tensor:
        which = latents[..., 0].long()  # (B,) or (B, L)
        place = index(x_t, self.num_states + 1)
        if which.ndim > place.ndim:
            place = place[:, None].expand_as(which)
        return self.table[which, place]

    def latents(self) -> Tensor:
        """All of them, (M, 1)."""
        return torch.arange(len(self.table), dtype=torch.float32)[:, None]
