"""Draws follow their law, to the tails; they hang on key, position, draw and stream, and on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from laws import chi_square
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import native, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _row(states: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(1, 1, states, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("states", [2, 31, 1024, 1025, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_law(backend, states, dtype):
    n = 200_000 if backend.is_native else 50_000
    x = _row(states).to(dtype)
    tokens = ops.sample_categorical(x.to(backend.device), random.keys(5, 1, backend.device), draws=n)
    counts = torch.bincount(tokens.flatten().cpu(), minlength=states)
    assert counts.numel() == states
    assert chi_square(counts, torch.softmax(x.double().flatten(), 0)) > 1e-4


def test_law_across_keys_and_positions(backend):
    """One draw for each of many keys and positions, instead of many draws of one row."""
    x = _row(7)
    keys = random.keys(6, 4000, backend.device)
    tokens = ops.sample_categorical(x.to(backend.device).expand(4000, 10, 7), keys)
    probs = torch.softmax(x.double().flatten(), 0)
    counts = torch.bincount(tokens.flatten().cpu(), minlength=7)
    assert chi_square(counts, probs) > 1e-4
    for first, second in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):
        pairs = torch.bincount((first * 7 + second).flatten().cpu(), minlength=49)
        assert chi_square(pairs, (probs[:, None] * probs).flatten()) > 1e-4


def test_draws_and_streams_are_independent(backend):
    x = _row(5).expand(3000, 4, 5).to(backend.device)
    probs = torch.softmax(_row(5).double().flatten(), 0)
    keys = random.keys(7, 3000, backend.device)
    two = ops.sample_categorical(x, keys, draws=2)
    other = ops.sample_categorical(x, keys, stream=1)
    for first, second in ((two[:, 0], two[:, 1]), (two[:, 0], other)):
        pairs = torch.bincount((first * 5 + second).flatten().cpu(), minlength=25)
        assert chi_square(pairs, (probs[:, None] * probs).flatten()) > 1e-4


def test_support_is_exact(backend):
    """Classes without probability are never drawn: -inf, and so far down that no float holds them."""
    x = torch.zeros(1, 1, 5000)
    x[..., ::2] = -math.inf
    x[..., 1::4] = -200.0
    x[..., 1024:2048] = -math.inf
    tokens = ops.sample_categorical(x.to(backend.device), random.keys(0, 1, backend.device), draws=50_000).cpu()
    allowed = x.flatten() == 0.0
    assert allowed[tokens].all()
    assert tokens.unique().numel() == int(allowed.sum())


def test_rare_tail(backend):
    """262,143 classes at gap 20.5 below one: 3.3e-4 of the mass together, each below what 24 random bits resolve."""
    states, n = 1 << 18, 100_000
    x = torch.full((1, 1, states), -20.5)
    x[..., 12345] = 0.0
    tokens = ops.sample_categorical(x.to(backend.device), random.keys(1, 1, backend.device), draws=n).flatten()
    tail = (states - 1) * math.exp(-20.5)
    expected = n * tail / (1 + tail)
    hits = tokens[tokens != 12345]
    assert abs(hits.numel() - expected) < 4 * math.sqrt(expected), (hits.numel(), expected)
    assert hits.unique().numel() >= hits.numel() - 1  # they spread over the whole tail
    assert hits.min() < states // 4 and hits.max() > 3 * states // 4


@pytest.mark.parametrize("states", [1, 2, 31, 1024, 1025, 4099, 50257, 126464])
def test_kernels_draw_what_the_reference_draws(kernels, states, monkeypatch):
    keys = random.keys(states, 4, kernels.device)
    for dtype in DTYPES:
        x = torch.randn(4, 3, states, generator=torch.Generator().manual_seed(states)).mul(4).to(dtype)
        x[0, 0, : states // 3] = -math.inf
        x = x.to(kernels.device)
        for options in ({}, {"temperature": 0.7}, {"temperature": 0.0}, {"draws": 50, "stream": 9}):
            tokens, log_prob = ops.sample_categorical(x, keys, return_log_prob=True, **options)
            with monkeypatch.context() as patch:
                patch.setenv("DI4C_NATIVE", "off")
                expected, expected_log_prob = ops.sample_categorical(x, keys, return_log_prob=True, **options)
            assert torch.equal(tokens, expected), (dtype, options)
            torch.testing.assert_close(log_prob, expected_log_prob, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
def test_every_instruction_set_draws_the_same(kernels, isa, monkeypatch):
    if kernels.name != "cpu" or isa not in native.info()["isa_built"]:
        pytest.skip(f"{isa} is not built")
    x = torch.randn(4, 5, 3001, generator=torch.Generator().manual_seed(3)) * 5
    keys = random.keys(2, 4)
    expected = ops.sample_categorical(x, keys, draws=8)
    monkeypatch.setenv("DI4C_ISA", isa)
    try:
        native.info()
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    assert torch.equal(ops.sample_categorical(x, keys, draws=8), expected)
    assert torch.equal(ops.random_bits(keys, 99, stream_word=5), reference.random_bits(keys, 99, 5))


def test_log_prob(backend):
    for dtype in DTYPES:
        x = (torch.randn(3, 8, 1100, generator=torch.Generator().manual_seed(1)) * 3 + 100).to(dtype)
        keys = random.keys(3, 3, backend.device)
        tokens, log_prob = ops.sample_categorical(
            x.to(backend.device), keys, draws=4, temperature=1.7, return_log_prob=True
        )
        exact = torch.log_softmax(x.double() / 1.7, -1)[:, None].expand(-1, 4, -1, -1)
        exact = exact.gather(-1, tokens.cpu()[..., None])[..., 0]
        assert log_prob.dtype == torch.float32
        torch.testing.assert_close(log_prob.cpu().double(), exact, rtol=1e-6, atol=3e-5)


def test_temperature(backend):
    x = torch.randn(64, 4, 300, generator=torch.Generator().manual_seed(4)).to(backend.device)
    keys = random.keys(4, 64, backend.device)
    assert torch.equal(ops.sample_categorical(x, keys, temperature=0.5), ops.sample_categorical(x * 2, keys))
    tied = x.clone()
    tied[..., 17] = tied[..., 211] = 50.0
    tokens, log_prob = ops.sample_categorical(tied, keys, temperature=0.0, return_log_prob=True)
    assert (tokens == 17).all() and (log_prob == 0).all()
    assert torch.equal(ops.sample_categorical(x, keys, temperature=0.0), x.argmax(-1))
    assert torch.equal(ops.sample_categorical(x, keys, temperature=1e-4), x.argmax(-1))


def test_batch_of_64_equals_64_batches_of_1(backend):
    x = torch.randn(64, 5, 1031, generator=torch.Generator().manual_seed(5)).to(backend.device)
    keys = random.keys(5, 64, backend.device)
    x_t = torch.full((64, 5), 1031, device=backend.device)
    whole = ops.sample_categorical(x, keys)
    step = ops.absorbing_step(x, x_t, keys, unmask_prob=0.5, mask_id=1031, draws=3)
    for b in range(64):
        one = slice(b, b + 1)
        assert torch.equal(ops.sample_categorical(x[one], keys[one]), whole[one])
        alone = ops.absorbing_step(x[one], x_t[one], keys[one], unmask_prob=0.5, mask_id=1031, draws=3)
        assert torch.equal(alone, step[one])


def test_threads_change_no_draw(kernels):
    x = torch.randn(8, 40, 1031, generator=torch.Generator().manual_seed(5)).to(kernels.device)
    keys = random.keys(5, 8, kernels.device)
    torch.set_num_threads(1)
    one = ops.sample_categorical(x, keys, draws=3)
    torch.set_num_threads(2)
    assert torch.equal(ops.sample_categorical(x, keys, draws=3), one)


def test_shapes_positions_and_draws(backend):
    x = torch.randn(2, 3, 4, 50, generator=torch.Generator().manual_seed(6)).to(backend.device)
    keys = random.keys(6, 2, backend.device)
    tokens = ops.sample_categorical(x, keys)
    assert tokens.shape == (2, 3, 4) and tokens.dtype == torch.int64
    assert torch.equal(tokens.flatten(1), ops.sample_categorical(x.flatten(1, 2), keys))
    many = ops.sample_categorical(x, keys, draws=5)
    assert many.shape == (2, 5, 3, 4) and torch.equal(many[:, 0], tokens)
    assert torch.equal(many[:, :3], ops.sample_categorical(x, keys, draws=3))
    assert ops.sample_categorical(x[:, 0, 0], keys).shape == (2,)
    assert torch.equal(ops.sample_categorical(x[:, 0, 0], keys), tokens[:, 0, 0])
    # Any layout of the same numbers gives the same tokens.
    apart = x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(ops.sample_categorical(apart, keys), tokens)
    padded = torch.full((2, 3, 4, 53), math.nan, device=backend.device)
    padded[..., 2:52] = x
    assert torch.equal(ops.sample_categorical(padded[..., 2:52], keys), tokens)


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7), (0, 7), (2, 3, 0, 7)])
def test_nothing_to_draw(backend, shape):
    keys = random.keys(0, shape[0], backend.device)
    x = torch.zeros(shape, device=backend.device)
    assert ops.sample_categorical(x, keys).shape == shape[:-1]
    tokens, log_prob = ops.sample_categorical(x, keys, draws=2, return_log_prob=True)
    assert tokens.shape == log_prob.shape == (shape[0], 2, *shape[1:-1])
    assert ops.sample_categorical(torch.zeros(2, 3, 7), random.keys(0, 2), draws=0).shape == (2, 0, 3)


def test_bad_rows(backend):
    """NaN and all -inf give -1 and NaN, +inf its first class and 0; the rows beside them do not notice."""
    for states in (9, 2500):
        x = torch.randn(1, 6, states, generator=torch.Generator().manual_seed(7))
        spoiled = x.clone()
        spoiled[0, 1, states - 1] = math.nan
        spoiled[0, 2] = -math.inf
        spoiled[0, 3, [5, 7]] = math.inf
        spoiled[0, 4, [3, 4]] = torch.tensor([math.nan, math.inf])
        keys = random.keys(7, 1, backend.device)
        for temperature in (1.0, 0.0, 0.3):
            options = dict(draws=3, temperature=temperature, return_log_prob=True)
            tokens, log_prob = (v.cpu() for v in ops.sample_categorical(spoiled.to(backend.device), keys, **options))
            good, good_log_prob = (v.cpu() for v in ops.sample_categorical(x.to(backend.device), keys, **options))
            assert (tokens[..., [1, 2, 4]] == -1).all() and log_prob[..., [1, 2, 4]].isnan().all()
            assert (tokens[..., 3] == 5).all() and (log_prob[..., 3] == 0).all()
            assert torch.equal(tokens[..., [0, 5]], good[..., [0, 5]])
            assert torch.equal(log_prob[..., [0, 5]], good_log_prob[..., [0, 5]])


def test_float64_logits_are_served():
    x = _row(40).double().expand(2000, 3, 40)
    tokens, log_prob = ops.sample_categorical(x, random.keys(0, 2000), return_log_prob=True)
    assert chi_square(torch.bincount(tokens.flatten(), minlength=40), torch.softmax(x[0, 0], 0)) > 1e-4
    assert log_prob.dtype == torch.float32
