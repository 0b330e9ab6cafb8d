"""A row without a distribution gives its documented value and touches no other: NaN, +inf, -inf throughout."""

from __future__ import annotations

import math
from typing import Any

import calls
import pytest
import torch
from cases import DTYPES, same_bits
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Hidden, Logistic

STATES = (37, 2100)  # a row in one piece with a rest, and one of three chunks
SAMPLE, POSITION = 1, 2  # where the bad row stands: in the second of three samples, at the third of four positions
SIZES = dict(batch=3, length=4)

KINDS = ("a NaN", "+inf", "-inf throughout", "a NaN and +inf")


def _spoil(row: Tensor, kind: str) -> None:
    """Makes rows (..., S) bad in place, by a class in the last vector."""
    if kind == "-inf throughout":
        row[...] = -math.inf
    if "NaN" in kind:
        row[..., -2] = math.nan
    if "+inf" in kind:
        row[..., row.shape[-1] // 3] = math.inf


def _spoiled(value: Any, kind: str) -> Any:
    """Logits in any form with a bad row at SAMPLE, POSITION, of the first component where there are several.

    A parameter or a hidden state that is NaN makes its row bad; what an infinite one gives is not said.
    """
    if isinstance(value, Logistic):
        field = "log_scale" if "inf" in kind else "mean"
        parameter = getattr(value, field).clone()
        _row(parameter[..., None])[...] = math.nan
        return value._replace(**{field: parameter})
    if isinstance(value, Hidden):
        return value._replace(states=_spoiled(value.states, kind))
    value = value.clone()
    _spoil(_row(value), kind)
    return value


def _row(x: Tensor) -> Tensor:
    """The row of x (B, D, n) or of the first component of x (B, L, D, n)."""
    return x[SAMPLE, POSITION] if x.dim() == 3 else x[SAMPLE, 0, POSITION]


def _others(x: Tensor) -> Tensor:
    return torch.cat([x[:SAMPLE], x[SAMPLE + 1 :]])


def _of_sample(x: Tensor, batch: int) -> Tensor:
    """A gradient of logits by sample; that of a head, which all samples share, has none."""
    return x if x.dim() >= 3 else x.new_zeros(batch, 0)


def _kinds(name: str) -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if "NaN" in kind or not name.endswith(calls.FORMS[1:]))


SPOILS = [
    (name, argument, kind)
    for name in calls.SUMS
    for argument in ("logits", "target", "teacher")
    for kind in _kinds(name)
    if argument in calls.make(name).arguments
]
UNTOUCHED = {  # outputs of mixture_objective that do not hang on the argument, by place
    "logits": (),
    "teacher": (2, 3, 4, 5, 6, 7),
    "target": (0, 1, 3, 4, 5, 6, 7),
}


@pytest.mark.parametrize(("name", "argument", "kind"), SPOILS)
def test_bad_row_spoils_its_sample_only(implementation, name, argument, kind):
    """The sums of its sample that read it are NaN; every other value, and the gradient of every other sample, keeps its
    bits."""
    for states in STATES if implementation.is_native else STATES[:1]:
        for dtype in DTYPES:
            call = calls.make(name, states, dtype, **SIZES).to(implementation.device)
            values, grads = calls.run(call)
            spoiled, spoiled_grads = calls.run(call.changed(**{argument: _spoiled(call.arguments[argument], kind)}))
            for place, (bad, good) in enumerate(zip(spoiled, values, strict=True)):
                assert same_bits(_others(bad), _others(good)), (states, dtype, place)
                if call.op == "mixture_objective" and place in UNTOUCHED[argument]:
                    assert same_bits(bad, good), (states, dtype, place)
                elif call.op.startswith("masked") and argument == "logits":  # one value for each component
                    assert bad[SAMPLE, 0].isnan() and same_bits(bad[SAMPLE, 1:], good[SAMPLE, 1:]), (states, dtype)
                else:
                    assert bad[SAMPLE].isnan().all(), (states, dtype, place)
            for bad, good in zip(spoiled_grads, grads, strict=True):
                bad, good = _of_sample(bad, 3), _of_sample(good, 3)
                assert same_bits(_others(bad), _others(good)), (states, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*calls.DIVERGENCES, "masked_cross_entropy", "mixture_kl"])
