"""How 128 random bits choose a class, in plain torch: the scheme of csrc/include/di4c/masses.h.

A row of S logits x (already divided by the temperature) is cut into chunks of 1024 classes. Per chunk c, with
m_c = max x and s_c = sum exp(x - m_c):

    chunk:  v_c = s_c exp(m_c - max m),  W_c = floor(v_c 2^k)     k carries sum v into [2^61, 2^62)
    class:  q_i = floor(exp(x_i - m_c) 2^53)

The first 64 bits pick a chunk in proportion to W_c, the second a class of that chunk in proportion to q_i: the
smallest index whose inclusive prefix sum exceeds floor(bits * total / 2^64). Sums are of integers, so they are
exact: a class of mass 0 cannot be drawn, and the same bits give the same class in every implementation, but for
a draw within the rounding of s_c of a boundary between chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops.reference.philox import COIN, TOKEN, exceeds, multiply_high, philox, stream_word, unit_double

CHUNK = 1024
BAD_ROW = -1

_LOG2E, _ROUND, _EXP_MIN = float.fromhex("0x1.715476p+0"), float.fromhex("0x1.8p+23"), -87.0
LN2_HI, LN2_LO = float.fromhex("0x1.62e400p-1"), float.fromhex("0x1.7f7d1cp-20")
_POLYNOMIAL = [
    float.fromhex(c) for c in ("0x1.6a23cep-10", "0x1.123a20p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2")
]


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a b + c in float32 rounded once: the product is exact in float64 (a sum there rounds first, once in 2^29)."""
    return (a.double() * (b.double() if isinstance(b, Tensor) else b) + c).float()


