"""Draws: one read of the logits against softmax followed by torch.multinomial, and against the exponential race.

Floor: the logits read once, 8 bytes of key or token per row.
"""

from __future__ import annotations

import pytest
import torch
from measuring import shape_name

from di4c_ext import ops, random

SHAPES = [(4, 1024, 8192, torch.float32), (1, 1024, 50258, torch.bfloat16)]


def _logits(batch, length, states, dtype, device):
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(batch, length, states, generator=g, device=device).mul_(2).to(dtype)


def _race(logits):
    """argmax of p / E with E exponential: torch's own draw for one sample, the way of the published samplers."""
    p = torch.softmax(logits, -1, dtype=torch.float32)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def _multinomial(logits, draws):
    p = torch.softmax(logits, -1, dtype=torch.float32)
    return torch.multinomial(p.flatten(0, 1), draws, replacement=True)


def _posterior(logits, x_t, unmask_prob):
    """One absorbing step as published: a tensor of probabilities over S + 1 states, and a race in it."""
    p = torch.softmax(logits, -1, dtype=torch.float32) * unmask_prob
    p = torch.cat([p, torch.full_like(p[..., :1], 1 - unmask_prob)], -1)
    x_s = (p / torch.empty_like(p).exponential_()).argmax(-1)
    return torch.where(x_t == logits.shape[-1], x_s, x_t)


@pytest.mark.parametrize("name", ["di4c", "race", "multinomial", "compiled race"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{shape_name(*s[:3])}-{str(s[3])[6:]}")
def test_sample(meter, device, shape, name):
    if name == "compiled race" and shape is not SHAPES[0]:
        pytest.skip("compiled once")
    x, keys = _logits(*shape, device), random.keys(0, shape[0], device)
    compiled = torch.compile(_race, dynamic=False) if name == "compiled race" else None
    calls = {
        "di4c": lambda: ops.sample_categorical(x, keys),
        "race": lambda: _race(x),
        "multinomial": lambda: _multinomial(x, 1),
        "compiled race": lambda: compiled(x),
    }
    floor = x.numel() * x.element_size() + 16 * x.shape[0] * x.shape[1]
    meter(f"sample {shape_name(*shape[:3])} {str(shape[3])[6:]}", name, calls[name], floor)


@pytest.mark.parametrize("name", ["di4c", "multinomial"])
def test_many_draws(meter, device, name):
    """32 draws from every row: a teacher's continuations for L = 32 latents."""
    x, keys = _logits(4, 256, 8192, torch.float32, device), random.keys(0, 4, device)
    calls = {
        "di4c": lambda: ops.sample_categorical(x, keys, draws=32),
        "multinomial": lambda: _multinomial(x, 32),
    }
    floor = x.numel() * x.element_size() + 32 * 8 * x.shape[0] * x.shape[1]
    meter("sample 32 draws 4x256x8192 float32", name, calls[name], floor)


@pytest.mark.parametrize("name", ["di4c", "posterior tensor"])
@pytest.mark.parametrize("rate", [1.0, 1 / 16])
def test_absorbing_step(meter, device, rate, name):
    """Rows that stay masked are not read: the floor falls with the rate."""
    shape = SHAPES[1]
    x, keys = _logits(*shape, device), random.keys(0, shape[0], device)
    x_t = torch.full(shape[:2], shape[2], device=device)
    calls = {
        "di4c": lambda: ops.absorbing_step(x, x_t, keys, unmask_prob=rate, mask_id=shape[2]),
        "posterior tensor": lambda: _posterior(x, x_t, rate),
    }
    floor = int(rate * x.numel() * x.element_size()) + 24 * x_t.numel()
    meter(f"absorbing step, rate {rate:g}, {shape_name(*shape[:3])} bfloat16", name, calls[name], floor)


@pytest.mark.parametrize("name", ["di4c", "torch"])
def test_random_bits(meter, device, name):
    """16 bytes for each of a million counters; torch's generator as the peer, which has no key per sample."""
    keys = random.keys(0, 64, device)
    calls = {
        "di4c": lambda: ops.random_bits(keys, 16384, stream_word=0),
        "torch": lambda: torch.empty(64, 16384, 2, dtype=torch.int64, device=device).random_(),
    }
    meter("random bits 64x16384", name, calls[name], 16 * 64 * 16384)
