"""Draws hang on key, position, draw and stream, and on nothing else: not on backend, batch, threads or layout."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from laws import chi_square
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _wanted(states: int, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Rows (4, 3, S), some with a third of their classes gone, and what the definition draws from them."""
    x = torch.randn(4, 3, states, generator=torch.Generator().manual_seed(states)).mul(4).to(dtype)
    x[0, 0, : states // 3] = -math.inf
    keys = random.keys(states, 4)
    return x, [ops.sample_categorical(x, keys, return_log_prob=True, **options) for options in OPTIONS]


OPTIONS = (
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"draws": 50, "stream": 9},
    {"stream": (1 << 31) - 2, "first_position": (1 << 32) - 1},
)


@pytest.mark.parametrize("states", [1, 2, 31, 1024, 1025, 4099, 50257, 126464])
def test_kernels_draw_what_the_reference_draws(implementation, states, monkeypatch):
    if not implementation.is_native:
        pytest.skip("it is what the others are compared with")
    keys = random.keys(states, 4, implementation.device)
    for dtype in DTYPES:
        with monkeypatch.context() as patch:
            patch.setenv("DI4C_NATIVE", "off")
            x, wanted = _wanted(states, dtype)
        for options, (tokens, log_prob) in zip(OPTIONS, wanted, strict=True):
            got = ops.sample_categorical(x.to(implementation.device), keys, return_log_prob=True, **options)
            assert torch.equal(got[0].cpu(), tokens), (dtype, options)
            torch.testing.assert_close(got[1].cpu(), log_prob, rtol=2e-6, atol=2e-6)


def test_known_tokens(implementation):
    """Tokens once drawn stay as they were: seeds in papers and bug reports mean the same in every version."""
    logits = ((torch.arange(2 * 3 * 3001) * 37 % 101) / 8).view(2, 3, 3001).to(implementation.device)
    keys, x_t = (v.to(implementation.device) for v in (random.keys(2024, 2), torch.full((2, 3), 3001)))
    tokens = ops.sample_categorical(logits, keys, draws=2)
    assert tokens.tolist() == [[[2050, 2971, 1562], [1463, 59, 2471]], [[2549, 1153, 2596], [559, 2357, 1021]]]
    x_s = ops.absorbing_step(logits, x_t, keys, unmask_prob=0.5, mask_id=3001, draws=2)
    assert x_s.tolist() == [[[2050, 2971, 3001], [3001, 3001, 3001]], [[3001, 1153, 2596], [559, 3001, 1021]]]


def test_every_backend_has_the_same_bits(implementation):
    keys = random.keys(2, 4)
    bits = ops.random_bits(keys.to(implementation.device), 99, stream_word=5)
    assert torch.equal(bits.cpu(), reference.random_bits(keys, 99, 5))


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


def test_runs_and_threads_change_no_draw(implementation):
    if not implementation.is_native:
        pytest.skip("it has no threads of its own")
    x = torch.randn(8, 40, 1031, generator=torch.Generator().manual_seed(5)).to(implementation.device)
    keys = random.keys(5, 8, implementation.device)
    torch.set_num_threads(1)
    one = ops.sample_categorical(x, keys, draws=3, return_log_prob=True)
    torch.set_num_threads(2)
    for _ in range(20):
        again = ops.sample_categorical(x, keys, draws=3, return_log_prob=True)
        assert all(torch.equal(a, b) for a, b in zip(again, one, strict=True))


@pytest.mark.parametrize("states", [20, 2500])
@pytest.mark.parametrize("first", [0, 3, (1 << 32) - 2, (1 << 40) + 7])
def test_a_chunk_of_positions_is_a_slice_of_the_whole(backend, states, first):
    """Positions may be drawn some at a time: `first_position` says where they stand in the sample."""
    x = torch.randn(3, 9, states, generator=torch.Generator().manual_seed(8)).to(backend.device)
    keys = random.keys(8, 3, backend.device)
    whole = ops.sample_categorical(x, keys, draws=4, return_log_prob=True, first_position=first)
    for start, end in ((0, 4), (4, 5), (5, 9), (9, 9)):
        some = ops.sample_categorical(
            x[:, start:end], keys, draws=4, return_log_prob=True, first_position=first + start
        )
        assert all(torch.equal(a, b[..., start:end]) for a, b in zip(some, whole, strict=True))
    if first == 0:
        assert torch.equal(whole[0], ops.sample_categorical(x, keys, draws=4))
    # Dimensions between the batch and the classes count as one, flat.
    square = ops.sample_categorical(x.view(3, 3, 3, states), keys, draws=4, first_position=first)
    assert torch.equal(square.flatten(2), whole[0])


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


def test_float64_logits_are_served():
    x = torch.randn(40, generator=torch.Generator().manual_seed(9)).double().expand(2000, 3, 40)
    tokens, log_prob = ops.sample_categorical(x, random.keys(0, 2000), return_log_prob=True)
    assert chi_square(torch.bincount(tokens.flatten(), minlength=40), torch.softmax(x[0, 0], 0)) > 1e-4
    assert log_prob.dtype == torch.float32
