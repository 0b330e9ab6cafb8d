"""What a mixture of L products says: of whole sequences, against its teacher and target, and all of it at once.

Each reads the logits once forward, reads and writes them once backward, and keeps nothing of their size; each takes
logits, teacher and target in any of the three forms of ops/logits.py. The operator is in ops/mixture_op.py, the
definitions in ops/reference. Logits as Hidden are made and forgotten piece by piece (ops/hidden.py). Logistic logits
are never made where all three arguments are Logistic; beside a tensor they are turned into one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops import checks, hidden, mixture_op, operands
from di4c_ext.ops.logits import Hidden, Logits
from di4c_ext.ops.reference import MixtureObjective
from di4c_ext.ops.reference.objective import MARGINAL_TARGET


def mixture_log_prob(logits: Logits, tokens: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
    x = operands.mixture(op, logits)
    checks.sequences(op, "tokens", tokens, x)
    w = checks.weight(op, weight, x)
    if isinstance(x, Hidden):
        return hidden.mixture_log_prob_from_hidden(x, tokens, w)
    (rows,), states = operands.laid_out(x)
    joint, correlation, *_ = torch.ops.di4c.mixture(rows, None, None, None, tokens, None, w, states, False)
    return joint, correlation


def mixture_kl(target: Logits, logits: Logits, weight: Tensor | None = None) -> Tensor:
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
    x = operands.mixture(op, logits)
    y = operands.target(op, target, x)
    w = checks.weight(op, weight, x)
    if isinstance(x, Hidden) or isinstance(y, Hidden):
        return hidden.mixture_kl_from_hidden(y, x, w)
    (rows, target_rows), states = operands.laid_out(x, y)
    return torch.ops.di4c.mixture(rows, None, target_rows, None, None, None, w, states, False)[2][MARGINAL_TARGET]


def mixture_objective(
    logits: Logits,
    *,
    teacher: Logits,
    data: Tensor | None = None,
    samples: Tensor | None = None,
    target: Logits | None = None,
    weight: Tensor | None = None,
    inside: Tensor | None = None,
    information: bool = False,
) -> MixtureObjective:
    """Everything that one step of Di4C asks of a mixture, in one read of the logits, and one read and write backward.

    With p_l = softmax of logits[b, l, d], pbar = mean_l p_l, gbar = mean_t softmax target[b, t, d]:

        distillation     = mean_l sum_d w KL(teacher || p_l)     for samples inside
        marginal_target  = sum_d w KL(gbar || pbar)              for samples outside
        marginal_teacher = sum_d w KL(teacher || pbar)
        information      = sum_d w KL(p_0 || pbar)               where asked for
        joint, correlation of the data and of each of the K samples, as `mixture_log_prob` gives them

    Args:
        logits: (B, L, D, S), L >= 1.
        teacher: (B, D, S), a constant, any floating dtype; a Hidden also (B, T, D, S), which enters by its mean over T.
        data: (B, D) int64, in [0, S) wherever the weight is not 0, or None.
        samples: (B, K, D) int64, likewise, or None.
        target: (B, D, S), or itself a mixture (B, T, D, S), or None; a constant, any floating dtype, its rows read
            for samples outside only.
        weight: (B, D) >= 0, or None for 1; positions of weight 0 are not read and their gradient is exactly 0.
        inside: (B,) bool, or None for every part of every sample.
        information: also measure how far one component (the first: they are exchangeable) is from the marginals.

    Returns:
        MixtureObjective, float32 (float64 for float64 logits), everything but information differentiable in the
        logits; 0 for what was not asked for: where outside or inside says so, or without data, target, information.
        Infinite and NaN values as for `mixture_log_prob` and `mixture_kl`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; for tokens outside [0, S) and
        negative weights on the CPU only; a teacher or a target that requires grad.
    """
    op = "mixture_objective"
    x = operands.mixture(op, logits)
    t = operands.teacher(op, teacher, x)
    y = None if target is None else operands.target(op, target, x)
    if data is not None:
        checks.indices(op, "data", data, (x.shape[0], x.shape[2]), "(B, D)", x)
    if samples is not None:
        checks.sequences(op, "samples", samples, x)
    w, within = checks.weight(op, weight, x), checks.inside(op, inside, x)
    if isinstance(x, Hidden) or isinstance(t, Hidden) or isinstance(y, Hidden):
        return hidden.mixture_objective_from_hidden(
            x, teacher=t, data=data, samples=samples, target=y, weight=w, inside=within, information=information
        )
    rows, states = operands.laid_out(x, t, y)
    joint, correlation, parts, *_ = torch.ops.di4c.mixture(*rows, data, samples, within, w, states, information)
    return mixture_op.objective_of(joint, correlation, parts, data is not None)
