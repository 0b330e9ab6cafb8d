"""Divergences and cross entropy of single rows, summed per sample over the positions that count.

Positions of weight 0 are neither read nor moved, a sample without any other is 0, and the target is a constant.
With logits of one student (B, D, S) the result is (B,); with L of them (B, L, D, S), which share the target, (B, L).
Equations in ops/reference/masked.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register, register_gradient
from di4c_ext.ops.reference.masked import CROSS_ENTROPY, FORWARD, JENSEN_SHANNON, REVERSE, TOTAL_VARIATION

_NAMES = ("masked_kl", "masked_reverse_kl", "masked_js", "masked_tv", "masked_cross_entropy")
_LETTERS = "(B, D, S) or (B, L, D, S)"


def masked_kl(target: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_d w KL(softmax target || softmax logits): the divergence of distillation.

    Args:
        target: (B, D, S), a constant, any floating dtype.
        logits: (B, D, S) or (B, L, D, S).
        weight: (B, D) >= 0, or None for 1; rows of weight 0 are not read and their gradient is exactly 0.

    Returns:
        (B,) or (B, L), float32 (float64 for float64 logits), differentiable in the logits; inf where the target
        has a class the logits do not have, NaN for a sample with a bad row.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; a target that requires grad.
    """
    return _divergence(FORWARD, target, logits, weight)


def masked_reverse_kl(target: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_d w KL(softmax logits || softmax target); arguments, result and errors as for `masked_kl`."""
    return _divergence(REVERSE, target, logits, weight)


def masked_js(target: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_d w (KL(t || m) + KL(p || m)) / 2 with m = (t + p) / 2: at most ln 2 per position.

    Arguments, result and errors as for `masked_kl`.
    """
    return _divergence(JENSEN_SHANNON, target, logits, weight)


def masked_tv(target: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_d w |t - p|_1 / 2, the total variation: at most 1 per position; the slope at t = p is taken as 0.

    Arguments, result and errors as for `masked_kl`.
    """
    return _divergence(TOTAL_VARIATION, target, logits, weight)


def masked_cross_entropy(logits: Tensor, tokens: Tensor, weight: Tensor | None = None) -> Tensor:
    """- sum_d w log softmax(logits)[tokens].

    Args:
        logits: (B, D, S) or (B, L, D, S).
        tokens: (B, D) int64, in [0, S) wherever the weight is not 0.
        weight: (B, D) >= 0, or None for 1; rows of weight 0 are not read and their gradient is exactly 0.

    Returns:
        (B,) or (B, L), float32 (float64 for float64 logits), differentiable in the logits.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; for tokens outside [0, S) and
        negative weights on the CPU only. On CUDA such a token makes its sample's value NaN.
    """
    op = _NAMES[CROSS_ENTROPY]
    x = checks.logits(op, "logits", logits, (3, 4), _LETTERS)
    checks.indices(op, "tokens", tokens, (x.shape[0], x.shape[-2]), "(B, D)", x)
    return _call(CROSS_ENTROPY, None, tokens, x, checks.weight(op, weight, x))


def _divergence(kind: int, target: Tensor, logits: Tensor, weight: Tensor | None) -> Tensor:
    op = _NAMES[kind]
    x = checks.logits(op, "logits", logits, (3, 4), _LETTERS)
    y = checks.target(op, target, (3,), "(B, D, S)", x)
    return _call(kind, y, None, x, checks.weight(op, weight, x))


def _call(kind: int, target: Tensor | None, tokens: Tensor | None, x: Tensor, weight: Tensor | None) -> Tensor:
    if x.dim() == 4:
        return torch.ops.di4c.row_loss(kind, target, tokens, x, weight)[0]
    return torch.ops.di4c.row_loss(kind, target, tokens, x.unsqueeze(1), weight)[0].squeeze(1)


def _row_loss(
    kind: int, target: Tensor | None, tokens: Tensor | None, logits: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    checks.weight_values(_NAMES[kind], weight)
    if tokens is not None:
        checks.token_values(_NAMES[kind], tokens, weight, logits.shape[-1])
    run = native.kernels(logits, target)
    loss, stats = _row_loss_fake(kind, target, tokens, logits, weight)
    if run is None:
        value, kept = reference.row_loss_forward(kind, target, tokens, logits, weight)
        return value.to(loss.dtype), kept.to(stats.dtype)
    B, L, D, S = logits.shape
    x = native.rows(logits)
    y = None if target is None else native.rows(target)
    run(
        "row_loss",
        kind=kind,
        **native.describe("target", y),
        tokens=native.dense(tokens),
        **native.describe("logits", x),
        weight=native.dense(weight),
        loss=loss,
        stats=stats,
        row=logits.new_empty((B, L, D), dtype=torch.float32),
        **native.split_workspace(x, B * L * D, S, 32),
        B=B,
        L=L,
        D=D,
        S=S,
    )
    return loss, stats


def _row_loss_fake(
    kind: int, target: Tensor | None, tokens: Tensor | None, logits: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, L, D, _ = logits.shape
    dtype = checks.sum_dtype(logits)
    return logits.new_empty((B, L), dtype=dtype), logits.new_empty((5, B, L, D), dtype=dtype)


def _row_loss_backward(
    grad_loss: Tensor,
    kind: int,
    target: Tensor | None,
    tokens: Tensor | None,
    logits: Tensor,
    weight: Tensor | None,
    stats: Tensor,
) -> Tensor:
    run = native.kernels(logits, target)
    if run is None:
        return reference.row_loss_backward(grad_loss, kind, target, tokens, logits, weight, stats)
    B, L, D, S = logits.shape
    grad = logits.new_empty((B, L, D, S))
    x = native.rows(logits)
    y = None if target is None else native.rows(target)
    run(
        "row_loss_backward",
        kind=kind,
        **native.describe("target", y),
        tokens=native.dense(tokens),
        **native.describe("logits", x),
        weight=native.dense(weight),
        stats=native.dense(stats),
        grad_loss=native.dense(grad_loss),
        grad=grad,
        B=B,
        L=L,
        D=D,
        S=S,
    )
    return grad


register(
    "row_loss(int kind, Tensor? target, Tensor? tokens, Tensor logits, Tensor? weight) -> (Tensor, Tensor)",
    _row_loss,
    _row_loss_fake,
)
register(
    "row_loss_backward(Tensor grad_loss, int kind, Tensor? target, Tensor? tokens, Tensor logits, Tensor? weight, "
    "Tensor stats) -> Tensor",
    _row_loss_backward,
    lambda grad_loss, kind, target, tokens, logits, *_: logits.new_empty(logits.shape),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    kind, target, tokens, logits, weight = inputs
    ctx.kind = kind
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(target, tokens, logits, weight, output[1])


def _gradient(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    grad = torch.ops.di4c.row_loss_backward(grad_loss, ctx.kind, *ctx.saved_tensors)
    return None, None, None, grad, None


register_gradient("row_loss", "row_loss", _gradient, _keep)
