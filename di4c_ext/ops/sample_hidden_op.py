"""The operator behind draws from rows that are made piece by piece: of hidden states and a head, or truncated logits.

Only rows that are drawn from are made: not those whose class is certain, and of an absorbing step only those that one
of the draws unmasks; the coins that say so hang on the keys alone. The rows of a piece are made together in one matrix
product, moved to their places among rows that are not there, and di4c::sample draws from them, which reads no others.
To know which rows there are the host waits for the device, but not while a CUDA graph is captured: there every row is
made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from di4c_ext.ops import categorical_op, native, reference
from di4c_ext.ops.library import register
from di4c_ext.ops.logits import settled
from di4c_ext.ops.pieces import settle
from di4c_ext.ops.reference.philox import COIN, philox, stream_word, unit_double
from di4c_ext.ops.truncation import nucleus

_LEAST_ROWS = 16


class _Piece(NamedTuple):
    """Rows samples x positions, and where those that are made lie among all such rows of the batch."""

    samples: slice
    positions: slice
    start: int  # of its rows among those made
    stop: int


def _sample_hidden(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    certain: Tensor | None,
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    top_p: float,
    with_log_prob: bool,
    first: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """states (B, D, H), or without a weight logits (B, D, S) -> tokens (B, draws, D) and their log-probabilities."""
    categorical_op.check_probabilities(unmask_prob)
    run = native.kernels(states)
    S = states.shape[2] if weight is None else weight.shape[0]
    with torch.autocast(states.device.type, enabled=False):
        if run is None:
            x = states if weight is None else linear(states, weight, bias)
            x = _truncated(x if certain is None else settled(x, certain), mask_id, top_p, temperature)
            tokens, log_prob = reference.sample(x, keys, x_t, unmask_prob, mask_id, draws, stream, temperature, first)
            return tokens, log_prob if with_log_prob else log_prob.new_empty(0)
        out = _fake(states, weight, bias, certain, keys, x_t, unmask_prob, mask_id, draws, stream, temperature, top_p,
                    with_log_prob, first, chunk_bytes)  # fmt: skip
        if out[0].numel() == 0:
            return out
        fill = certain
        if x_t is None and certain is not None:
            # A step in which all that is not certain is unmasked; S is no class.
            mask_id, fill = S, None
            x_t = torch.where(certain < 0, S, certain)
            unmask_prob = torch.ones(len(keys), dtype=torch.float64, device=keys.device)
        wanted = _wanted(keys, x_t, unmask_prob, mask_id, draws, stream, first)
        room = max(_LEAST_ROWS, chunk_bytes // (S * states.element_size()) // (1 if wanted is None else 2))
        maker = _Maker(states, weight, bias, fill, (mask_id, top_p, temperature), wanted, room)
        for piece, x in maker.pieces():
            mine = None if x_t is None else x_t[piece.samples, piece.positions]
            coins = None if unmask_prob is None else unmask_prob[piece.samples]
            drawn_here = categorical_op.draw(
                run,
                x,
                keys[piece.samples],
                mine,
                coins,
                mask_id,
                draws,
                stream,
                temperature,
                with_log_prob,
                first + piece.positions.start,
            )
            for value, drawn in zip(out, drawn_here, strict=True):
                if drawn.numel() > 0:
                    value[piece.samples, :, piece.positions] = drawn
    return out


def _wanted(
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    first: int,
) -> Tensor | None:
    """(B, D) bool, the rows that some draw reads; None for all of them."""
    if x_t is None or unmask_prob is None or (x_t.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    position = torch.arange(first, first + x_t.shape[1], device=x_t.device)
    draw = torch.arange(draws, device=x_t.device)[:, None]
    coin = unit_double(philox(keys[:, None, None], position, draw, stream_word(stream, COIN))[0])  # (B, draws, D)
    return (x_t == mask_id) & (coin < unmask_prob[:, None, None]).any(1)


def _truncated(rows: Tensor, mask_id: int, top_p: float, temperature: float) -> Tensor:
    """The nuclei of rows (..., S), of what may be drawn: without class mask_id, which the draw itself leaves out."""
    if top_p == 1:
        return rows
    if 0 <= mask_id < rows.shape[-1]:
        rows = torch.where(torch.arange(rows.shape[-1], device=rows.device) == mask_id, -torch.inf, rows)
    return nucleus(rows, top_p, temperature=temperature)


class _Maker:
    """Makes the rows that are wanted, in pieces of at most `room` rows; truncation: what `_truncated` is told."""

    def __init__(
        self,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        certain: Tensor | None,
        truncation: tuple[int, float, float],
        wanted: Tensor | None,
        room: int,
    ) -> None:
        self._states, self._weight, self._bias, self._certain = states, weight, bias, certain
        self._truncation, self._room = truncation, room
        self._S = states.shape[2] if weight is None else weight.shape[0]
        self._flat = None if wanted is None else wanted.flatten()

    def pieces(self) -> Iterator[tuple[_Piece, Tensor]]:
        """Each piece with its logits (b, c, S), in which rows that nobody wants hold anything."""
        cuts = self._cuts()
        place = self._states.new_empty((max(_count(piece) for piece in cuts), self._S))
        if self._flat is None:
            for piece in cuts:
                made = self._made(piece.samples, piece.positions, place)
                yield piece, made.view(-1, piece.positions.stop - piece.positions.start, self._S)
            return
        rows = self._flat.nonzero()[:, 0]
        groups = list(_groups(cuts, self._room))
        beside = self._states.new_empty((max(group[-1].stop - group[0].start for group in groups), self._S))
        for group in groups:
            start = group[0].start
            mine = rows[start : group[-1].stop]
            b, d = mine // self._states.shape[1], mine % self._states.shape[1]
            made = self._made(b, d, beside)
            for piece in group:
                here, width = place[: _count(piece)], piece.positions.stop - piece.positions.start
                some = slice(piece.start - start, piece.stop - start)
                at = (b[some] - piece.samples.start) * width + d[some] - piece.positions.start
                here.index_copy_(0, at, made[some])
                yield piece, here.view(-1, width, self._S)

    def _made(self, b: slice | Tensor, d: slice | Tensor, place: Tensor) -> Tensor:
        """The logits (n, S) of some rows, truncated; in `place`, where it takes a product to make them."""
        x = self._states[b, d].flatten(0, -2)
        if self._weight is not None:
            made = place[: len(x)]
            if self._bias is None:
                x = torch.mm(x, self._weight.t(), out=made)
            else:
                x = torch.addmm(self._bias, x, self._weight.t(), out=made)
        if self._certain is not None:
            settle(x, self._certain[b, d].flatten())
        return _truncated(x, *self._truncation)

    def _cuts(self) -> list[_Piece]:
        batch, length, _ = self._states.shape
        samples = max(1, self._room // length)
        spans = [
            (slice(b, min(b + samples, batch)), slice(d, min(d + self._room, length)))
            for b in range(0, batch, samples)
            for d in range(0, length, self._room)
        ]
        if self._flat is None:
            return [_Piece(*span, 0, 0) for span in spans]
        # Pieces follow each other in the order of rows, so that a piece's end is the number of rows up to it.
        ends = torch.tensor([(b.stop - 1) * length + d.stop - 1 for b, d in spans]).to(self._flat.device)
        stops = self._flat.cumsum(0)[ends].tolist()
        return [_Piece(*span, start, stop) for span, start, stop in zip(spans, [0, *stops], stops, strict=False)]


def _count(piece: _Piece) -> int:
    """Rows of a piece, those that are not made among them."""
    return (piece.samples.stop - piece.samples.start) * (piece.positions.stop - piece.positions.start)


def _groups(cuts: list[_Piece], room: int) -> Iterator[list[_Piece]]:
    """Neighbouring pieces of together at most `room` rows to be made."""
    group: list[_Piece] = []
    for piece in cuts:
        if group and piece.stop - group[0].start > room:
            yield group
            group = []
        group.append(piece)
    yield group


def _fake(
    states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    certain: Tensor | None,
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    top_p: float,
    with_log_prob: bool,
    first: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    shape = (states.shape[0], draws, states.shape[1])
    log_prob = states.new_empty(shape if with_log_prob else (0,), dtype=torch.float32)
    return states.new_empty(shape, dtype=torch.int64), log_prob


register(
    "sample_hidden(Tensor states, Tensor? weight, Tensor? bias, Tensor? certain, Tensor keys, Tensor? x_t, "
    "Tensor? unmask_prob, int mask_id, SymInt draws, int stream, float temperature, float top_p, bool with_log_prob, "
    "SymInt first, int chunk_bytes) -> (Tensor, Tensor)",
    _sample_hidden,
    _fake,
)
