"""What the Di4C objective is made of: its terms before their weights, and its parts by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import Logits


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
        return ops.Hidden(value.states.detach(), value.weight, value.bias)
    return value.detach()


def row_divergence(rows: Rows) -> Tensor:
    """sum_d w KL(teacher^d || p^d) of each row, (N,)."""
    one = rows.student  # a mixture of one component
    if isinstance(one, ops.Logistic):
        one = ops.Logistic(one.mean[:, None], one.log_scale[:, None], one.num_states)
    elif isinstance(one, ops.Hidden):
        one = ops.Hidden(one.states[:, None], one.weight, one.bias)
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
    """`ops.mixture_objective`: in one read of the logits, or one op at a time, which says what it means."""
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
    x, product = _tensor(logits), _tensor(teacher)
    weight = torch.ones_like(data, dtype=torch.float32) if weight is None else weight
    joint, correlation = ops.mixture_log_prob(x, torch.cat([data[:, None], samples], 1), weight)
    per_latent = ops.masked_kl(product, x, weight * inside[:, None])
    marginal_teacher = marginal_target = gap = torch.zeros_like(joint[:, 0])
    if target is not None:
        marginal_teacher = ops.mixture_kl(product, x, weight)
        marginal_target = ops.mixture_kl(_tensor(target), x, weight * ~inside[:, None])
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