def test_gradient_of_other_rows(implementation, name, kind):
    """Where positions do not hang together, neither do their gradients, within a sample either."""
    for states in STATES:
        for dtype in DTYPES:
            call = calls.make(name, states, dtype, **SIZES).to(implementation.device)
            (good,) = calls.run(call)[1]
            (bad,) = calls.run(call.changed(logits=_spoiled(call.arguments["logits"], kind)))[1]
            other = torch.ones(good.shape[:-1], dtype=torch.bool)
            other[SAMPLE, :, POSITION] = False
            assert same_bits(bad[other], good[other]), (states, dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("states", STATES)
def test_draws(implementation, states, temperature):
    """NaN and all -inf give -1 and NaN, +inf its first class and 0."""
    for dtype in DTYPES:
        good = torch.randn(2, 7, states, generator=torch.Generator().manual_seed(7)).to(implementation.device, dtype)
        bad = good.clone()
        for position, kind in enumerate(KINDS):
            _spoil(bad[0, position], kind)
        bad[0, 4, states - 3 :] = math.inf
        keys = random.keys(7, 2, implementation.device)
        options = dict(draws=3, temperature=temperature, return_log_prob=True)
        tokens, log_prob = ops.sample_categorical(bad, keys, **options)
        for position, token in ((0, -1), (1, states // 3), (2, -1), (3, -1), (4, states - 3)):
            assert (tokens[0, :, position] == token).all(), (dtype, KINDS[position])
            expected = log_prob[0, :, position].isnan() if token < 0 else log_prob[0, :, position] == 0
            assert expected.all(), (dtype, KINDS[position])
        _assert_same_draws((tokens, log_prob), ops.sample_categorical(good, keys, **options))


@pytest.mark.parametrize("states", STATES)
def test_absorbing_step(implementation, states):
    """The same where a row is to be drawn; a bad row that stays masked, or is clean, does not matter."""
    for dtype in DTYPES:
        good = torch.randn(2, 7, states, generator=torch.Generator().manual_seed(8)).to(implementation.device, dtype)
        bad = good.clone()
        for position, kind in enumerate(KINDS):
            _spoil(bad[0, position], kind)
        _spoil(bad[0, 4], "a NaN")
        keys = random.keys(8, 2, implementation.device)
        x_t = torch.full((2, 7), states, device=implementation.device)
        x_t[0, 4] = 3
        options = dict(unmask_prob=1.0, mask_id=states, draws=3, return_log_prob=True)
        x_s, log_prob = ops.absorbing_step(bad, x_t, keys, **options)
        assert (x_s[0, :, [0, 2, 3]] == -1).all() and log_prob[0, :, [0, 2, 3]].isnan().all()
        assert (x_s[0, :, 1] == states // 3).all() and (log_prob[0, :, 1] == 0).all()
        assert (x_s[0, :, 4] == 3).all() and (log_prob[0, :, 4] == 0).all()
        _assert_same_draws((x_s, log_prob), ops.absorbing_step(good, x_t, keys, **options))
        stays = ops.absorbing_step(bad, x_t, keys, **{**options, "unmask_prob": 0.0})
        assert torch.equal(stays[0], x_t[:, None].expand_as(stays[0])) and (stays[1] == 0).all()


def _assert_same_draws(bad: tuple[Tensor, Tensor], good: tuple[Tensor, Tensor]) -> None:
    """Of all rows but the first five of the first sample."""
    for a, b in zip(bad, good, strict=True):
        assert torch.equal(a[0, :, 5:], b[0, :, 5:]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("kind", ["a NaN", "a NaN and +inf"])
@pytest.mark.parametrize("form", ["_of_logistic", "_of_hidden"])
def test_draws_of_other_forms(implementation, form, kind):
    for dtype in DTYPES:
        call = calls.make("sample_categorical" + form, 37, dtype, **SIZES).to(implementation.device)
        (tokens, log_prob), _ = calls.run(call)
        (bad, bad_log_prob), _ = calls.run(call.changed(logits=_spoiled(call.arguments["logits"], kind)))
        where = torch.zeros_like(bad, dtype=torch.bool)
        where[SAMPLE, :, POSITION] = True
        assert (bad[where] == -1).all() and bad_log_prob[where].isnan().all()
        assert torch.equal(bad[~where], tokens[~where]) and torch.equal(bad_log_prob[~where], log_prob[~where])
