"""sample_product on the CPU's emulation of a GPU: the draws of the plain-torch definition, to the last one."""

from __future__ import annotations

import emulate
import pytest
import torch
from torch import Tensor

from di4c_ext.ops import reference

STREAM = 7


def tables(states: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """left, right and base (N, S, S): entries of many magnitudes, a third of them 0."""
    generator = torch.Generator().manual_seed(states)
    x = torch.rand(3, number, states, states, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** -torch.randint(0, 20, x.shape, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.33] = 0.0
    return x[0], x[1], x[2] * 1e-3


def rows(states: int, *shape: int) -> Tensor:
    """Indices, some of which are no state."""
    return torch.randint(-1, states + 1, shape, generator=torch.Generator().manual_seed(sum(shape)))


def keys_for(batch: int) -> Tensor:
    return torch.arange(batch, dtype=torch.int64) * 0x9E3779B97F4A7C1 - (1 << 62)


def sample(left: Tensor, right: Tensor, base: Tensor | None, i: Tensor, j: Tensor) -> Tensor:
    batch, draws, length = j.shape
    sizes = {"B": batch, "D": length, "S": left.shape[-1], "N": left.shape[0], "draws": draws}
    inputs = {"left": left, "right": right, "base": base, "i": i, "j": j, "keys": keys_for(batch), "stream": STREAM}
    return emulate.run("sample_product", {**inputs, **sizes}, {"tokens": (j.shape, torch.int64)})["tokens"]


def assert_same(left: Tensor, right: Tensor, base: Tensor | None, i: Tensor, j: Tensor) -> None:
    wanted = reference.sample_product(left, right, base, i, j, keys_for(j.shape[0]), STREAM)
    assert sample(left, right, base, i, j).tolist() == wanted.tolist()


@pytest.mark.parametrize("states", [1, 2, 17, 31, 32, 33, 64, 100, 256, 257, 500])
def test_draws_are_the_definitions(states: int) -> None:
    for number in (1, 2):
        left, right, base = tables(states, number)
        i, j = rows(states, 2, 5), rows(states, 2, 3, 5)
        assert_same(left, right, None, i, j)
        assert_same(left, right, base, i, j)


def test_more_rows_than_the_grid_has_warps() -> None:
    left, right, base = tables(40, 3)
    assert_same(left, right, base, rows(40, 3, 70), rows(40, 3, 2, 70))


def test_rows_without_a_law() -> None:
    """Negative, infinite and NaN weights and zeros alone give -1 and touch no other."""
    left, right, _ = tables(45, 1)
    right = right + 1e-3
    for row, value in enumerate((-1e-300, torch.inf, torch.nan, -torch.inf)):
        left[0, row, 44 - row] = value
    left[0, 4] = 0.0
    left[0, 5] = -0.0
    left[0, 6] = 5e-324
    i = torch.arange(12).expand(2, 12)
    j = torch.randint(45, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    assert_same(left, right, None, i, j)
    tokens = sample(left, right, None, i, j)
    assert (tokens[..., :6] == -1).all() and (tokens[..., 7:] >= 0).all()


@pytest.mark.parametrize(("batch", "draws", "length"), [(0, 1, 3), (2, 0, 3), (2, 1, 0)])
def test_nothing_to_draw(batch: int, draws: int, length: int) -> None:
    left, right, _ = tables(5, 1)
    shape = (batch, draws, length)
    i, j = torch.zeros(batch, length, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    assert sample(left, right, None, i, j).shape == shape


def test_a_plan_says_what_would_be_launched() -> None:
    numbers = {"B": 8, "D": 3072, "S": 256, "N": 1, "draws": 16, "stream": 0}
    arrays = ["left", "right", "i", "j", "keys", "tokens"]
    (launch,) = emulate.plan("sample_product", numbers, arrays, capability=80)
    rows = 8 * 16 * 3072
    assert (launch.name, launch.grid, launch.block) == ("sample_product", (rows // 8, 1, 1), (32, 8, 1))
    assert launch.bytes == 2 * 256 * 256 * 8 + 8 * 3072 * 8 + rows * 16 and launch.shared == 0
