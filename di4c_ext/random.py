"""Random numbers that hang on the sample, not on a global state: 64-bit keys and the counter-based Philox4x32-10.

    keys = random.keys(seed, n)          one key per sample, a function of (seed, number of the sample)
    keys = random.fold_in(keys, step)    new keys for each step

A key draws the same numbers in a batch of 64 and in 64 batches of 1, on any number of processes, after a resume, on
CPU and GPU. Calls that must be independent of each other take different keys or different streams.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops import random_bits, reference
from di4c_ext.ops.checks import stream as check_stream
from di4c_ext.ops.reference.philox import COIN, stream_word

_FOLD = 0xFFFFFFFF  # the stream word of fold_in, which no stream of a caller reaches


def keys(seed: int, n: int, device: torch.device | str | None = None) -> Tensor:
    """(n,) int64 keys: fold_in(seed, 0), ..., fold_in(seed, n - 1); the first n of any longer set.

    Args:
        seed: any Python integer, taken modulo 2^64.
        n: >= 0.
        device: where the keys are to lie; default CPU.
    """
    if n < 0:
        raise ValueError(f"keys: n must be >= 0, got {n}")
    root = torch.full((1,), _signed(seed), dtype=torch.int64, device=device)
    return random_bits(root, n, stream_word=_FOLD)[0, :, 0].contiguous()


def fold_in(keys: Tensor | int, data: int | Tensor) -> Tensor:
    """New int64 keys from keys and data (a step, an index): philox(key, position=data, 0, 0xFFFFFFFF), first word.

    Args:
        keys: int64 tensor or integer; data: integer modulo 2^64, or an int64 tensor that broadcasts with keys.

    Raises:
        TypeError: for tensors that are not int64, or where neither is a tensor.
    """
    for name, value in (("keys", keys), ("data", data)):
        if isinstance(value, Tensor) and value.dtype != torch.int64:
            raise TypeError(f"fold_in: {name} must be int64, got {value.dtype}")
    beside = keys if isinstance(keys, Tensor) else data
    if not isinstance(beside, Tensor):
        raise TypeError("fold_in: keys or data must be an int64 tensor, got two numbers; see random.keys(seed, n)")
    key, position = (
        value if isinstance(value, Tensor) else torch.full((), _signed(value), dtype=torch.int64, device=beside.device)
        for value in (keys, data)
    )
    return reference.philox(key, position, 0, _FOLD)[0]


def uniform(keys: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """keys (B,) -> (B, n) float64, uniform on the multiples of 2^-53 in [0, 1).

    Number i of a key is the coin that `absorbing_step` throws at position i on the same stream.
    """
    check_stream("uniform", stream)
    return reference.unit_double(random_bits(keys, n, stream_word=stream_word(stream, COIN))[..., 0])


def normal(keys: Tensor, n: int, *, stream: int = 0) -> Tensor:
    """keys (B,) -> (B, n) float64, standard normal by Box and Muller from the two words of each position.

    Made of the same bits as `uniform` on the same stream, and so not independent of it. Devices agree to rounding.
    """
    check_stream("normal", stream)
    u = reference.unit_double(random_bits(keys, n, stream_word=stream_word(stream, COIN)))
    return torch.sqrt(-2.0 * torch.log1p(-u[..., 0])) * torch.cos(2.0 * math.pi * u[..., 1])


def _signed(value: int) -> int:
    """The integer of [-2^63, 2^63) equal to value modulo 2^64."""
    return (int(value) + (1 << 63)) % (1 << 64) - (1 << 63)
