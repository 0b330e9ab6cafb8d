"""Log-probabilities of sequences under a mixture of L products, and the divergence from the mixture's marginals.

One read of the logits forward, one read and one write backward; kept between the two are the logits themselves and
tensors of the size of rows (B, L, D), never anything of the logits' size. Equations, and what the planes of a kept
log-sum-exp hold, in ops/reference/mixture.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register, register_gradient


def mixture_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How probable K sequences are under a mixture of L products, and how much of it is correlation.

    With a = log softmax(logits)[b, l, d, tokens[b, k, d]] and LME the log of the mean of exponentials over l:

        joint[b, k]       = LME_l sum_d w a
        correlation[b, k] = LME_l sum_d w (a - LME_l a)

    The second is the total correlation that the mixture gives the sequence, computed in this form because the
    difference of the joint and the sum of marginals loses three digits.

    Args:
        logits: (B, L, D, S), L >= 1.
        tokens: (B, K, D) int64, in [0, S) wherever the weight is not 0.
        weight: (B, D) >= 0, or None for 1; positions of weight 0 are not read and their gradient is exactly 0.

    Returns:
        joint, correlation: (B, K), float32 (float64 for float64 logits), both differentiable in the logits. A
        token of probability 0 under every component makes joint -inf and adds 0 to correlation. A row with a NaN
        makes its sample's values NaN, no other sample's.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; for tokens outside [0, S) and
        negative weights on the CPU only. On CUDA such a token makes its value NaN.
    """
    op = "mixture_log_prob"
    x = checks.logits(op, "logits", logits, (4,), "(B, L, D, S)")
    checks.count(op, "L, the second dimension of logits,", x.shape[1], 1)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        raise ValueError(f"{op}: tokens must be an int64 tensor (B, K, D), got {_kind(tokens)}")
    checks.indices(op, "tokens", tokens, (x.shape[0], tokens.shape[1], x.shape[2]), "(B, K, D)", x)
    joint, correlation, _, _ = torch.ops.di4c.mixture_log_prob(x, tokens, checks.weight(op, weight, x))
    return joint, correlation


def mixture_kl(target: Tensor, logits: Tensor, weight: Tensor | None = None) -> Tensor:
    """KL from a target to the mixture's marginals, summed over positions.

        kl[b] = sum_d w KL(tbar || pbar),  tbar = mean_t softmax target[b, t, d],  pbar = mean_l softmax logits[b, l, d]

    Args:
        target: (B, D, S), or itself a mixture (B, T, D, S); a constant, any floating dtype.
        logits: (B, L, D, S), L >= 1.
        weight: (B, D) >= 0, or None for 1; positions of weight 0 are not read and their gradient is exactly 0.

    Returns:
        kl (B,), float32 (float64 for float64 logits), differentiable in the logits; inf where the target has a
        class the mixture does not have, NaN for a sample with a bad row.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; a target that requires grad.
    """
    op = "mixture_kl"
    x = checks.logits(op, "logits", logits, (4,), "(B, L, D, S)")
    checks.count(op, "L, the second dimension of logits,", x.shape[1], 1)
    y = checks.target(op, target, (3, 4), "(B, D, S) or (B, T, D, S)", x)
    y = y.unsqueeze(1) if y.dim() == 3 else y
    checks.count(op, "T, the second dimension of target,", y.shape[1], 1)
    return torch.ops.di4c.mixture_kl(y, x, checks.weight(op, weight, x))[0]


def _kind(value: object) -> str:
    return f"shape {checks.shape(value)}" if isinstance(value, Tensor) else type(value).__name__


