"""Positions in pieces: which of them go through a token network's last layer together, and the way there and back.

A piece holds positions of one or several samples, so many that their logits keep within a number of bytes. Only
positions of weight other than 0 are in pieces: each sample's are moved together in their order, the longest sample
of a piece says how many there are, and the others are filled up with positions of weight 0, whose states are
replaced by zeros. Where a piece is a part of one sample it starts at a multiple of 16 of the positions moved together
(config.h, kPositions), so that sums over positions are cut into the same blocks however long the pieces are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from di4c_ext.ops import native
from di4c_ext.ops.logits import Hidden

_ROWS_AT_ONCE = 8192  # of a head: so many that a product is worth its call, few beside the whole head

Rows: TypeAlias = Tensor | Hidden  # logits (B, N, D, S), there or to be made


class Piece(NamedTuple):
    """Some positions of b samples, c of each."""

    samples: Tensor  # (b,) int64
    positions: Tensor  # (b, c) int64, of the sample
    start: int  # place of the first one among the sample's used positions
    unused: Tensor | None  # (b, c) bool: fills up and is not to be looked at; None where nothing is
    span: tuple[slice, slice] | None  # samples and positions where both are ranges: taken without a copy
    inside: bool  # the target is not looked at

    @property
    def stop(self) -> int:
        return self.start + self.positions.shape[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """b, c"""
        return self.positions.shape[0], self.positions.shape[1]

    @property
    def size(self) -> int:
        """b c"""
        return self.positions.numel()

    def take(self, x: Tensor) -> Tensor:
        """(b, N, c, ...) of x (B, N, D, ...)."""
        return x[self._index(x)]

    def put(self, x: Tensor, value: Tensor) -> None:
        """The reverse of `take`."""
        x[self._index(x)] = value

    def states(self, source: Hidden) -> Tensor:
        """The states as rows (b N c, H), zeros where they are not to be looked at."""
        states = self.take(source.states)
        if self.unused is not None:
            states = states.masked_fill(self.unused[:, None, :, None], 0.0)
        return states.reshape(-1, states.shape[-1])

    def unflat(self, rows: Tensor, n: int) -> Tensor:
        """(b N c, .) as (b, N, c, .)."""
        b, c = self.sizes
        return rows.view(b, n, c, rows.shape[1])

    def _index(self, x: Tensor) -> tuple[slice | Tensor, ...]:
        if self.span is not None:
            return self.span[0], slice(None), self.span[1]
        middle = torch.arange(x.shape[1], device=x.device)
        return self.samples[:, None, None], middle[:, None], self.positions[:, None]


def everything(rows: Rows, weight: Tensor | None) -> Piece:
    """The whole batch as one piece."""
    batch, _, length, _ = rows.shape
    samples, positions = (torch.arange(n, device=rows.device) for n in (batch, length))
    unused = None if weight is None else weight == 0
    return Piece(samples, positions.expand(batch, -1), 0, unused, (slice(None), slice(None)), False)


class Cut(NamedTuple):
    """All pieces of a batch."""

    pieces: list[Piece]
    length: int  # n >= 1: used positions of the longest sample
    weight: Tensor | None  # (B, n), of each sample's used positions moved together and others after them


def cut(rows: Sequence[Rows | None], weight: Tensor | None, inside: Tensor | None, chunk_bytes: int) -> Cut:
    """Cuts a batch into pieces whose logits keep within chunk_bytes, if 16 positions do.

    Samples whose target is not looked at are not put together with others. On CUDA the host waits for the numbers of
    used positions; while a CUDA graph is captured it may not, and every position counts.

    Args:
        rows: logits, teacher and target, those that there are.
        weight: (B, D) or None.
        inside: (B,) or None.
    """
    given = [r for r in rows if r is not None]
    batch, _, length, states = given[0].shape
    device = given[0].device
    position_bytes = sum(r.shape[1] for r in given) * states * max(r.dtype.itemsize for r in given)
    room = max(1, chunk_bytes // max(1, position_bytes) // native.POSITIONS) * native.POSITIONS

    counts, within = [length] * batch, [False] * batch
    known = not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    if known and not (weight is None and inside is None):
        used = torch.full((batch,), length, device=device) if weight is None else (weight != 0).sum(1)
        flags = torch.zeros_like(used) if inside is None else (inside != 0).to(used.dtype)
        counts, numbers = torch.stack([used, flags]).tolist()
        within = [number != 0 for number in numbers]
    n = max([1, *counts])
    order = torch.arange(length, device=device).expand(batch, length)
    if min(counts, default=length) < length:
        assert weight is not None
        order = torch.argsort((weight == 0).to(torch.uint8), dim=1, stable=True)
    order = order[:, :n]
    weight = None if weight is None else weight.gather(1, order)

    # By length, so that little has to be filled up; a stable sort, so that equal samples stay a range.
    samples = sorted(range(batch), key=lambda b: (within[b], counts[b]))
    numbered = torch.arange(batch, device=device)
    if samples != list(range(batch)):
        numbered = torch.tensor(samples, device=device)
    pieces = []
    for i, j, start, stop in _cuts([counts[b] for b in samples], [within[b] for b in samples], room):
        first, chosen = samples[i], numbered[i:j]
        full = counts[first] >= stop  # and so have all others of the piece
        unused = None if weight is None or (full and known) else weight[chosen, start:stop] == 0
        span = None
        if counts[first] == length and samples[i:j] == list(range(first, first + j - i)):
            span = slice(first, first + j - i), slice(start, stop)
        pieces.append(Piece(chosen, order[chosen, start:stop], start, unused, span, within[first]))
    return Cut(pieces, n, weight)


def _cuts(counts: list[int], within: list[bool], room: int) -> Iterator[tuple[int, int, int, int]]:
    """Samples i to j and positions start to stop of each piece; counts do not fall while `within` stays."""
    i = 0
    while i < len(counts):
        j = i + 1
        while j < len(counts) and within[j] == within[i] and (j - i + 1) * counts[j] <= room:
            j += 1
        for start in range(0, counts[j - 1], room):
            yield i, j, start, min(start + room, counts[j - 1])
        i = j


class Buffer:
    """Room for the logits of one piece after the other, taken at first use: fresh memory costs a CPU page faults."""

    def __init__(self, pieces: Sequence[Piece], rows: Rows | None) -> None:
        self._pieces, self._of = pieces, rows
        self._rows: Tensor | None = None

    def rows(self, count: int) -> Tensor:
        """(count, S)"""
        if self._rows is None:
            assert self._of is not None
            largest = max(piece.size for piece in self._pieces) * self._of.shape[1]
            self._rows = torch.empty((largest, self._of.shape[-1]), dtype=self._of.dtype, device=self._of.device)
        return self._rows[:count]


@overload
def logits_of(rows: Rows, piece: Piece, buffer: Buffer, place: Tensor | None = None) -> Tensor: ...


@overload
def logits_of(rows: Rows | None, piece: Piece, buffer: Buffer, place: Tensor | None = None) -> Tensor | None: ...


def logits_of(rows: Rows | None, piece: Piece, buffer: Buffer, place: Tensor | None = None) -> Tensor | None:
    """The piece's logits (b, N, c, S): where they are hidden made in `place` (b N c, S) or else in the buffer, where
    they are there taken."""
    if not isinstance(rows, Hidden):
        return None if rows is None else piece.take(rows)
    states = piece.states(rows)
    out = buffer.rows(states.shape[0]) if place is None else place
    if rows.bias is None:
        torch.mm(states, rows.weight.t(), out=out)
    else:
        torch.addmm(rows.bias, states, rows.weight.t(), out=out)
    if rows.certain is not None:
        settle(out, piece.take(rows.certain).reshape(-1))
    return piece.unflat(out, rows.shape[1])


def settle(rows: Tensor, certain: Tensor) -> None:
    """`logits.settled` of rows (N, S) in place."""
    known, place = (certain >= 0)[:, None], certain.clamp(min=0)[:, None]
    rows.masked_fill_(known, -torch.inf)
    rows.scatter_(1, place, torch.where(known, 0.0, rows.gather(1, place)))


class Gradients:
    """Of logits or states, of the head's weight and of its bias: those that are needed, added up over the pieces."""

    def __init__(self, rows: Rows, needs: Sequence[bool]) -> None:
        self._rows, self._needs = rows, needs
        data = rows.states if isinstance(rows, Hidden) else rows
        self._data = data.new_zeros(data.shape if needs[0] else 0)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, piece: Piece, grad: Tensor) -> None:
        """grad (b N c, S): of the piece's logits."""
        rows = self._rows
        if not isinstance(rows, Hidden):
            piece.put(self._data, piece.unflat(grad, rows.shape[1]))
            return
        if self._needs[0]:
            piece.put(self._data, piece.unflat(torch.mm(grad, rows.weight), rows.shape[1]))
        if self._needs[1]:
            self._weight = _plus_product(self._weight, grad.t(), piece.states(rows))
        if self._needs[2]:
            self._bias = _plus_product(self._bias, grad.new_ones((1, grad.shape[0])), grad)

    def done(self) -> tuple[Tensor, Tensor, Tensor]:
        """Contiguous and in the rows' dtype; those not needed are empty."""
        weight, bias = self._rows[1:3] if isinstance(self._rows, Hidden) else (None, None)
        return self._data, self._sum(self._weight, weight, self._needs[1]), self._sum(self._bias, bias, self._needs[2])

    def _sum(self, total: Tensor | None, like: Tensor | None, needed: bool) -> Tensor:
        if like is None or not needed:
            return self._data.new_empty(0)
        return torch.zeros_like(like) if total is None else total.to(like.dtype).view(like.shape)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b; halves are multiplied as they are and added up in float32, a few rows of `a` at a time."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    for some, sums in zip(a.split(_ROWS_AT_ONCE), total.split(_ROWS_AT_ONCE), strict=True):
        sums.add_(torch.mm(some, b))
    return total
