"""A denoiser called on a few of its rows at a time, so that the activations of those few live at once.

A mixture's loss joins all L latents of a sample, its log-mean-exp stands between them; but what it joins is the
network's outputs, which are small where a head is a logistic or not yet applied. So forward, the rows are computed
piece by piece, their activations forgotten and their outputs kept; the loss of all outputs together gives each piece
its exact gradient; and backward, piece by piece, the activations are made again and that gradient goes through them.
It costs one forward more. torch.utils.checkpoint is what forgets and makes again: it gives both forwards the same
state of torch's generators, so the same dropout, and the same autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from di4c_ext.ops import Hidden, Logistic, Logits


def in_pieces(call: Callable[..., Logits], size: int | None, dim: int, /, *rows: Tensor, **named: Tensor) -> Logits:
    """call(*rows, **named), `size` of their rows along dim at a time: logits with the same rows in the same places.

    Equal to the call at once wherever a row's output hangs on that row alone, gradients included, up to the order of
    sums. Where no graph is made the pieces are only computed. size None, or no less than there are: at once.
    """
    given = [*rows, *named.values()]
    if size is None or size >= given[0].shape[dim]:
        return call(*rows, **named)

    def run(*piece: Tensor) -> Logits:
        return call(*piece[: len(rows)], **dict(zip(named, piece[len(rows) :], strict=True)))

    pieces = zip(*(x.split(size, dim) for x in given), strict=True)
    if not torch.is_grad_enabled():
        return joined([run(*piece) for piece in pieces], dim)
    # All by position: from these it learns the device whose generator it keeps.
    return joined([checkpoint(run, *piece, use_reentrant=False) for piece in pieces], dim)


def joined(pieces: Sequence[Any], dim: int) -> Logits:
    """One value of the pieces' kind, laid end to end along dim of the logits. A Hidden's head is that of the first."""
    first = pieces[0]
    if isinstance(first, Logistic):
        mean, log_scale = (torch.cat(values, dim) for values in list(zip(*pieces, strict=True))[:2])
        return Logistic(mean, log_scale, first.num_states)
    if isinstance(first, Hidden):
        certain = None if first.certain is None else torch.cat([piece.certain for piece in pieces], dim)
        return first._replace(states=torch.cat([piece.states for piece in pieces], dim), certain=certain)
    return torch.cat(list(pieces), dim)
