"""What the Di4C objective is made of: its terms before their weights, and its parts by name."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Logits
from di4c_ext.process import Process


class LossParts(dict[str, Tensor]):
    """'loss' with its graph, and by name every part of it (detached, weighted, adding up to it) and every diagnostic.

    All are scalars in nats per sample, means over the batch; `per_sample` holds the same values as (B,) tensors.
    Diagnostics: gain_data and gain_consistency, A(x_0) and mean_j A(xhat_j), unweighted and at every t;
    latent_information, sum_d KL(p_l^d || pbar^d), how far one latent tells the positions apart from their marginals.
    """

    def __init__(self, parts: Mapping[str, Tensor], diagnostics: Mapping[str, Tensor]) -> None:
        super().__init__(loss=torch.stack(list(parts.values())).sum(0).mean())
        self.parts = tuple(parts)
        self.per_sample = {name: value.detach() for name, value in (*parts.items(), *diagnostics.items())}
        self.update({name: value.mean() for name, value in self.per_sample.items()})

    def non_finite(self) -> list[str]:
        """Names of the parts that are NaN or infinite for some sample. Waits for the device."""
        bad = torch.stack([~self.per_sample[name].isfinite().all() for name in self.parts]).tolist()
        return [name for name, is_bad in zip(self.parts, bad, strict=True) if is_bad]


class Rows(NamedTuple):
    """R rows of each sample on which the student is distilled apart from x_t: N = B R of them, a sample's together.

    student, teacher: logits (N, D, S) at the same x_tau, tau and, for the student, a latent a row. weight: (N, D).
    """

    student: Logits
    teacher: Logits
    weight: Tensor | None


def constant(value: Any) -> Any:
    """Logits without their graph: computed under no_grad they may still be a view of a parameter."""
    if isinstance(value, ops.Logistic):
        return ops.Logistic(value.mean.detach(), value.log_scale.detach(), value.num_states)
    if isinstance(value, ops.Hidden):
        return value._replace(states=value.states.detach())
    return value.detach()


def of_states(logits: Any, process: Process) -> Any:
    """Logits without the class after a process's last state, where a denoiser gives it: the process's mask."""
    states = process.num_states
    if logits.shape[-1] != states + 1 or getattr(process, "mask_id", None) != states:
        return logits
    if isinstance(logits, ops.Hidden):
        bias = None if logits.bias is None else logits.bias[:states]
        return logits._replace(weight=logits.weight[:states], bias=bias)
    return logits[..., :states] if isinstance(logits, Tensor) else logits


def component(logits: Any, number: int) -> Any:
    """One of the T of logits (B, T, D, S), as (B, D, S) of the same kind."""
    if isinstance(logits, ops.Logistic):
        return logits._replace(mean=logits.mean[:, number], log_scale=logits.log_scale[:, number])
    if isinstance(logits, ops.Hidden):
        return logits.mapped(lambda x: x[:, number])
    return logits[:, number]


def marginal(logits: Logits) -> Tensor:
    """log mean_T softmax(logits (B, T, D, S)), (B, D, S), float32 at least; one component's logits live at a time."""
    total: Tensor | None = None
    for number in range(logits.shape[1]):
        x = _tensor(component(logits, number))
        log_p = x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)
        total = log_p if total is None else torch.logaddexp(total, log_p)
    if total is None:
        raise ValueError("marginal: a mixture of at least one component is wanted, got none")
    return total - math.log(logits.shape[1])


def steps(process: Process, x_t: Tensor, logits: Logits, t: Tensor, u: Tensor, keys: Tensor, number: int) -> Tensor:
    """x_u (B, K, D): K steps from one row of logits (B, D, S), or one step of each component of (B, K, D, S)."""
    if len(logits.shape) == 3:
        return process.step(x_t, logits, t, u, keys, draws=number)
    each = [
        process.step(x_t, component(logits, k), t, u, random.fold_in(keys, torch.tensor(k, device=keys.device)))
        for k in range(number)
    ]
    return torch.stack(each, 1)


def row_divergence(rows: Rows) -> Tensor:
    """sum_d w KL(teacher^d || p^d) of each row, (N,)."""
    one = rows.student  # a mixture of one component
    if isinstance(one, ops.Logistic):
        one = ops.Logistic(one.mean[:, None], one.log_scale[:, None], one.num_states)
    elif isinstance(one, ops.Hidden):
        one = one.mapped(lambda x: x[:, None])
    else:
        one = one[:, None]
    return ops.mixture_kl(rows.teacher, one, rows.weight)


def mixture_terms(
    logits: Logits,
    *,
    teacher: Logits,
    data: Tensor,
    samples: Tensor,
    target: Logits | None,
    weight: Tensor | None,
    inside: Tensor,
    information: bool,
    fused: bool,
) -> ops.MixtureObjective:
    """`ops.mixture_objective`: in one read of the logits, or one op at a time, which says what it means.

    teacher: (B, D, S), or (B, T, D, S), of which all that is asked is the mean.
    """
    if len(teacher.shape) == 4 and not (fused and isinstance(teacher, ops.Hidden)):
        teacher = marginal(teacher)
    if fused:
        return ops.mixture_objective(
            logits,
            teacher=teacher,
            data=data,
            samples=samples,
            target=target,
            weight=weight,
            inside=inside,
            information=information,
        )
    # The constants' heads may be parameters.
    x, product = _tensor(logits), _tensor(teacher).detach()
    weight = torch.ones_like(data, dtype=torch.float32) if weight is None else weight
    joint, correlation = ops.mixture_log_prob(x, torch.cat([data[:, None], samples], 1), weight)
    per_latent = ops.masked_kl(product, x, weight * inside[:, None])
    marginal_teacher = marginal_target = gap = torch.zeros_like(joint[:, 0])
    if target is not None:
        marginal_teacher = ops.mixture_kl(product, x, weight)
        marginal_target = ops.mixture_kl(_tensor(target).detach(), x, weight * ~inside[:, None])
    if information:
        with torch.no_grad():
            # Latents are exchangeable: the first stands for all.
            gap = ops.mixture_kl(x[:, :1].detach(), x.detach(), weight)
    return ops.MixtureObjective(
        distillation=per_latent.mean(1),
        marginal_teacher=marginal_teacher,
        marginal_target=marginal_target,
        joint_data=joint[:, 0],
        correlation_data=correlation[:, 0],
        joint_samples=joint[:, 1:],
        correlation_samples=correlation[:, 1:],
        information=gap,
    )


def _tensor(value: Logits) -> Tensor:
    return value if isinstance(value, Tensor) else value.logits()