def exp_nonpos(x: Tensor) -> Tensor:
    """e^x for x <= 0, the very bits of csrc/include/di4c/exp.h in float32; torch.exp in float64. NaN gives NaN."""
    if x.dtype == torch.float64:
        return torch.exp(x)
    tiny, nan = x < _EXP_MIN, torch.isnan(x)
    safe = torch.where(tiny | nan, 0.0, x)
    n = fma(safe, _LOG2E, _ROUND) - _ROUND
    r = fma(n, -LN2_LO, fma(n, -LN2_HI, safe))
    p = torch.full_like(r, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = fma(p, r, coefficient)
    p = fma(p, r * r, r) + 1.0
    scaled = (p.view(torch.int32) + (n.to(torch.int32) << 23)).view(torch.float32)
    return torch.where(nan, x, torch.where(tiny, 0.0, scaled))


def _masked_class(x: Tensor, mask_id: int) -> Tensor:
    """Class mask_id takes the logit -inf, by index: whatever stood there is not looked at."""
    if not 0 <= mask_id < x.shape[-1]:
        return x
    return torch.where(torch.arange(x.shape[-1], device=x.device) == mask_id, -math.inf, x)


def first_above(prefix: Tensor, target: Tensor, start: Tensor, width: int) -> Tensor:
    """First index i >= start with prefix[i] > target, unsigned, by halving; `width`, a power of two, bounds i - start.

    prefix (N, C) rises within the width; target and start are (N, n).
    """
    index = start
    while width > 1:
        width //= 2
        above = exceeds(prefix.gather(1, index + (width - 1)), target)
        index = torch.where(above, index, index + width)
    return index


def _draw(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Finite or -inf logits x (N, S), words a and b (N, n) -> classes (N, n) and their log-probabilities (N, n)."""
    rows, states = x.shape
    width = min(CHUNK, power_of_two(states))  # a row shorter than a chunk is one chunk all the same
    chunks = power_of_two(-(-states // width))
    padded = torch.nn.functional.pad(x, (0, chunks * width - states), value=-math.inf).view(rows, chunks, width)
    chunk_max = padded.amax(-1)
    row_max = chunk_max.amax(-1, keepdim=True)
    # A chunk without mass has no maximum to subtract; with any finite one its classes have mass 0.
    offset = torch.where(torch.isneginf(chunk_max), 0.0, chunk_max)
    e = exp_nonpos(padded - offset[..., None]).double()
    values = e.sum(-1).to(x.dtype).double() * exp_nonpos(chunk_max - row_max).double()
    total = values.sum(-1, keepdim=True)
    scale = torch.exp2(61.0 - (torch.frexp(total).exponent - 1).double())

    chunk_prefix = (values * scale).to(torch.int64).cumsum(-1)
    chunk = first_above(chunk_prefix, multiply_high(a, chunk_prefix[:, -1:]), torch.zeros_like(a), chunks)
    class_prefix = (e * 2.0**53).to(torch.int64).cumsum(-1)
    target = multiply_high(b, class_prefix[..., -1].gather(1, chunk))
    token = first_above(class_prefix.flatten(1), target, chunk * width, width)
    return token, (x.gather(1, token).double() - row_max.double()) - total.log()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def _sample_rows(logits: Tensor, a: Tensor, b: Tensor, mask_id: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Rows (N, S) with the words of n draws each (N, n) -> tokens (N, n), log-probabilities (N, n) float64."""
    x = _masked_class(logits if logits.dtype == torch.float64 else logits.float(), mask_id)
    if temperature != 0:
        x = x * torch.tensor(temperature, dtype=x.dtype).reciprocal().item()
    largest = x.amax(-1, keepdim=True)  # NaN where the row holds one
    bad = torch.isnan(largest) | torch.isneginf(largest)
    certain = bad | torch.isposinf(largest)  # nothing is random in such a row
    first = (x == largest).int().argmax(-1, keepdim=True).expand_as(a)
    if temperature == 0:
        token, log_prob = first, torch.zeros_like(a, dtype=torch.float64)
    else:
        token, log_prob = _draw(torch.where(certain, 0.0, x), a, b)
        token, log_prob = torch.where(certain, first, token), torch.where(certain, 0.0, log_prob)
    return torch.where(bad, BAD_ROW, token), torch.where(bad, math.nan, log_prob)


def sample(
    logits: Tensor,
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """One or more draws per row; with x_t, the absorbing step (api.h: SampleArgs).

    Args:
        logits: (B, D, S).
        keys: (B,) int64.
        x_t: (B, D) int64 or None. Where given, only positions equal to mask_id whose coin
            u(key, position, draw) < unmask_prob are drawn; the others keep x_t.
        unmask_prob: (B,) float64, with x_t only.
        mask_id: class that is never drawn, -1 (or any >= S) for none.
        draws: n >= 0 draws per row, each with its own 128 bits.
        stream: number of the caller's stream.
        temperature: the logits are divided by it; 0 takes the largest, the smallest index on ties.
        first: the position of row 0.

    Returns:
        tokens (B, n, D) int64, -1 for a bad row; log_prob (B, n, D) float32, NaN for a bad row, 0 where nothing
        was drawn.
    """
    batch, length, states = logits.shape
    if batch * length * draws == 0:
        empty = logits.new_empty((batch, draws, length), dtype=torch.float32)
        return empty.to(torch.int64), empty
    key = keys[:, None, None]
    position = torch.arange(first, first + length, device=logits.device)[None, :, None]
    draw = torch.arange(draws, device=logits.device)[None, None, :]
    a, b = philox(key, position, draw, stream_word(stream, TOKEN))  # (B, D, n)
    rows = logits.reshape(batch * length, states)
    token, log_prob = _sample_rows(rows, a.flatten(0, 1), b.flatten(0, 1), mask_id, temperature)
    token, log_prob = token.view_as(a), log_prob.view_as(a)
    if x_t is not None and unmask_prob is not None:
        coin = unit_double(philox(key, position, draw, stream_word(stream, COIN))[0])
        drawn = (x_t == mask_id)[..., None] & (coin < unmask_prob[:, None, None])
        token, log_prob = torch.where(drawn, token, x_t[..., None]), torch.where(drawn, log_prob, 0.0)
    return token.transpose(1, 2).contiguous(), log_prob.transpose(1, 2).float().contiguous()
