"""Philox4x32-10 in int64 torch arithmetic: 128 random bits as a pure function of key and counter.

The generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Words of 32 bits live
in int64 tensors in [0, 2^32); words of 64 bits are int64 tensors read as unsigned (two's complement). A product
of two 32-bit words wraps in int64 but keeps its 64 bits, and `>> 32 & MASK32` undoes the sign of the shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
TOKEN, COIN = 0, 1  # the lowest bit of a stream word: what a draw is used for

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def stream_word(stream: int, use: int) -> int:
    """Word 3 of the counter: the caller's stream and the use (TOKEN or COIN) in one 32-bit word."""
    return (stream << 1 | use) & MASK32


def philox(key: Tensor, position: Tensor, draw: Tensor | int, stream: int) -> tuple[Tensor, Tensor]:
    """Two 64-bit words for each (key, position, draw), all broadcast together; csrc/include/di4c/philox.h.

    Args:
        key, position: int64, read as unsigned.
        draw: int64 tensor or int, its low 32 bits count.
        stream: word 3 of the counter as it is, 32 bits.

    Returns:
        Words a and b, int64 tensors of the broadcast shape, read as unsigned.
    """
    number = draw if isinstance(draw, Tensor) else torch.full((), draw, dtype=torch.int64, device=key.device)
    key, position, number = torch.broadcast_tensors(key, position, number)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    c0, c1 = position & MASK32, (position >> 32) & MASK32
    c2, c3 = number & MASK32, torch.full_like(number, stream & MASK32)
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, ((p0 >> 32) & MASK32) ^ c3 ^ k1
        c1, c3 = p1 & MASK32, p0 & MASK32
        k0, k1 = (k0 + _WEYL[0]) & MASK32, (k1 + _WEYL[1]) & MASK32
    return c1 << 32 | c0, c3 << 32 | c2


def random_bits(keys: Tensor, n: int, stream: int) -> Tensor:
    """keys (B,) int64 -> (B, n, 2) int64: out[b, i] = philox(keys[b], position=i, draw=0, stream)."""
    positions = torch.arange(n, device=keys.device)
    return torch.stack(philox(keys[:, None], positions, 0, stream), dim=-1)


def unit_double(bits: Tensor) -> Tensor:
    """The top 53 of 64 random bits as a float64 in [0, 1); exact."""
    return ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def multiply_high(bits: Tensor, total: Tensor) -> Tensor:
    """floor(bits * total / 2^64) of two unsigned 64-bit words: uniform on [0, total) for uniform bits."""
    a0, a1 = bits & MASK32, (bits >> 32) & MASK32
    b0, b1 = total & MASK32, (total >> 32) & MASK32
    low, mid0, mid1, high = a0 * b0, a0 * b1, a1 * b0, a1 * b1
    carry = ((low >> 32) & MASK32) + (mid0 & MASK32) + (mid1 & MASK32)
    return high + ((mid0 >> 32) & MASK32) + ((mid1 >> 32) & MASK32) + (carry >> 32)


def exceeds(a: Tensor, b: Tensor) -> Tensor:
    """a > b for unsigned 64-bit words: flipping the top bit turns unsigned order into signed order."""
    top = torch.iinfo(torch.int64).min
    return (a ^ top) > (b ^ top)
