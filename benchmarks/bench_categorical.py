"""Draws: one read of the logits beside softmax followed by torch.multinomial, the exponential race and the peers.

Floor: the logits read once, 8 bytes of key or token per row. Promised on a CPU: 25 times softmax and multinomial, 12
times the race, and at most 1.5 times our own log-sum-exp of the same rows, which any sampler must take.
"""

from __future__ import annotations

import peers
import plain
import pytest
import torch
from cases import DTYPES, name
from measuring import nbytes

from di4c_ext import ops, random

SHAPES = [(4, 1024, 8192), (1, 1024, 50258)]
LARGE = [(16, 1024, 50258)] if torch.cuda.is_available() else []
ALL = [(shape, dtype) for shape in (*SHAPES, *LARGE) for dtype in DTYPES]
LOG_SUM_EXP = "own log-sum-exp"
AT_LEAST = {"multinomial": 25, "race": 12, LOG_SUM_EXP: 1 / 1.5}


def _logits(shape, dtype, device):
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=g, device=device).mul_(2).to(dtype)


def _log_sum_exp(x):
    """The mixture op with nothing asked of it but the log-sum-exp of every row."""
    return torch.ops.di4c.mixture(x[:, None], None, None, None, None, None, None, None, False)


def _call(by, x, keys, device):
    rows = x.flatten(0, -2)
    calls = {
        "di4c": lambda: ops.sample_categorical(x, keys),
        LOG_SUM_EXP: lambda: _log_sum_exp(x),
        "race": lambda: plain.race(x),
        "multinomial": lambda: plain.multinomial(x),
    }
    if by == "compiled race":
        compiled = peers.compiled(plain.race, device)
        return lambda: compiled(x)
    if by.startswith("FlashInfer"):
        draw = (peers.flashinfer_sampling_probs if by.endswith("probs") else peers.flashinfer_sampling)(device)
        return lambda: draw(rows)
    return calls[by]


@pytest.mark.parametrize(
    "by", ["di4c", LOG_SUM_EXP, "race", "multinomial", "compiled race", "FlashInfer", "FlashInfer, softmax and probs"]
)
@pytest.mark.parametrize("case", ALL, ids=[name(*case) for case in ALL])
def test_sample(meter, device, case, by):
    if by == "compiled race" and case != ALL[0]:
        pytest.skip("compiled once")
    shape, dtype = case
    group = f"sample {name(shape, dtype)}"
    x, keys = _logits(shape, dtype, device), random.keys(0, shape[0], device)
    try:
        call = _call(by, x, keys, device)
    except peers.Missing as missing:
        meter.absent(group, by, str(missing))
    floor = nbytes(x) + (0 if by == LOG_SUM_EXP else 16 * shape[0] * shape[1])
    meter(
        group,
        by,
        call,
        floor,
        at_least=AT_LEAST if by == "di4c" else None,
        may_fail=by not in ("di4c", LOG_SUM_EXP),
        graph=by != "compiled race",
    )


@pytest.mark.parametrize("by", ["di4c", "multinomial"])
def test_many_draws(meter, device, by):
    """32 draws from every row: a teacher's continuations for L = 32 latents."""
    x, keys = _logits((4, 256, 8192), torch.float32, device), random.keys(0, 4, device)
    calls = {
        "di4c": lambda: ops.sample_categorical(x, keys, draws=32),
        "multinomial": lambda: plain.multinomial(x, 32),
    }
    floor = nbytes(x) + 32 * 8 * x.shape[0] * x.shape[1]
    meter("sample 32 draws 4x256x8192 float32", by, calls[by], floor)


@pytest.mark.parametrize("by", ["di4c", "posterior tensor"])
@pytest.mark.parametrize("rate", [1.0, 1 / 16])
def test_absorbing_step(meter, device, rate, by):
    """Rows that stay masked are not read: the floor falls with the rate."""
    shape = SHAPES[1]
    x, keys = _logits(shape, torch.bfloat16, device), random.keys(0, shape[0], device)
    x_t = torch.full(shape[:2], shape[2], device=device)
    calls = {
        "di4c": lambda: ops.absorbing_step(x, x_t, keys, unmask_prob=rate, mask_id=shape[2]),
        "posterior tensor": lambda: plain.absorbing_step(x, x_t, rate, shape[2]),
    }
    floor = int(rate * nbytes(x)) + 24 * x_t.numel()
    meter(f"absorbing step, rate {rate:g}, {name(shape, torch.bfloat16)}", by, calls[by], floor)


@pytest.mark.parametrize("by", ["di4c", "torch"])
def test_random_bits(meter, device, by):
    """16 bytes for each of a million counters; torch's generator as the peer, which has no key per sample."""
    keys = random.keys(0, 64, device)
    calls = {
        "di4c": lambda: ops.random_bits(keys, 16384, stream_word=0),
        "torch": lambda: torch.empty(64, 16384, 2, dtype=torch.int64, device=device).random_(),
    }
    meter("random bits 64x16384", by, calls[by], 16 * 64 * 16384)
