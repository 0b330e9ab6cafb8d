"""The operator behind the mixture's public functions: one forward and one backward, each input optional.

One read of the logits forward, one read and one write backward; kept between the two are the inputs themselves and
tensors of the size of rows (B, L, D), never anything of the logits' size. Equations in ops/reference/objective.py and
csrc/include/di4c/api.h, what the planes of a kept log-sum-exp hold in ops/reference/mixture.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register, register_gradient
from di4c_ext.ops.reference.objective import packed_gradient, unpacked

PARTS = 4  # api.h: Part


class Sizes(NamedTuple):
    """The numbers of api.h's structs; K and T are 0 without sequences or target, S is not 2 for logistic logits."""

    B: int
    L: int
    D: int
    S: int
    K: int
    T: int


def count_sequences(first: Tensor | None, tokens: Tensor | None) -> int:
    """K of tokens (B, K, D), and the one (B, D) before them."""
    return (first is not None) + (0 if tokens is None else tokens.shape[1])


def stacked(first: Tensor | None, tokens: Tensor | None) -> Tensor | None:
    """The same as one tensor (B, K, D), which the reference takes and the kernels do without."""
    if first is None:
        return tokens
    return first[:, None] if tokens is None else torch.cat([first[:, None], tokens], 1)


def sizes_of(
    logits: Tensor, target: Tensor | None, first: Tensor | None, tokens: Tensor | None, logistic_states: int | None
) -> Sizes:
    B, L, D, S = logits.shape
    K, T = count_sequences(first, tokens), 0 if target is None else target.shape[1]
    return Sizes(B, L, D, S if logistic_states is None else logistic_states, K, T)


def describe_rows(
    logits: Tensor | None, teacher: Tensor | None, target: Tensor | None, logistic_states: int | None
) -> dict[str, Tensor | int]:
    """The three Logits fields; the tensors in it must be kept alive while a kernel runs."""
    fields: dict[str, Tensor | int] = {}
    for name, value in (("logits", logits), ("teacher", teacher), ("target", target)):
        rows = None if value is None else native.rows(value)
        fields.update(native.describe(name, rows, logistic_states is not None))
    return fields


