"""reveal on the CPU's emulation of a GPU: the positions of the plain-torch definition, to the last one."""

from __future__ import annotations

import math

import emulate
import pytest
import torch
from torch import Tensor

from di4c_ext.ops import reference

MASK, STREAM = 9, 7


def case(batch: int, draws: int, length: int, steps: float = 0.0, bad: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, tokens, log_prob; log-probabilities rounded to multiples of `steps`, a share `bad` of tokens and of NaN."""
    g = torch.Generator().manual_seed(length)
    x_t = torch.randint(0, MASK, (batch, length), generator=g)
    x_t[torch.rand(batch, length, generator=g) < 0.7] = MASK
    tokens = torch.randint(0, MASK, (batch, draws, length), generator=g)
    log_prob = -2 * torch.rand(tokens.shape, generator=g)
    log_prob = (log_prob / steps).round() * steps if steps else log_prob
    tokens[torch.rand(tokens.shape, generator=g) < bad] = -1
    log_prob[torch.rand(tokens.shape, generator=g) < bad] = math.nan
    return x_t, tokens, log_prob


def assert_same(x_t: Tensor, tokens: Tensor, log_prob: Tensor, count: Tensor, noise: Tensor) -> None:
    batch, draws, length = tokens.shape
    keys = torch.arange(batch, dtype=torch.int64) * 0x9E3779B97F4A7C1 - (1 << 62)
    inputs = {"x_t": x_t, "tokens": tokens, "log_prob": log_prob, "count": count, "noise": noise, "keys": keys}
    sizes = {"mask_id": MASK, "B": batch, "D": length, "draws": draws, "stream": STREAM}
    got = emulate.run("reveal", {**inputs, **sizes}, {"x_s": (tokens.shape, torch.int64)})["x_s"]
    wanted = reference.reveal(x_t, tokens, log_prob, count, noise, keys, MASK, STREAM)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("length", [1, 5, 31, 32, 33, 64, 257, 300])
def test_positions_are_the_definitions(length: int) -> None:
    """With noise and without, few confidences and many, bad tokens; none, some, all revealed."""
    count = torch.tensor([0, length // 3, 2 * length, -1])
    for draws, steps, bad in ((1, 0.0, 0.0), (2, 0.5, 0.1)):
        for noise in (torch.zeros(4), torch.tensor([4.5, 1.0, 0.3, -0.5])):
            assert_same(*case(4, draws, length, steps, bad), count, noise)


def test_all_confidences_equal() -> None:
    """Every digit is looked at: positions alone decide, the lower first."""
    x_t, tokens = torch.full((3, 600), MASK), torch.zeros(3, 1, 600, dtype=torch.int64)
    assert_same(x_t, tokens, torch.zeros(3, 1, 600), torch.tensor([1, 257, 599]), torch.zeros(3))


def test_extreme_confidences() -> None:
    """Infinities and zeros of either sign are ordered as numbers are."""
    values = torch.tensor([0.0, -0.0, -math.inf, math.inf, -1e-45, 1e-45, -3e38, 3e38, -0.0, 0.0])
    x_t, tokens = torch.full((10, 10), MASK), torch.arange(9).repeat(12)[:100].view(10, 1, 10)
    assert_same(x_t, tokens, values.expand(10, 1, 10).contiguous(), torch.arange(10), torch.zeros(10))


def test_more_sequences_than_the_grid_has_ctas() -> None:
    assert_same(*case(5, 4, 40), torch.tensor([3, 0, 9, 100, 1]), torch.ones(5))


@pytest.mark.parametrize(("batch", "draws", "length"), [(0, 1, 3), (2, 0, 3), (2, 1, 0)])
def test_nothing_to_reveal(batch: int, draws: int, length: int) -> None:
    assert_same(*case(batch, draws, length), torch.ones(batch, dtype=torch.int64), torch.ones(batch))


def test_a_plan_says_what_would_be_launched() -> None:
    arrays = ["x_t", "tokens", "log_prob", "count", "noise", "keys", "x_s"]
    for length, threads in ((16, 32), (196, 224), (256, 256), (4096, 256)):
        numbers = {"B": 2, "D": length, "draws": 32, "mask_id": 1024, "stream": 0}
        (launch,) = emulate.plan("reveal", numbers, arrays, capability=80)
        assert (launch.name, launch.grid, launch.block) == ("reveal", (64, 1, 1), (threads, 1, 1))
        assert launch.bytes == 2 * length * 8 + 64 * length * 20
