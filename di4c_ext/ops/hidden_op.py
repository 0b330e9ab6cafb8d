"""The operator behind the from_hidden forms of the mixture's functions: di4c::mixture of logits that are made piece
by piece and forgotten.

Each of logits, teacher and target comes with a head (weight (S, H), bias (S,) or none) and is then hidden states
(B, N, D, H), or comes without and is then logits (B, N, D, S). Those of teacher and target may say what is certain. A
teacher of several components is their mean, made anew in each piece.

Forward: a piece's logits by one matrix product, what its rows say by mixture_positions, and when all pieces are
through, the sums over positions by mixture_finish. Backward: the piece's logits once more, mixture_backward over them
in place, and from this the gradients of states, weight and bias; the last two are summed over the pieces in float32.

As far as the caller gives room, the first pieces keep for backward what it would have to make again: first of all the
log of the target's mean, one row in place of T rows of logits, and in what room remains the student's logits.

What is kept of rows lies in the order of the pieces: each sample's positions of weight other than 0 first (pieces.py).
Where the reference serves, the logits are made whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from di4c_ext.ops import mixture_op, native, pieces, reference
from di4c_ext.ops.hidden_inputs import Inputs, Pass
from di4c_ext.ops.library import register, register_gradient
from di4c_ext.ops.logits import Hidden
from di4c_ext.ops.pieces import Buffer, Gradients

_GIVEN = len(Inputs._fields)


def _mixture_hidden(*arguments: Any) -> tuple[Tensor, ...]:
    given, (information, chunk_bytes, _) = Inputs(*arguments[:_GIVEN]), arguments[_GIVEN:]
    *out, kept, kept_target = _fake(*arguments)
    mixture_op.check_values(kept.shape[1], given.teacher, given.first, given.tokens, given.weight)
    run = given.kernels()
    with torch.autocast(given.logits.device.type, enabled=False):
        if run is not None:
            _forward(run, Pass(given, chunk_bytes, kept, kept_target), information, out)
            return *out, kept, kept_target
        _, x, teacher, target = given.whole()
        tokens = mixture_op.stacked(given.first, given.tokens)
        values = reference.mixture_forward(x, teacher, target, tokens, given.inside, given.weight, information)
    for place, value in zip(out, values, strict=True):
        place.copy_(value)
    return *out, kept.copy_(x.reshape(-1, x.shape[-1])[: kept.shape[0]]), kept_target.zero_()


def _forward(run: native.Kernels, whole: Pass, information: bool, out: list[Tensor]) -> None:
    """Fills the outputs of di4c::mixture, and the logits kept."""
    given, length = whole.given, whole.cut.length
    n = whole.sizes(given.logits.shape[0], length, whole.given.target)
    work = torch.zeros((n.B, _blocks(length), n.L + 1, n.K), dtype=torch.float64, device=whole.x.device)
    row = out[2].new_zeros((mixture_op.PARTS, n.B, length))
    of_rows = *out[3:6], out[7]
    for value in of_rows:
        value.zero_()
    scratch = Buffer([piece for piece, place, _ in whole.pieces() if place is None], whole.x)
    for piece, place, place_target in whole.pieces():
        x, small = pieces.logits_of(whole.x, piece, scratch, place), whole.positions(piece)
        teacher, target = whole.teacher(piece), whole.target(piece)
        m = whole.sizes(*piece.sizes, target)
        mine = mixture_op.empty_outputs(x, teacher, target, *small, None, information)
        my_work, my_row = work.new_empty((m.B, _blocks(m.D), *work.shape[2:])), row.new_empty((len(row), m.B, m.D))
        described = mixture_op.describe_rows(x, teacher, target, None)
        names = ("mixture_positions",)
        mixture_op.run_forward(run, names, described, *small, mine, my_work, my_row, information, m)
        block, span = piece.start // native.POSITIONS, slice(piece.start, piece.stop)
        work[piece.samples, block : block + my_work.shape[1]] = my_work
        row[:, piece.samples, span] = my_row
        for value, of_piece in zip(of_rows, (*mine[3:6], mine[7]), strict=True):
            if of_piece.numel() > 0:
                value[:, piece.samples, :, span] = of_piece
        if target is not None and place_target is not None:
            _log_mean(target, mine[5], place_target)
    nothing = mixture_op.describe_rows(None, None, None, None)
    names = ("mixture_finish",)
    mixture_op.run_forward(
        run, names, nothing, None, None, given.inside, whole.cut.weight, tuple(out), work, row, information, n
    )


def _log_mean(target: Tensor, lse: Tensor, out: Tensor) -> None:
    """log mean_t p_t in float32, (b c, S), of logits (b, T, c, S) and their planes (2, b, T, c)."""
    b, T, c, S = target.shape
    mean = out.view(b, c, S).zero_()
    p = torch.empty_like(mean)
    for t in range(T):
        torch.sub(target[:, t], lse[0, :, t, :, None], out=p)
        mean += p.sub_(lse[1, :, t, :, None]).exp_()
    mean.div_(T).log_()


def _blocks(length: int) -> int:
    return -(-length // native.POSITIONS)


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    """The outputs of di4c::mixture, and room for the logits (rows, S) and targets (rows, S) kept: all that there may be
    if keep_bytes allows."""
    given, (information, _, keep_bytes) = Inputs(*arguments[:_GIVEN]), arguments[_GIVEN:]
    x, _, target = given.rows()
    batch, components, length, states = x.shape
    rows = min(batch * length, keep_bytes // (4 * states)) if isinstance(target, Hidden) else 0
    kept_target = given.logits.new_empty((rows, states), dtype=torch.float32)
    left = keep_bytes - 4 * states * rows
    rows = min(batch * components * length, left // (x.dtype.itemsize * states)) if isinstance(x, Hidden) else 0
    kept = given.logits.new_empty((rows, states))
    seven = given.logits, given.teacher, given.target, *given[-4:]
    return *mixture_op.empty_outputs(*seven, None, information), kept, kept_target


def _mixture_hidden_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the logits or states, of the head's weight and of its bias; empty ones where not needed."""
    given, rest = Inputs(*arguments[3 : 3 + _GIVEN]), arguments[3 + _GIVEN :]
    *of_rows, kept, kept_target, chunk_bytes, needs = rest
    gradients = Gradients(given.rows()[0], needs)
    run = given.kernels()
    with torch.autocast(given.logits.device.type, enabled=False):
        if run is not None:
            _backward(run, Pass(given, chunk_bytes, kept, kept_target), arguments[:3], tuple(of_rows), gradients)
        else:
            piece, *rows = given.whole()
            tokens = mixture_op.stacked(given.first, given.tokens)
            inputs = *arguments[:3], *rows, tokens, given.inside, given.weight, *of_rows
            grad = reference.mixture_backward(*inputs)
            gradients.add(piece, grad.reshape(-1, grad.shape[-1]))
    return gradients.done()


