"""State spaces small enough to write every law down: helpers of the tests that check by enumeration."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from di4c_ext import random
from di4c_ext.denoiser import Denoiser
from di4c_ext.process import AbsorbingProcess


def sequences(num_states: int, length: int) -> Tensor:
    """All sequences (S^D, D), in the order of `index`."""
    return torch.tensor(list(itertools.product(range(num_states), repeat=length)))


def index(x: Tensor, num_states: int) -> Tensor:
    """The place of x (..., D) among `sequences(num_states, D)`."""
    place = num_states ** torch.arange(x.shape[-1] - 1, -1, -1)
    return (x * place).sum(-1)


def counts(x: Tensor, num_states: int) -> Tensor:
    return torch.bincount(index(x, num_states).flatten(), minlength=num_states ** x.shape[-1])


def chi_square_z(count: Tensor, law: Tensor) -> float:
    """How far counts lie from a law, as a standard normal deviate (Wilson and Hilferty). Infinite if a state of
    probability 0 occurs."""
    if bool((count[law == 0] > 0).any()):
        return math.inf
    count, expected = count[law > 0].double(), law[law > 0].double() * count.sum()
    assert bool((expected > 5).all()), "too few draws for a chi-square"
    freedom = len(expected) - 1
    if freedom == 0:
        return 0.0
    statistic = ((count - expected) ** 2 / expected).sum().item()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * (p - q).abs().sum().item()


def product_law(p: Tensor) -> Tensor:
    """The joint law (S^D,) of independent positions with marginals p (D, S)."""
    law = torch.ones(1, dtype=p.dtype)
    for row in p:
        law = (law[:, None] * row).flatten()
    return law


class ExactTeacher:
    """The product denoiser of a known data law (S^D,): the true marginals p(x_0^d | x_t). Mask id S, D = length."""

    def __init__(self, law: Tensor, num_states: int, length: int) -> None:
        self.law, self.num_states, self.length = law, num_states, length
        self.calls: list[tuple[int, ...]] = []
        logits = []
        for x_t in sequences(num_states + 1, length):
            fits = ((x_t == sequences(num_states, length)) | (x_t == num_states)).all(1)
            posterior = law * fits
            marginals = nn.functional.one_hot(sequences(num_states, length), num_states) * posterior[:, None, None]
            total = posterior.sum()
            # x_t that the data cannot give never comes up; any logits serve
            logits.append((marginals.sum(0) / total).log() if total > 0 else torch.zeros(length, num_states))
        self.table = torch.stack(logits)  # ((S+1)^D, D, S)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls.append(tuple(x_t.shape))
        return self.table[index(x_t, self.num_states + 1)]


class TableStudent(nn.Module):
    """A mixture over a finite set of latents, each with a free table: table (latents, (S+1)^D, D, S) of logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.num_states = table.shape[-1]

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        which = latents[..., 0].long()  # (B,) or (B, L)
        place = index(x_t, self.num_states + 1)
        if which.ndim > place.ndim:
            place = place[:, None].expand_as(which)
        return self.table[which, place]


def finite_latents(size: int) -> Callable[[Tensor, int], Tensor]:
    """Latents (B, L, 1) uniform over 0..size-1."""
    return lambda keys, num_latents: (random.uniform(keys, num_latents) * size).floor().float()[..., None]


def transition(process: AbsorbingProcess, denoiser: Denoiser, length: int, t: float, s: float) -> Tensor:
    """p(x_s | x_t) of a product denoiser's step, row by row over all noised states: ((S+1)^D, (S+1)^D)."""
    states = sequences(process.num_states + 1, length)
    posterior = process.posterior(states, denoiser(states, torch.full((len(states),), t)).double(), t, s)
    return torch.stack([product_law(p) for p in posterior])
