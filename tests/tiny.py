"""State spaces small enough to write every law down (`metrics.exact`), and what tests of draws ask on top."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics import exact
from di4c_ext.metrics.exact import TableStudent, index, product_law, sequences, total_variation, transition

__all__ = [
    "ExactTeacher",
    "TableStudent",
    "chi_square_z",
    "counts",
    "finite_latents",
    "index",
    "product_law",
    "sequences",
    "total_variation",
    "transition",
]


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


class ExactTeacher(exact.ExactTeacher):
    """Remembers the shapes it was called with."""

    def __init__(self, law: Tensor, num_states: int, length: int) -> None:
        super().__init__(law, num_states, length)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x_t: Tensor, t: Tensor | None = None) -> Tensor:
        self.calls.append(tuple(x_t.shape))
        return super().forward(x_t, t)


def finite_latents(size: int) -> Callable[[Tensor, int], Tensor]:
    """Latents (B, L, 1) uniform over 0..size-1."""
    return lambda keys, num_latents: (random.uniform(keys, num_latents) * size).floor().float()[..., None]
