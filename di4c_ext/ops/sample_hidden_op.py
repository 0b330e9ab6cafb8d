"""The operator behind sample_categorical_from_hidden: di4c::sample of logits that are made piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops import categorical_op, native, pieces, reference
from di4c_ext.ops.library import register
from di4c_ext.ops.logits import Hidden
from di4c_ext.ops.pieces import Buffer


def _sample_hidden(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    draws: int,
    stream: int,
    temperature: float,
    with_log_prob: bool,
    first: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """states (B, D, H) -> tokens (B, draws, D) and their log-probabilities, or an empty tensor."""
    rows = Hidden(states.unsqueeze(1), weight, bias)
    out = _fake(states, weight, bias, keys, draws, stream, temperature, with_log_prob, first, chunk_bytes)
    run = native.kernels(states)
    with torch.autocast(states.device.type, enabled=False):
        if run is None:
            piece = pieces.everything(rows, None)
            x = pieces.logits_of(rows, piece, Buffer([piece], rows))
            tokens, log_prob = reference.sample(x.squeeze(1), keys, None, None, -1, draws, stream, temperature, first)
            return tokens, log_prob if with_log_prob else out[1]
        cut = pieces.cut([rows], None, None, chunk_bytes)
        buffer = Buffer(cut.pieces, rows)
        for piece in cut.pieces:
            x = pieces.logits_of(rows, piece, buffer).squeeze(1)
            mine, position = keys[piece.samples], first + piece.start
            drawn_here = categorical_op.draw(
                run, x, mine, None, None, -1, draws, stream, temperature, with_log_prob, position
            )
            for value, drawn in zip(out, drawn_here, strict=True):
                if drawn.numel() > 0:
                    piece.put(value, drawn)
    return out


def _fake(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    keys: Tensor,
    draws: int,
    stream: int,
    temperature: float,
    with_log_prob: bool,
    first: int,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    shape = (states.shape[0], draws, states.shape[1])
    log_prob = states.new_empty(shape if with_log_prob else (0,), dtype=torch.float32)
    return states.new_empty(shape, dtype=torch.int64), log_prob


register(
    "sample_hidden(Tensor states, Tensor weight, Tensor? bias, Tensor keys, SymInt draws, int stream, "
    "float temperature, bool with_log_prob, SymInt first, int chunk_bytes) -> (Tensor, Tensor)",
    _sample_hidden,
    _fake,
)
