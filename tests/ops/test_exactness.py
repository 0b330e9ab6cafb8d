"""Draws follow their law exactly, to the tails, on every backend; and nothing that must be independent is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from laws import chi_square
from scipy.stats import binomtest, kstest
from torch import Tensor

from di4c_ext import ops, random

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A row in one piece, chunks of 1024 with every kind of rest, and as many as there may be.
STATES = (2, 3, 31, 256, 1023, 1024, 1025, 4099, 50257, 50258, 126464)
SCALES = (2.0, 0.5, 6.0)  # of the logits, from nearly uniform to a few classes that have it all
LEVEL = 0.01  # how often a right sampler may fail one table of tests; each test in it gets its share (Bonferroni)


def _row(states: int, scale: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(states)
    return (torch.randn(1, 1, states, generator=generator) * scale).to(dtype)


def _counts(tokens: Tensor, states: int) -> Tensor:
    counts = torch.bincount(tokens.flatten().cpu(), minlength=states)
    assert len(counts) == states, "a class beyond the last was drawn"
    return counts


@pytest.mark.parametrize("states", STATES)
def test_law(implementation, states):
    n = 200_000 if implementation.is_native else 50_000
    keys = random.keys(5, 1, implementation.device)
    for dtype, scale in zip(DTYPES, SCALES, strict=True):
        x = _row(states, scale, dtype)
        tokens = ops.sample_categorical(x.to(implementation.device), keys, draws=n)
        p = chi_square(_counts(tokens, states), torch.softmax(x.double().flatten(), 0))
        assert p > LEVEL / (len(STATES) * len(DTYPES)), (dtype, p)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("states", [40, 3000])
def test_law_at_a_temperature(implementation, states, temperature):
    x = _row(states)
    tokens = ops.sample_categorical(
        x.to(implementation.device), random.keys(8, 1, implementation.device), draws=50_000, temperature=temperature
    )
    assert chi_square(_counts(tokens, states), torch.softmax(x.double().flatten() / temperature, 0)) > LEVEL / 4


def test_law_over_keys_and_positions(backend):
    """One draw for each of many keys and positions, instead of many draws of one row."""
    x = _row(7)
    keys = random.keys(6, 4000, backend.device)
    tokens = ops.sample_categorical(x.to(backend.device).expand(4000, 10, 7), keys)
    assert chi_square(_counts(tokens, 7), torch.softmax(x.double().flatten(), 0)) > LEVEL


# One head and 2^18 - 1 classes at a gap of 20.5 below it: 3.3e-4 of the mass together, 1.3e-9 each.
GAP, HEAD, RARE_STATES, RARE_DRAWS = 20.5, 12345, 1 << 18, 100_000
TAIL = (RARE_STATES - 1) * math.exp(-GAP)
RARE = TAIL / (1 + TAIL)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rare_tail(implementation, dtype):
    """About 33 hits in 100,000 draws, wherever in the row the head leaves room."""
    x = torch.full((1, 1, RARE_STATES), -GAP, dtype=dtype)  # 20.5 is a number of every dtype
    x[..., HEAD] = 0.0
    keys = random.keys(1, 1, implementation.device)
    tokens = ops.sample_categorical(x.to(implementation.device), keys, draws=RARE_DRAWS).flatten().cpu()
    hits = tokens[tokens != HEAD]
    assert binomtest(len(hits), RARE_DRAWS, RARE).pvalue > 1e-4, len(hits)
    assert kstest(hits.double() / RARE_STATES, "uniform").pvalue > 1e-4


def test_rare_tail_within_a_chunk(implementation):
    """The same gap among the classes that share a maximum: 1023 of them, some 13 hits in 10^7 draws."""
    x = torch.full((1, 10, 1024), -GAP)
    x[..., 100] = 0.0
    n = 1_000_000 if implementation.is_native else 10_000
    tokens = ops.sample_categorical(
        x.to(implementation.device), random.keys(2, 1, implementation.device), draws=n
    ).flatten()
    tail = 1023 * math.exp(-GAP)
    assert binomtest(int((tokens != 100).sum()), tokens.numel(), tail / (1 + tail)).pvalue > 1e-4


def test_a_float32_race_loses_the_rare_tail():
    """What the rare tail is there to find. A race takes the largest of p / E with E = -log u, and a float32 u lies on
    multiples of 2^-24: even if in every draw some class of the tail had the smallest E there is, it would not win."""
    u = torch.rand(RARE_DRAWS, generator=torch.Generator().manual_seed(0)).clamp(min=2.0**-24)
    smallest = -torch.log(torch.tensor(1 - 2.0**-24))
    head, tail = 1 / -torch.log(u), math.exp(-GAP) / smallest
    hits = int((tail > head).sum())
    assert hits == 0 and tail < 1 / (24 * math.log(2))  # the head's slowest time of all is faster
    assert binomtest(hits, RARE_DRAWS, RARE).pvalue < 1e-12


def test_no_class_of_probability_zero_in_ten_million_draws(implementation):
    """-inf, and so far down that no float holds it: single classes, a whole chunk, and both beside what is rare."""
    row = torch.full((3000,), -200.0)
    row[:1024:2], row[1:1024:4], row[1024:2048] = -math.inf, -90.0, -math.inf
    row[3:1024:8], row[7:1024:8] = 0.0, -9.0
    allowed = row > -80
    keys = random.keys(0, 1, implementation.device)
    n = 340_000 if implementation.is_native else 20_000
    for dtype in DTYPES:
        x = row.to(implementation.device, dtype).expand(1, 10, -1)
        counts = _counts(ops.sample_categorical(x, keys, draws=n), 3000)
        assert (counts[~allowed] == 0).all()
        law = torch.softmax(row.to(dtype).double(), 0) * allowed
        assert chi_square(counts, law) > LEVEL / len(DTYPES)


Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PAIRS: dict[str, Pair] = {
    "positions": lambda x, keys: (ops.sample_categorical(x, keys)[:, :-1], ops.sample_categorical(x, keys)[:, 1:]),
    "keys": lambda x, keys: (ops.sample_categorical(x, keys)[:-1], ops.sample_categorical(x, keys)[1:]),
    "draws": lambda x, keys: tuple(ops.sample_categorical(x, keys, draws=2).unbind(1)),
    "streams": lambda x, keys: (ops.sample_categorical(x, keys), ops.sample_categorical(x, keys, stream=1)),
    "steps": lambda x, keys: (
        ops.sample_categorical(x, random.fold_in(keys, 0)),
        ops.sample_categorical(x, random.fold_in(keys, 1)),
    ),
    "a key and one folded from it": lambda x, keys: (
        ops.sample_categorical(x, keys),
        ops.sample_categorical(x, random.fold_in(keys, 0)),
    ),
    "seeds": lambda x, keys: (
        ops.sample_categorical(x, keys),
        ops.sample_categorical(x, random.keys(8, len(keys), keys.device)),
    ),
    "positions 2^32 apart": lambda x, keys: (
        ops.sample_categorical(x, keys),
        ops.sample_categorical(x, keys, first_position=1 << 32),
    ),
    "a coin and the token it lets in": lambda x, keys: (
        (random.uniform(keys, x.shape[1]) * 5).long().clamp(max=4),
        ops.sample_categorical(x, keys),
    ),
}


@pytest.mark.parametrize("apart", PAIRS)
def test_independence(backend, apart):
    """Tokens that differ in one thing alone: their pairs follow the product of their laws."""
    # Five classes on both sides of a chunk's end, so that both words of a draw count (too slow for the reference).
    classes = torch.tensor([3, 700, 1024, 1025, 1026]) if backend.is_native else torch.arange(5)
    x = torch.full((1, 1, int(classes[-1]) + 1), -math.inf)
    x[..., classes] = _row(5)
    pair = PAIRS[apart](x.to(backend.device).expand(4000, 8, -1), random.keys(7, 4000, backend.device))
    first, second = (torch.searchsorted(classes, v.cpu().contiguous()) if v.max() > 4 else v.cpu() for v in pair)
    law = torch.softmax(_row(5).double().flatten(), 0)
    laws = torch.full((5,), 0.2).double() if "coin" in apart else law, law
    assert chi_square(_counts(first * 5 + second, 25), torch.outer(*laws).flatten()) > LEVEL / len(PAIRS)
