"""Nucleus truncation against its definition in fractions, its ties, and draws that never leave it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops.truncation import nucleus


def kept(row: list[float], top_p: float, temperature: float) -> list[int]:
    """The shortest beginning of the ordered classes that has top_p, its sums without rounding."""
    order = sorted(range(len(row)), key=lambda k: (-row[k], k))
    p = torch.tensor([row[k] for k in order], dtype=torch.float64).div(temperature).softmax(0)
    total, inside = Fraction(0), []
    for k, mass in zip(order, p.tolist(), strict=True):
        if inside and total >= Fraction(top_p):
            break
        inside.append(k)
        total += Fraction(mass)
    return sorted(inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_definition(dtype: torch.dtype, temperature: float) -> None:
    rows = (3 * torch.randn(40, 37, generator=torch.Generator().manual_seed(0))).to(dtype)
    rows[::3] = (rows[::3] * 2).round() / 2  # classes alike
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        found = nucleus(rows.view(8, 5, 37), top_p, temperature=temperature)
        assert found.dtype == dtype and found.shape == (8, 5, 37)
        for row, out in zip(rows, found.flatten(0, 1), strict=True):
            inside = out > -math.inf
            assert inside.nonzero()[:, 0].tolist() == kept(row.tolist(), top_p, temperature)
            assert torch.equal(out[inside], row[inside])


def test_ties_are_kept_one_by_one() -> None:
    """Of four equal classes half the probability is two, those that come first; a class more for any more."""
    rows = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]]).log()
    assert (nucleus(rows, 0.5) > -math.inf).tolist() == [[False, True, True, False, False, False]]
    assert (nucleus(rows, 0.5000001) > -math.inf).tolist() == [[False, True, True, False, True, False]]
    assert (nucleus(torch.zeros(1, 8), 0.25) > -math.inf).tolist() == [[True] * 2 + [False] * 6]


def test_rows_that_are_no_distribution_stay_as_they_are() -> None:
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[nan, 1.0, 2.0], [-inf, -inf, -inf], [0.0, inf, 1.0], [0.0, 9.0, 1.0]])
    found = nucleus(rows, 0.5)
    assert torch.equal(found[:3].nan_to_num(nan=7.0), rows[:3].nan_to_num(nan=7.0))
    assert found[3].tolist() == [-inf, 9.0, -inf]
    same = nucleus(rows[3:], 1.0)
    assert torch.equal(same, rows[3:]) and same.data_ptr() != rows[3:].data_ptr()
    assert torch.equal(nucleus(rows[3:], 0.5, temperature=0.0), rows[3:])
    assert nucleus(rows[:0], 0.5).shape == (0, 3)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    whole = nucleus(rows, 0.7)
    monkeypatch.setattr("di4c_ext.ops.truncation._PIECE_BYTES", 1)
    assert torch.equal(nucleus(rows, 0.7), whole)


def test_draws_are_those_from_the_nucleus(backend) -> None:
    B, D, S, top_p = 3, 11, 29, 0.6
    g = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(B, D, S, generator=g)).to(backend.device)
    keys = random.keys(0, B, backend.device)
    options = {"temperature": 1.3, "draws": 2, "stream": 1}
    cut = nucleus(logits, top_p, temperature=1.3)
    expected = ops.sample_categorical(cut, keys, return_log_prob=True, **options)
    found = ops.sample_categorical(logits, keys, top_p=top_p, return_log_prob=True, **options)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], ops.sample_categorical(logits, keys, **options))

    # A mask among the classes is never drawn, so it takes no part of the nucleus either.
    mask_id = 4
    logits[..., mask_id] = 50.0
    x_t = torch.where(torch.rand(B, D, generator=g) < 0.5, mask_id, 7).to(backend.device)
    without = logits.clone()
    without[..., mask_id] = -math.inf
    cut = nucleus(without, top_p, temperature=1.3)
    settings = {"unmask_prob": 0.7, "mask_id": mask_id, **options}
    expected = ops.absorbing_step(cut, x_t, keys, **settings)
    assert torch.equal(ops.absorbing_step(logits, x_t, keys, top_p=top_p, **settings), expected)


def test_a_logistic_head() -> None:
    head = ops.Logistic(torch.linspace(-0.5, 0.5, 6).view(2, 3), torch.zeros(2, 3), 16)
    keys = random.keys(1, 2)
    found = ops.sample_categorical(head, keys, top_p=0.3)
    assert torch.equal(found, ops.sample_categorical(nucleus(head.logits(), 0.3), keys))


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_refusals(value: float) -> None:
    x, keys = torch.zeros(1, 2, 3), random.keys(0, 1)

    def draw(top_p: float) -> Tensor:
        found = ops.sample_categorical(x, keys, top_p=top_p)
        assert isinstance(found, Tensor)
        return found

    with pytest.raises(ValueError, match=r"sample_categorical: top_p must lie in \(0, 1\]"):
        draw(value)
    with pytest.raises(ValueError, match=r"nucleus: top_p must lie in \(0, 1\]"):
        nucleus(x, value)
    with pytest.raises(ValueError, match=r"absorbing_step: top_p must lie in \(0, 1\]"):
        ops.absorbing_step(x, torch.zeros(1, 2).long(), keys, unmask_prob=0.5, mask_id=3, top_p=value)
    with pytest.raises(TypeError, match="top_p must be a number"):
        draw(True)
