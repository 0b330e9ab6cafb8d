"""What the operator di4c::mixture_hidden is given, and how forward and backward go through it piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from di4c_ext.ops import native, pieces
from di4c_ext.ops.logits import Hidden
from di4c_ext.ops.mixture_op import Sizes, count_sequences
from di4c_ext.ops.pieces import Buffer, Piece, Rows


class Inputs(NamedTuple):
    """The operator's tensors: three kinds of rows (B, N, D, .) with their heads, and what belongs to positions."""

    logits: Tensor
    logits_weight: Tensor | None
    logits_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_certain: Tensor | None
    target: Tensor | None
    target_weight: Tensor | None
    target_bias: Tensor | None
    target_certain: Tensor | None
    first: Tensor | None
    tokens: Tensor | None
    inside: Tensor | None
    weight: Tensor | None

    def rows(self) -> tuple[Rows, Rows | None, Rows | None]:
        """Logits, teacher and target, each a tensor of logits or a Hidden."""
        x = _rows(*self[:3], None)
        teacher = None if self.teacher is None else _rows(*self[3:7])  # type: ignore[arg-type]
        target = None if self.target is None else _rows(*self[7:11])  # type: ignore[arg-type]
        return x, teacher, target

    def kernels(self) -> native.Kernels | None:
        return native.kernels(self.logits, self.teacher, self.target)

    def whole(self) -> tuple[Piece, Tensor, Tensor | None, Tensor | None]:
        """What the reference takes: everything as one piece, and its logits, teacher (B, D, S) and target."""
        rows = self.rows()
        piece = pieces.everything(rows[0], self.weight)
        x, teacher, target = (pieces.logits_of(r, piece, Buffer([piece], r)) for r in rows)
        assert x is not None
        return piece, x, None if teacher is None else _mean(teacher).squeeze(1), target


def _rows(data: Tensor, weight: Tensor | None, bias: Tensor | None, certain: Tensor | None) -> Rows:
    return data if weight is None else Hidden(data, weight, bias, certain)


def _mean(teacher: Tensor) -> Tensor:
    """The logits of a teacher of T components (b, T, c, S) as those of their mean (b, 1, c, S), float32 at least."""
    T = teacher.shape[1]
    if T == 1:
        return teacher
    total: Tensor | None = None
    for number in range(T):
        one = teacher[:, number].to(torch.promote_types(teacher.dtype, torch.float32)).log_softmax(-1)
        total = one if total is None else torch.logaddexp(total, one, out=total)
    assert total is not None
    return total.sub_(math.log(T)).unsqueeze(1)


class Pass:
    """What forward and backward do alike with one piece after the other."""

    def __init__(self, given: Inputs, chunk_bytes: int, kept: Tensor, kept_target: Tensor) -> None:
        self.given, self._kept, self._kept_target = given, kept, kept_target
        self.x, self._teacher, self._target = given.rows()
        inside = None if given.target is None else given.inside
        self.cut = pieces.cut([self.x, self._teacher, self._target], given.weight, inside, chunk_bytes)
        self._buffers = [Buffer(self.cut.pieces, rows) for rows in (self._teacher, self._target)]

    def sizes(self, b: int, d: int, target: Rows | None) -> Sizes:
        _, L, _, S = self.x.shape
        sequences = count_sequences(self.given.first, self.given.tokens)
        return Sizes(b, L, d, S, sequences, 0 if target is None else target.shape[1])

    def pieces(self) -> Iterator[tuple[Piece, Tensor | None, Tensor | None]]:
        """Each piece, its place (b L c, S) among the logits kept and (b c, S) among the targets kept, if it has one."""
        used = used_target = 0
        for piece in self.cut.pieces:
            place, used = _next(self._kept, used, piece.size * self.x.shape[1])
            wanted = 0 if piece.inside else piece.size
            place_target, used_target = _next(self._kept_target, used_target, wanted)
            yield piece, place, place_target

    def teacher(self, piece: Piece) -> Tensor | None:
        """(b, 1, c, S) of the piece."""
        made = pieces.logits_of(self._teacher, piece, self._buffers[0])
        return None if made is None else _mean(made)

    def target(self, piece: Piece) -> Tensor | None:
        """(b, T, c, S) of the piece, where it is looked at."""
        return None if piece.inside else pieces.logits_of(self._target, piece, self._buffers[1])

    def positions(self, piece: Piece) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The piece's first tokens (b, c) and other ones (b, K, c), inside (b,) and weight (b, c)."""
        first, tokens, inside, weight = self.given.first, self.given.tokens, self.given.inside, self.cut.weight
        return (
            None if first is None else piece.take(first[:, None]).squeeze(1),
            None if tokens is None else piece.take(tokens),
            None if inside is None else inside[piece.samples],
            None if weight is None else weight[piece.samples, piece.start : piece.stop],
        )


def _next(kept: Tensor, used: int, rows: int) -> tuple[Tensor | None, int]:
    """So many rows of `kept` after those used, if there are as many and any are wanted; how many are used then."""
    end = used + rows
    return (kept[used:end], end) if rows > 0 and end <= kept.shape[0] else (None, used)
