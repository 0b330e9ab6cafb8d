"""A judge that every data set has: an n-gram model of its own training tokens, with Witten and Bell's interpolation.

    p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h))

c counts, T(h) is how many different tokens followed h, h' is h without its first token, and below the shortest context
every token is alike. It reads a thousand samples in the time in which a neural judge reads one, needs no download, and
sees no further than a few tokens: spelling and wording, not sense.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ORDER = 4


class _Table(NamedTuple):
    """The n-grams of one order, each as one integer, ascending, and their contexts."""

    grams: Tensor
    counts: Tensor
    contexts: Tensor
    totals: Tensor
    types: Tensor


class NGram:
    """The model of tokens (N, D), rows that continue nowhere; order: tokens of an n-gram, at most."""

    def __init__(self, tokens: Tensor, num_states: int, order: int = ORDER) -> None:
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(f"NGram: tokens have shape {tuple(tokens.shape)}; give (N, D) with N and D at least 1")
        if order < 1:
            raise ValueError(f"NGram: order must be at least 1, got {order}")
        self.num_states = num_states
        bits = max(num_states - 1, 1).bit_length()
        self.order = min(order, tokens.shape[1], 63 // bits)  # more does not fit an integer
        self._bits = bits
        x = self._checked(tokens)
        self._tables = [self._table(self._packed(x, n)) for n in range(1, self.order + 1)]

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p of each token given those before it in its row, float64 (N, D)."""
        x = self._checked(tokens)
        p = torch.full(x.shape, 1 / self.num_states, dtype=torch.float64)
        for n, table in enumerate(self._tables[: x.shape[1]], 1):
            packed = self._packed(x, n)
            seen, total = _looked_up(table.contexts, packed >> self._bits, table.totals)
            types = _looked_up(table.contexts, packed >> self._bits, table.types)[1]
            count = _looked_up(table.grams, packed, table.counts)[1]
            lower = p[:, n - 1 :]
            mixed = (count + types * lower) / (total + types).clamp(min=1)
            p = torch.cat([p[:, : n - 1], torch.where(seen, mixed, lower)], 1)
        return p.log()

    def perplexity(self, tokens: Tensor) -> float:
        """exp of the mean over all tokens of rows (N, D)."""
        return float((-self.log_prob(tokens).mean()).exp())

    def _checked(self, tokens: Tensor) -> Tensor:
        x = tokens.long().cpu()
        if x.ndim != 2 or int(x.min()) < 0 or int(x.max()) >= self.num_states:
            raise ValueError(f"NGram: tokens (N, D) in 0..{self.num_states - 1} are wanted, got {tuple(x.shape)}")
        return x

    def _packed(self, x: Tensor, n: int) -> Tensor:
        """(N, D) -> (N, D - n + 1): the n tokens from each place on, as one integer."""
        width = x.shape[1] - n + 1
        packed = x[:, :width]
        for i in range(1, n):
            packed = (packed << self._bits) | x[:, i : i + width]
        return packed

    def _table(self, packed: Tensor) -> _Table:
        grams, counts = packed.flatten().unique(return_counts=True)
        contexts, place, types = (grams >> self._bits).unique(return_inverse=True, return_counts=True)
        totals = torch.zeros_like(contexts).index_add_(0, place, counts)
        return _Table(grams, counts.double(), contexts, totals.double(), types.double())


def _looked_up(known: Tensor, wanted: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each wanted number is among the ascending known ones, and the value there, else 0."""
    place = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
    seen = known[place] == wanted
    return seen, torch.where(seen, values[place], 0.0)