def _mixture(
    logits: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    first: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    logistic_states: int | None,
    information: bool,
) -> tuple[Tensor, ...]:
    n = sizes_of(logits, target, first, tokens, logistic_states)
    check_values(n.S, teacher, first, tokens, weight)
    out = empty_outputs(logits, teacher, target, first, tokens, inside, weight, logistic_states, information)
    run = native.kernels(logits, teacher, target)
    if run is None:
        x, y, z = _as_logits(logits, teacher, target, logistic_states)
        values = reference.mixture_forward(x, y, z, stacked(first, tokens), inside, weight, information)
        # The reference accumulates a float64 target in float64; results follow the logits all the same.
        return tuple(value.to(like.dtype) for value, like in zip(values, out, strict=True))
    blocks = -(-n.D // native.POSITIONS)
    work = logits.new_empty((n.B, blocks, n.L + 1, n.K), dtype=torch.float64)
    row = logits.new_empty((PARTS, n.B, n.D), dtype=torch.float32)
    rows = describe_rows(logits, teacher, target, logistic_states)
    names = "mixture_positions", "mixture_finish"
    run_forward(run, names, rows, first, tokens, inside, weight, out, work, row, information, n)
    return out


def run_forward(
    run: native.Kernels,
    names: tuple[str, ...],
    rows: dict[str, Tensor | int],
    first: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    out: tuple[Tensor, ...],
    work: Tensor,
    row: Tensor,
    information: bool,
    n: Sizes,
) -> None:
    """Kernels of MixtureArgs (api.h), on the op's eight outputs and the workspaces; mixture_finish reads no rows."""
    joint, correlation, parts, lse, lse_teacher, lse_target, share, pull = out
    run(
        *names,
        **rows,
        **native.describe_sequences("first", first),
        **native.describe_sequences("tokens", tokens),
        inside=native.dense(inside),
        weight=native.dense(weight),
        joint=joint,
        correlation=correlation,
        parts=parts,
        lse=lse,
        lse_teacher=lse_teacher,
        lse_target=lse_target,
        share=share,
        pull=pull,
        work=work,
        row=row,
        information=int(information),
        **n._asdict(),
    )


def _as_logits(
    logits: Tensor, teacher: Tensor | None, target: Tensor | None, logistic_states: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the reference takes."""
    if logistic_states is None:
        return logits, teacher, target
    y, z = (None if v is None else unpacked(v, logistic_states) for v in (teacher, target))
    return unpacked(logits, logistic_states), y, z


def check_values(
    states: int, teacher: Tensor | None, first: Tensor | None, tokens: Tensor | None, weight: Tensor | None
) -> None:
    """Only mixture_objective has a teacher, and only mixture_kl no tokens besides."""
    op = "mixture_kl" if tokens is None else "mixture_log_prob"
    op, name = (op, "tokens") if teacher is None else ("mixture_objective", "samples")
    checks.weight_values(op, weight)
    if first is not None:
        checks.token_values(op, first, weight, states, "data")
    if tokens is not None:
        checks.token_values(op, tokens, weight, states, name)


def empty_outputs(
    logits: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    first: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    logistic_states: int | None,
    information: bool,
) -> tuple[Tensor, ...]:
    B, L, D, _, K, T = sizes_of(logits, target, first, tokens, logistic_states)
    dtype = checks.sum_dtype(logits)
    pulls = (teacher is not None) + (target is not None)
    return (
        logits.new_empty((B, K), dtype=dtype),
        logits.new_empty((B, K), dtype=dtype),
        logits.new_empty((PARTS, B), dtype=dtype),
        logits.new_empty((2, B, L, D), dtype=dtype),
        logits.new_empty((2, B, 0 if teacher is None else 1, D), dtype=dtype),
        logits.new_empty((2, B, T, D), dtype=dtype),
        logits.new_empty((B, L, K), dtype=dtype),
        logits.new_empty((pulls, B, L, D), dtype=dtype),
    )


def _mixture_backward(
    grad_joint: Tensor,
    grad_correlation: Tensor,
    grad_parts: Tensor,
    logits: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    first: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    joint: Tensor,
    correlation: Tensor,
    lse: Tensor,
    lse_teacher: Tensor,
    lse_target: Tensor,
    share: Tensor,
    pull: Tensor,
    logistic_states: int | None,
) -> Tensor:
    run = native.kernels(logits, teacher, target)
    if run is None:
        x, y, z = _as_logits(logits, teacher, target, logistic_states)
        kept = joint, correlation, lse, lse_teacher, lse_target, share, pull
        grad = reference.mixture_backward(
            grad_joint, grad_correlation, grad_parts, x, y, z, stacked(first, tokens), inside, weight, *kept
        )
        return packed_gradient(logits, grad, logistic_states)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = describe_rows(logits, teacher, target, logistic_states)
    grads = grad_joint, grad_correlation, grad_parts
    kept = joint, correlation, lse, lse_teacher, lse_target, share, pull
    n = sizes_of(logits, target, first, tokens, logistic_states)
    run_backward(run, grads, rows, first, tokens, inside, weight, kept, grad, n)
    return grad


def run_backward(
    run: native.Kernels,
    grads: tuple[Tensor, ...],
    rows: dict[str, Tensor | int],
    first: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    kept: tuple[Tensor, ...],
    grad: Tensor,
    n: Sizes,
) -> None:
    """Runs mixture_backward; `grad` is contiguous and may be the logits themselves."""
    grad_joint, grad_correlation, grad_parts = grads
    joint, correlation, lse, lse_teacher, lse_target, share, pull = kept
    run(
        "mixture_backward",
        **rows,
        **native.describe_sequences("first", first),
        **native.describe_sequences("tokens", tokens),
        inside=native.dense(inside),
        weight=native.dense(weight),
        joint=native.dense(joint),
        correlation=native.dense(correlation),
        lse=native.dense(lse),
        lse_teacher=native.dense(lse_teacher),
        lse_target=native.dense(lse_target),
        share=native.dense(share),
        pull=native.dense(pull),
        grad_joint=native.dense(grad_joint),
        grad_correlation=native.dense(grad_correlation),
        grad_parts=native.dense(grad_parts),
        grad=grad,
        **n._asdict(),
    )


def objective_of(joint: Tensor, correlation: Tensor, parts: Tensor, with_data: bool) -> reference.MixtureObjective:
    """The op's joint and correlation (B, [1 +] K), the data before the samples, and parts (4, B), by name."""
    distillation, marginal_teacher, marginal_target, information = parts.unbind(0)
    if with_data:
        (joint_data, joint), (correlation_data, correlation) = (_first(v) for v in (joint, correlation))
    else:
        joint_data = correlation_data = joint.new_zeros(joint.shape[0])
    return reference.MixtureObjective(
        distillation,
        marginal_teacher,
        marginal_target,
        joint_data,
        correlation_data,
        joint,
        correlation,
        information.detach(),
    )


def _first(value: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1 + K) -> (B,), (B, K): one split, whose gradient is one cat."""
    data, samples = value.split([1, value.shape[1] - 1], 1)
    return data.squeeze(1), samples


_INPUTS = (
    "Tensor logits, Tensor? teacher, Tensor? target, Tensor? first, Tensor? tokens, Tensor? inside, Tensor? weight"
)
_KEPT = "Tensor lse, Tensor lse_teacher, Tensor lse_target, Tensor share, Tensor pull"
_VALUES = "Tensor joint, Tensor correlation"

register(
    f"mixture({_INPUTS}, int? logistic_states, bool information) -> (Tensor joint, Tensor correlation, Tensor parts, "
    f"{_KEPT})",
    _mixture,
    empty_outputs,
)
register(
    f"mixture_backward(Tensor grad_joint, Tensor grad_correlation, Tensor grad_parts, {_INPUTS}, {_VALUES}, "
    f"{_KEPT}, int? logistic_states) -> Tensor",
    _mixture_backward,
    lambda grad_joint, grad_correlation, grad_parts, logits, *_: logits.new_empty(logits.shape),
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.logistic_states, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.shapes = [value.shape for value in output[:3]]
    ctx.save_for_backward(*tensors, *output[:2], *output[3:])


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    lse = saved[9]
    given = [lse.new_zeros(n) if g is None else g for g, n in zip(grads[:3], ctx.shapes, strict=True)]
    grad = torch.ops.di4c.mixture_backward(*given, *saved, ctx.logistic_states)
    return grad, *[None] * 8


register_gradient("mixture", "mixture_objective", _gradient, _keep)
