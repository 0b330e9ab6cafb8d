"""Nucleus (top-p) truncation of rows of logits, in plain torch on every device: what is cut off cannot be drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops import checks

_PIECE_BYTES = 64 << 20
_BYTES_PER_LOGIT = 48  # of the sorted logits, their places and the float64 sums


def nucleus(logits: Tensor, top_p: float, *, temperature: float = 1.0) -> Tensor:
    """Logits, anew, that are -inf outside each row's nucleus, and what they were inside.

    With the classes of a row in order, the largest logit first and the lower index first among equal ones, the nucleus
    is the shortest beginning whose probabilities under softmax(logits / temperature) add up to top_p or more. It is
    never empty, and of equal logits at its end it has exactly as many as it needs. Sums are in float64.

    Args:
        logits: (..., S), any floating dtype.
        top_p: in (0, 1]; 1 keeps every class.
        temperature: >= 0, that of the draw to come; 0 draws the first class of the order, which is always kept.

    Returns:
        Of the shape and dtype of the logits. A row with a NaN, a +inf or no class above -inf stays as it is.

    Raises:
        ValueError, TypeError: for a top_p or temperature outside its range.
    """
    check_top_p("nucleus", top_p)
    checks.temperature("nucleus", temperature)
    if top_p == 1 or temperature == 0 or logits.numel() == 0:
        return logits.clone()
    rows = logits.reshape(-1, logits.shape[-1])
    size = max(1, _PIECE_BYTES // (_BYTES_PER_LOGIT * rows.shape[1]))
    out = torch.cat([_truncated(piece, top_p, temperature) for piece in rows.split(size)])
    return out.view(logits.shape)


def check_top_p(op: str, value: float) -> None:
    """ValueError or TypeError unless a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{op}: top_p must be a number in (0, 1] (1 keeps every class), got {value!r}")
    if not 0.0 < value <= 1.0:  # NaN is in no range
        raise ValueError(f"{op}: top_p must lie in (0, 1] (1 keeps every class), got {value!r}")


def _truncated(rows: Tensor, top_p: float, temperature: float) -> Tensor:
    ordered, place = rows.sort(dim=-1, descending=True, stable=True)
    largest = rows.amax(-1, keepdim=True)  # NaN where the row holds one
    p = (ordered.double() / temperature).softmax(-1)
    before = p.cumsum(-1).sub_(p)
    kept = (before < top_p) | ~largest.isfinite()
    kept[:, 0] = True
    inside = torch.zeros_like(kept).scatter_(1, place, kept)
    return rows.masked_fill(~inside, -math.inf)
