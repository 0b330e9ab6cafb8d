"""Keys and numbers: published vectors of Philox4x32-10, uniformity, and independence of everything but the key."""

from __future__ import annotations

import math

import pytest
import torch

from di4c_ext import ops, random
from di4c_ext.ops import reference

MASK = (1 << 64) - 1

# Known answers of Random123 for philox4x32-10: counter words 0..3, key words 0..1, result words 0..3.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    a, b = reference.philox(
        torch.tensor(_signed(key[1] << 32 | key[0])),
        torch.tensor(_signed(counter[1] << 32 | counter[0])),
        counter[2],
        counter[3],
    )
    words = (a.item() & MASK, b.item() & MASK)
    assert words == (expected[1] << 32 | expected[0], expected[3] << 32 | expected[2])


def test_kernel_known_answer(backend):
    bits = ops.random_bits(torch.zeros(1, dtype=torch.int64, device=backend.device), 1, stream_word=0)
    assert bits.flatten().tolist() == [_signed(0xE169C58D_6627E8D5), _signed(0x9B00DBD8_BC57AC4C)]


def test_bits_are_the_references(kernels):
    keys = torch.tensor([0, 1, -1, 1 << 40, -(1 << 63)], device=kernels.device)
    for n, word in ((0, 0), (1, 1), (9000, 0xFFFFFFFF)):
        assert torch.equal(ops.random_bits(keys, n, stream_word=word), reference.random_bits(keys, n, word))
    assert ops.random_bits(keys[:0], 4, stream_word=0).shape == (0, 4, 2)
    assert torch.equal(ops.random_bits(keys[::2], 7, stream_word=3), ops.random_bits(keys, 7, stream_word=3)[::2])


def test_keys(backend):
    keys = random.keys(3, 1000, backend.device)
    assert keys.dtype == torch.int64 and keys.device.type == backend.device.type
    assert torch.equal(keys[:10], random.keys(3, 10, backend.device))
    assert torch.equal(keys.cpu(), random.fold_in(torch.tensor(3), torch.arange(1000)))
    assert torch.equal(random.keys(3 + (1 << 64), 4), random.keys(3, 4))
    assert torch.equal(random.keys(-1, 4), random.keys(MASK, 4))
    assert random.keys(0, 0).shape == (0,)
    many = torch.cat([random.keys(seed, 5000) for seed in range(10)])
    assert many.unique().numel() == many.numel()


def test_fold_in(backend):
    keys = random.keys(0, 500, backend.device)
    steps = torch.stack([random.fold_in(keys, step) for step in range(20)])
    assert steps.unique().numel() == steps.numel() == 10_000
    assert torch.equal(steps[7], random.fold_in(keys, torch.tensor(7, device=backend.device)))
    assert torch.equal(steps[:, 3], random.fold_in(keys[3], torch.arange(20, device=backend.device)))
    # The order of folding matters: (step, rank) is not (rank, step).
    assert not torch.equal(random.fold_in(random.fold_in(keys, 1), 2), random.fold_in(random.fold_in(keys, 2), 1))
    assert torch.equal(random.fold_in(5, torch.arange(3)), random.keys(5, 3))


def test_each_key_alone_draws_the_same(backend):
    keys = random.keys(1, 64, backend.device)
    for draw in (random.uniform, random.normal):
        together = draw(keys, 33, stream=4)
        alone = torch.cat([draw(keys[i : i + 1], 33, stream=4) for i in range(64)])
        assert torch.equal(together, alone)
        assert torch.equal(draw(keys, 5, stream=4), together[:, :5])
        assert not torch.equal(draw(keys, 33, stream=5), together)


def _kolmogorov_smirnov(sorted_cdf: torch.Tensor) -> float:
    """sqrt(n) times the largest distance of an empirical law from the uniform one."""
    n = sorted_cdf.numel()
    grid = torch.arange(1, n + 1, dtype=torch.float64, device=sorted_cdf.device) / n
    return float(torch.maximum((grid - sorted_cdf).max(), (sorted_cdf - grid + 1 / n).max())) * math.sqrt(n)


def test_uniform(backend):
    u = random.uniform(random.keys(2, 500, backend.device), 400)
    assert u.dtype == torch.float64 and u.shape == (500, 400)
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal(u * 2.0**53, (u * 2.0**53).floor())
    assert _kolmogorov_smirnov(u.flatten().sort().values) < 2.2  # P(D > 2.2) = 1e-4
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs()
        assert correlation < 4 / math.sqrt(a.numel())


def test_normal(backend):
    z = random.normal(random.keys(3, 500, backend.device), 400)
    assert z.dtype == torch.float64 and torch.isfinite(z).all()
    assert _kolmogorov_smirnov(torch.special.ndtr(z.flatten()).sort().values) < 2.2
    assert 4.0 < z.abs().max() < 7.0  # of 200,000
    correlation = torch.corrcoef(torch.stack([z[:, 1:].flatten(), z[:, :-1].flatten()]))[0, 1].abs()
    assert correlation < 4 / math.sqrt(z.numel())


def test_nothing_global_is_touched():
    before = torch.random.get_rng_state()
    random.normal(random.keys(0, 3), 5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_errors():
    keys = random.keys(0, 3)
    with pytest.raises(ValueError, match=r"keys: n must be >= 0, got -1"):
        random.keys(0, -1)
    with pytest.raises(TypeError, match=r"fold_in: keys must be int64, got torch.float32"):
        random.fold_in(torch.zeros(3), 1)
    with pytest.raises(TypeError, match=r"fold_in: keys or data must be an int64 tensor"):
        random.fold_in(1, 2)
    for stream in (-1, (1 << 31) - 1):
        with pytest.raises(ValueError, match=rf"uniform: stream must be an integer in .*, got {stream}"):
            random.uniform(keys, 3, stream=stream)
        with pytest.raises(ValueError, match=rf"normal: stream must be an integer in .*, got {stream}"):
            random.normal(keys, 3, stream=stream)
    with pytest.raises(ValueError, match=r"random_bits: keys must have shape \(B,\)"):
        ops.random_bits(keys[None], 3, stream_word=0)
    with pytest.raises(ValueError, match=r"random_bits: stream_word must lie in \[0, 2\^32\), got -1"):
        ops.random_bits(keys, 3, stream_word=-1)
    with pytest.raises(ValueError, match=r"random_bits: n must be an integer >= 0, got -2"):
        ops.random_bits(keys, -2, stream_word=0)
