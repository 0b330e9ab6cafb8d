"""Select and reveal in plain torch: the Gumbel numbers and the order of csrc/include/di4c/reveal.h, to the last bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops.reference.philox import COIN, philox, stream_word
from di4c_ext.ops.reference.sampling import LN2_HI, LN2_LO, fma

BAD_TOKEN = -1
_SQRT_HALF = 0x3F3504F3  # the bits of sqrt 1/2
_EXPONENT = -0x800000  # the bits of a float32 that hold its sign and exponent
_BESIDE_ONE = 0.29
_LOGARITHM = [
    float.fromhex(c)
    for c in (
        *("-0x1.38b582p-4", "0x1.055b72p-3", "-0x1.0d8544p-3", "0x1.22da1cp-3"),
        *("-0x1.547244p-3", "0x1.99a008p-3", "-0x1.000226p-2", "0x1.555554p-2"),
    )
]


def log_beside_one(f: Tensor) -> Tensor:
    """log(1 + f) of float32 f in [sqrt 1/2 - 1, sqrt 2 - 1), the bits of csrc/include/di4c/log.h."""
    p = torch.full_like(f, _LOGARITHM[0])
    for coefficient in _LOGARITHM[1:]:
        p = fma(p, f, coefficient)
    return fma(fma(p, f, -0.5), f * f, f)


def log_normal(x: Tensor) -> Tensor:
    """log x of normal float32 x > 0, the bits of csrc/include/di4c/log.h."""
    bits = x.view(torch.int32)
    whole = (bits - _SQRT_HALF) & _EXPONENT
    exponent = (whole >> 23).float()
    f = (bits - whole).view(torch.float32) - 1.0
    return fma(exponent, LN2_HI, fma(exponent, LN2_LO, log_beside_one(f)))


def gumbel(bits: Tensor) -> Tensor:
    """Gumbel numbers float32 of 64 random bits each: -log(-log(1 - v)), v the middle of one of 2^52 parts of (0, 1)."""
    v = ((bits >> 12 & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52
    beside = v < _BESIDE_ONE
    near = log_beside_one(torch.where(beside, -v, -0.25).float())
    far = log_normal(torch.where(beside, 0.5, 1.0 - v).float())
    return -log_normal(-torch.where(beside, near, far))


def reveal(
    x_t: Tensor,
    tokens: Tensor,
    log_prob: Tensor,
    count: Tensor,
    noise: Tensor,
    keys: Tensor,
    mask_id: int,
    stream: int,
) -> Tensor:
    """Of the masked positions, those of the highest confidence take their tokens (api.h: RevealArgs).

    Args:
        x_t: (B, D) int64.
        tokens: (B, n, D) int64, one for every masked position.
        log_prob: (B, n, D) float32, theirs.
        count: (B,) int64, how many are to be revealed; no less than none and no more than there are.
        noise: (B,) float32, what the Gumbel numbers are multiplied by.
        keys: (B,) int64.
        mask_id: the state that means "masked".
        stream: number of the caller's stream; its coin words are used.

    Returns:
        x_s (B, n, D) int64; -1 at masked positions whose token is negative or whose confidence is NaN.
    """
    _, draws, length = tokens.shape
    if tokens.numel() == 0:
        return torch.empty_like(tokens)
    positions = torch.arange(length, device=x_t.device)
    numbers = torch.arange(draws, device=x_t.device)[:, None]
    bits = philox(keys[:, None, None], positions, numbers, stream_word(stream, COIN))[0]
    confidence = log_prob + noise[:, None, None] * gumbel(bits)
    masked = (x_t == mask_id)[:, None]
    bad = (tokens < 0) | torch.isnan(confidence)
    candidate = masked & ~bad
    # Candidates first, then by confidence, then by position: both sorts keep the order of equals.
    order = confidence.masked_fill(bad, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, candidate.gather(-1, order).long().sort(dim=-1, descending=True, stable=True).indices)
    rank = torch.empty_like(order).scatter_(-1, order, positions.expand_as(order))
    revealed = candidate & (rank < count[:, None, None])
    kept = torch.where(masked & bad, BAD_TOKEN, x_t[:, None])
    return torch.where(revealed, tokens, kept)
