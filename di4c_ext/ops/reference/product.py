"""Integer masses of numbers given in doubles, and draws in proportion to them; csrc/include/di4c/product.h.

For values v_s >= 0 of S classes, with e the exponent of the largest,

    q_s = floor(v_s 2^(P - e)),   P = 61 - ceil(log2 S)

so that all of them stay below 2^62. A 64-bit word picks a class in proportion to q_s: the smallest index whose
inclusive prefix sum exceeds floor(bits * total / 2^64). Only shifts of the doubles' own digits are taken, so every
implementation has the same masses to the bit; a class of mass 0 is never drawn, tails are right to 2^-P of the largest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops.reference.philox import COIN, multiply_high, philox, stream_word
from di4c_ext.ops.reference.sampling import BAD_ROW, first_above, power_of_two

_DIGITS = (1 << 52) - 1


def fixed_masses(values: Tensor) -> Tensor:
    """values (..., S) float64 -> masses (..., S) int64; 0 throughout for a row that allows no draw: one that holds a
    negative number, an infinity or a NaN, or zeros alone."""
    bits = (values + 0.0).view(torch.int64)  # without the zero's sign
    place = 61 - (values.shape[-1] - 1).bit_length()
    field = (bits >> 52) & 0x7FF
    digits = (bits & _DIGITS) | ((field > 0).long() << 52)
    field = field.clamp(min=1)
    largest = field.amax(-1, keepdim=True)
    up = max(place - 52, 0)
    masses = (digits << up) >> (largest - field + (up + 52 - place)).clamp(max=63)
    bad = ~((values >= 0) & (values < math.inf)).all(-1, keepdim=True)
    return masses.masked_fill(bad, 0)


def prefix_masses(tables: Tensor) -> Tensor:
    """tables (..., S) float64 -> the prefix sums of each row's masses (..., P) int64, P the power of two from S on:
    what `sample_rows` searches. Classes beyond S have mass 0."""
    states = tables.shape[-1]
    return torch.nn.functional.pad(fixed_masses(tables), (0, power_of_two(states) - states)).cumsum(-1)


def sample_rows(prefix: Tensor, row: Tensor, bits: Tensor) -> Tensor:
    """One class for each position, from the row of a table that it names, in log2 P looks at it.

    Args:
        prefix: (R, P) int64, from `prefix_masses`.
        row: (...) int64, which of the R rows.
        bits: (...) int64, 64 random bits each.

    Returns:
        (...) int64, -1 where the row allows no draw.
    """
    width = prefix.shape[-1]
    start = row.reshape(1, -1) * width
    flat = prefix.reshape(1, -1)
    total = flat.gather(1, start + (width - 1))
    target = multiply_high(bits.reshape(1, -1), total)
    drawn = first_above(flat, target, start, width) - start
    return torch.where(total > 0, drawn, BAD_ROW).view(row.shape)


def sample_product(
    left: Tensor, right: Tensor, base: Tensor | None, i: Tensor, j: Tensor, keys: Tensor, stream: int
) -> Tensor:
    """Draws of states s in proportion to left[n, i, s] right[n, j, s] + base[n, i, j] (api.h: ProductArgs).

    Args:
        left, right: (N, S, S) float64, N = B or 1.
        base: (N, S, S) float64 or None for 0.
        i: (B, D) int64, the row of `left`.
        j: (B, n, D) int64, the row of `right`.
        keys: (B,) int64.
        stream: number of the caller's stream; its coin words are used.

    Returns:
        (B, n, D) int64; -1 where i or j is no state, or the product allows no draw.
    """
    batch, draws, length = j.shape
    states, device = left.shape[-1], j.device
    if j.numel() == 0:
        return torch.empty_like(j)
    table = torch.arange(batch, device=device)[:, None, None] if left.shape[0] > 1 else 0
    i = i[:, None].expand_as(j)
    outside = (i < 0) | (i >= states) | (j < 0) | (j >= states)
    i, j = i.masked_fill(outside, 0), j.masked_fill(outside, 0)
    value = left[table, i] * right[table, j]
    if base is not None:
        value = value + base[table, i, j][..., None]
    positions, numbers = torch.arange(length, device=device), torch.arange(draws, device=device)[:, None]
    bits = philox(keys[:, None, None], positions, numbers, stream_word(stream, COIN))[0]
    rows = torch.arange(j.numel(), device=device).view_as(j)
    drawn = sample_rows(prefix_masses(value).flatten(0, -2), rows, bits)
    return drawn.masked_fill(outside, BAD_ROW)