def _backward(
    run: native.Kernels, whole: Pass, grads: tuple[Tensor, ...], of_rows: tuple[Tensor, ...], gradients: Gradients
) -> None:
    """Adds up the gradients piece by piece; that of a piece's logits takes the place of the logits made for it."""
    grad_joint, grad_correlation, grad_parts = grads
    joint, correlation, lse, lse_teacher, lse_target, share, pull = of_rows
    scratch = Buffer(whole.cut.pieces, whole.x)
    for piece, place, place_target in whole.pieces():
        grad = scratch.rows(piece.size * whole.x.shape[1])
        x = pieces.logits_of(whole.x, piece, scratch) if place is None else piece.unflat(place, whole.x.shape[1])
        samples, span = piece.samples, slice(piece.start, piece.stop)
        *my_lse, my_pull = (value[:, samples, :, span] for value in (lse, lse_teacher, lse_target, pull))
        if place_target is None:
            target = whole.target(piece)
        else:  # a product whose rows are normalised: both planes are 0
            target, my_lse[2] = piece.unflat(place_target, 1), torch.zeros_like(my_lse[2][:, :, :1])
        teacher, small = whole.teacher(piece), whole.positions(piece)
        my_grads = grad_joint[samples], grad_correlation[samples], grad_parts[:, samples]
        described = mixture_op.describe_rows(x, teacher, target, None)
        m = whole.sizes(*piece.sizes, target)
        kept = joint[samples], correlation[samples], *my_lse, share[samples], my_pull
        mixture_op.run_backward(run, my_grads, described, *small, kept, grad, m)
        gradients.add(piece, grad)


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, needs = Inputs(*arguments[3 : 3 + _GIVEN]), arguments[-1]
    nothing = given.logits.new_empty(0)
    data, weight, bias = (
        nothing.new_empty(x.shape) if x is not None and needed else nothing.new_empty(0)
        for x, needed in zip(given[:3], needs, strict=True)
    )
    return data, weight, bias


_INPUTS = ", ".join(f"Tensor{'' if name == 'logits' else '?'} {name}" for name in Inputs._fields)
_KEPT = "Tensor lse, Tensor lse_teacher, Tensor lse_target, Tensor share, Tensor pull"

register(
    f"mixture_hidden({_INPUTS}, bool information, int chunk_bytes, int keep_bytes) -> "
    f"(Tensor joint, Tensor correlation, Tensor parts, {_KEPT}, Tensor kept, Tensor kept_target)",
    _mixture_hidden,
    _fake,
)
register(
    f"mixture_hidden_backward(Tensor grad_joint, Tensor grad_correlation, Tensor grad_parts, {_INPUTS}, "
    f"Tensor joint, Tensor correlation, {_KEPT}, Tensor kept, "
    "Tensor kept_target, int chunk_bytes, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _mixture_hidden_backward,
    _backward_fake,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.chunk_bytes, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.shapes = [value.shape for value in output[:3]]
    ctx.save_for_backward(*tensors, *output[:2], *output[3:])


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    lse = saved[_GIVEN + 2]
    given = [lse.new_zeros(n) if g is None else g for g, n in zip(grads[:3], ctx.shapes, strict=True)]
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.di4c.mixture_hidden_backward(*given, *saved, ctx.chunk_bytes, needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *[None] * _GIVEN


register_gradient("mixture_hidden", "mixture_objective", _gradient, _keep)