def _mixture_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.weight_values("mixture_log_prob", weight)
    checks.token_values("mixture_log_prob", tokens, weight, logits.shape[-1])
    run = native.kernels(logits)
    if run is None:
        return reference.mixture_log_prob_forward(logits, tokens, weight)
    out = _mixture_log_prob_fake(logits, tokens, weight)
    (B, L, D, S), K = logits.shape, tokens.shape[1]
    x = native.rows(logits)
    work = logits.new_empty((B, -(-D // native.POSITIONS), L + 1, K), dtype=torch.float64)
    joint, correlation, lse, share = out
    run(
        "mixture_log_prob",
        **native.describe("logits", x),
        tokens=native.dense(tokens),
        weight=native.dense(weight),
        joint=joint,
        correlation=correlation,
        lse=lse,
        share=share,
        work=work,
        B=B,
        L=L,
        D=D,
        S=S,
        K=K,
    )
    return out


def _mixture_log_prob_fake(
    logits: Tensor, tokens: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, L, D, _), K = logits.shape, tokens.shape[1]
    dtype = checks.sum_dtype(logits)
    return (
        logits.new_empty((B, K), dtype=dtype),
        logits.new_empty((B, K), dtype=dtype),
        logits.new_empty((2, B, L, D), dtype=dtype),
        logits.new_empty((B, L, K), dtype=dtype),
    )


def _mixture_log_prob_backward(
    grad_joint: Tensor,
    grad_correlation: Tensor,
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    share: Tensor,
) -> Tensor:
    run = native.kernels(logits)
    if run is None:
        return reference.mixture_log_prob_backward(grad_joint, grad_correlation, logits, tokens, weight, lse, share)
    (B, L, D, S), K = logits.shape, tokens.shape[1]
    grad = logits.new_empty((B, L, D, S))
    x = native.rows(logits)
    run(
        "mixture_log_prob_backward",
        **native.describe("logits", x),
        tokens=native.dense(tokens),
        weight=native.dense(weight),
        lse=native.dense(lse),
        share=native.dense(share),
        grad_joint=native.dense(grad_joint),
        grad_correlation=native.dense(grad_correlation),
        grad=grad,
        B=B,
        L=L,
        D=D,
        S=S,
        K=K,
    )
    return grad


def _mixture_kl(target: Tensor, logits: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.weight_values("mixture_kl", weight)
    run = native.kernels(logits, target)
    if run is None:
        return _in_dtype_of_logits(logits, reference.mixture_kl_forward(target, logits, weight))
    out = _mixture_kl_fake(target, logits, weight)
    B, L, D, S = logits.shape
    x, y = native.rows(logits), native.rows(target)
    kl, lse_target, lse, pull = out
    run(
        "mixture_kl",
        **native.describe("target", y),
        **native.describe("logits", x),
        weight=native.dense(weight),
        kl=kl,
        lse_target=lse_target,
        lse=lse,
        pull=pull,
        row=logits.new_empty((B, D), dtype=torch.float32),
        B=B,
        T=target.shape[1],
        L=L,
        D=D,
        S=S,
    )
    return out


def _in_dtype_of_logits(logits: Tensor, values: tuple[Tensor, ...]) -> Any:
    """The reference accumulates a float64 target in float64; results follow the logits all the same."""
    dtype = checks.sum_dtype(logits)
    return tuple(value.to(dtype) for value in values)


def _mixture_kl_fake(target: Tensor, logits: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, L, D, _), T = logits.shape, target.shape[1]
    dtype = checks.sum_dtype(logits)
    return (
        logits.new_empty((B,), dtype=dtype),
        logits.new_empty((2, B, T, D), dtype=dtype),
        logits.new_empty((2, B, L, D), dtype=dtype),
        logits.new_empty((B, L, D), dtype=dtype),
    )


def _mixture_kl_backward(
    grad_kl: Tensor,
    target: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    lse_target: Tensor,
    lse: Tensor,
    pull: Tensor,
) -> Tensor:
    run = native.kernels(logits, target)
    if run is None:
        return reference.mixture_kl_backward(grad_kl, target, logits, weight, lse_target, lse, pull)
    B, L, D, S = logits.shape
    grad = logits.new_empty((B, L, D, S))
    x, y = native.rows(logits), native.rows(target)
    run(
        "mixture_kl_backward",
        **native.describe("target", y),
        **native.describe("logits", x),
        weight=native.dense(weight),
        lse_target=native.dense(lse_target),
        lse=native.dense(lse),
        pull=native.dense(pull),
        grad_kl=native.dense(grad_kl),
        grad=grad,
        B=B,
        T=target.shape[1],
        L=L,
        D=D,
        S=S,
    )
    return grad


register(
    "mixture_log_prob(Tensor logits, Tensor tokens, Tensor? weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _mixture_log_prob,
    _mixture_log_prob_fake,
)
register(
    "mixture_log_prob_backward(Tensor grad_joint, Tensor grad_correlation, Tensor logits, Tensor tokens, "
    "Tensor? weight, Tensor lse, Tensor share) -> Tensor",
    _mixture_log_prob_backward,
    lambda grad_joint, grad_correlation, logits, *_: logits.new_empty(logits.shape),
)
register(
    "mixture_kl(Tensor target, Tensor logits, Tensor? weight) -> (Tensor, Tensor, Tensor, Tensor)",
    _mixture_kl,
    _mixture_kl_fake,
)
register(
    "mixture_kl_backward(Tensor grad_kl, Tensor target, Tensor logits, Tensor? weight, Tensor lse_target, "
    "Tensor lse, Tensor pull) -> Tensor",
    _mixture_kl_backward,
    lambda grad_kl, target, logits, *_: logits.new_empty(logits.shape),
)


def _keep_log_prob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, weight = inputs
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(logits, tokens, weight, output[2], output[3])


def _log_prob_gradient(ctx: Any, grad_joint: Tensor, grad_correlation: Tensor, *_: Any) -> tuple[Any, ...]:
    grad = torch.ops.di4c.mixture_log_prob_backward(grad_joint, grad_correlation, *ctx.saved_tensors)
    return grad, None, None


def _keep_kl(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def _kl_gradient(ctx: Any, grad_kl: Tensor, *_: Any) -> tuple[Any, ...]:
    return None, torch.ops.di4c.mixture_kl_backward(grad_kl, *ctx.saved_tensors), None


register_gradient("mixture_log_prob", _log_prob_gradient, _keep_log_prob)
register_gradient("mixture_kl", _kl_gradient, _keep_kl)
