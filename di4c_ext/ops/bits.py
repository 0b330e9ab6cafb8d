"""`random_bits`: raw Philox4x32-10 output, 128 bits for each (key, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register


def random_bits(keys: Tensor, n: int, *, stream_word: int) -> Tensor:
    """keys (B,) int64 -> (B, n, 2) int64, out[b, i] = philox(keys[b], position=i, draw=0, stream_word).

    Args:
        keys: (B,) int64.
        n: >= 0, number of positions.
        stream_word: the counter's last word as it is, in [0, 2^32); 2 * stream for tokens, 2 * stream + 1 for coins.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    op = "random_bits"
    if not isinstance(keys, Tensor):
        raise TypeError(f"{op}: keys must be an int64 tensor (B,), got {type(keys).__name__}")
    checks.indices(op, "keys", keys, (keys.numel(),), "(B,)", keys)
    checks.count(op, "n", n)
    if isinstance(stream_word, bool) or not isinstance(stream_word, int):
        raise TypeError(f"{op}: stream_word must be an integer in [0, 2^32), got {stream_word!r}")
    if not 0 <= stream_word < 1 << 32:
        raise ValueError(f"{op}: stream_word must lie in [0, 2^32), got {stream_word!r}")
    return torch.ops.di4c.random_bits(keys, n, stream_word)


def _random_bits(keys: Tensor, n: int, stream_word: int) -> Tensor:
    run = native.kernels(keys)
    if run is None:
        return reference.random_bits(keys, n, stream_word)
    out = _random_bits_fake(keys, n, stream_word)
    run("random_bits", keys=native.dense(keys), out=out, B=keys.shape[0], N=n, stream=stream_word)
    return out


def _random_bits_fake(keys: Tensor, n: int, stream_word: int) -> Tensor:
    return keys.new_empty((keys.shape[0], n, 2))


register("random_bits(Tensor keys, SymInt n, int stream_word) -> Tensor", _random_bits, _random_bits_fake)
