"""The latents of a sample split over processes, so that L can grow beyond one device.

Each of the N processes of a group has the same samples and L/N of their latents. What joins the latents is small: the
log-probabilities of the sequences, (B, L, 1 + K, D), are gathered, and of the marginals over all states, (B, D, S), the
log of a mean of exponentials is taken over the processes. The log-mean-exp of the loss then runs over all L, and every
process has the whole loss, the exact one, and the gradient of its own latents.

Gradients: the wrapper of distributed training averages them over the processes. Each of these holds the part of its
latents, and the parts want to be added up. So what comes back through `gather` and `log_mean_exp` is multiplied by N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from di4c_ext import ops
from di4c_ext.loss_terms import component, marginal
from di4c_ext.ops import Logits
from di4c_ext.ops.reference.mixture import at_tokens, divergence, log_mean_exp, sums_over_positions, unread

PIECE_BYTES = 128 << 20  # logits in single precision that live at once beside the network's output


@dataclass(frozen=True)
class LatentGroup:
    """`size` processes that share the latents of the same samples; this one is number `rank` of them."""

    rank: int
    size: int
    group: Any = None  # a ProcessGroup; None: all processes

    def own(self, number: int, name: str) -> slice:
        """Which of `number` rows are this process's; ValueError where they cannot be split evenly."""
        if number % self.size:
            raise ValueError(
                f"--latent_processes {self.size}: {name} {number} cannot be split over {self.size} processes; "
                f"give a multiple of {self.size}"
            )
        share = number // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The processes' x laid end to end along dim; see the head of this file for its gradient."""
        gathered: Tensor = _Gather.apply(x, dim, self)
        return gathered

    def log_mean_exp(self, x: Tensor) -> Tensor:
        """log of the mean of exp(x) over the processes, elementwise; likewise."""
        mean: Tensor = _LogMeanExp.apply(x, self)
        return mean


def latent_group_of(processes: int) -> LatentGroup | None:
    """The group of this process where `processes` neighbours share their samples' latents; None for 1.

    Every process must call it. Raises ValueError where there are not that many, or a number that they do not divide.
    """
    if processes == 1:
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() % processes:
        count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        raise ValueError(
            f"--latent_processes {processes}: there are {count} processes, a multiple of {processes} is wanted; start "
            "as many with torchrun or accelerate launch"
        )
    rank = dist.get_rank()
    groups = [
        dist.new_group(list(range(first, first + processes))) for first in range(0, dist.get_world_size(), processes)
    ]
    return LatentGroup(rank % processes, processes, groups[rank // processes])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: LatentGroup) -> Tensor:
        ctx.dim, ctx.group, ctx.share = dim, group, x.shape[dim]
        x = x.contiguous()
        pieces = [torch.empty_like(x) for _ in range(group.size)]
        dist.all_gather(pieces, x, group=group.group)
        return torch.cat(pieces, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        own = grad.narrow(ctx.dim, ctx.group.rank * ctx.share, ctx.share)
        return own * ctx.group.size, None, None


class _LogMeanExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LatentGroup) -> Tensor:
        top = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group.group)
        top = torch.where(top.isneginf(), 0.0, top)
        total = torch.exp(x - top)
        dist.all_reduce(total, group=group.group)
        value = top + total.log() - math.log(group.size)
        ctx.save_for_backward(x, value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # d value / d x = exp(x - value) / N, times N.
        x, value = ctx.saved_tensors
        return torch.where(value.isneginf(), 0.0, grad * torch.exp(x - value)), None


def shared_terms(
    group: LatentGroup,
    logits: Logits,
    *,
    teacher: Logits,
    data: Tensor,
    samples: Tensor,
    target: Logits | None,
    weight: Tensor | None,
    inside: Tensor,
    information: bool,
    piece_bytes: int = PIECE_BYTES,
) -> ops.MixtureObjective:
    """`ops.mixture_objective` of L latents and T targets, of which every process has its own.

    Args:
        logits: (B, L/N, D, S), this process's. teacher: (B, D, S) or (B, T', D, S), the same everywhere.
        data: (B, D). samples: (B, K, D), all of them. target: (B, T/N, D, S), this process's, or None.
        weight, inside, information: as there.
        piece_bytes: of the logits of how many positions copies live at once, forward and backward; at least one.

    Returns:
        The same values in every process, up to rounding those of one process with all latents.
    """
    if len(teacher.shape) == 4:
        teacher = marginal(teacher)
    tokens = torch.cat([data[:, None], samples], 1)
    weight = torch.ones_like(data, dtype=torch.float32) if weight is None else weight
    outside = weight * ~inside[:, None]
    B, L, D, S = logits.shape
    size = max(1, piece_bytes // (4 * max(B * L * S, 1)))
    own: list[tuple[Tensor, ...]] = []
    for first in range(0, D, size):
        at = slice(first, first + size)
        tensors = _of_positions(logits, at), _of_positions(teacher, at), tokens[..., at], weight[:, at]
        own.append(
            checkpoint(_own_terms, *tensors, use_reentrant=False)
            if torch.is_grad_enabled() and size < D
            else _own_terms(*tensors)
        )
    each, means, away = zip(*own, strict=True)
    total, _, centred = sums_over_positions(group.gather(torch.cat(each, 2), 1), weight)
    joint, correlation = log_mean_exp(total, 1), log_mean_exp(centred, 1)
    log_mean = group.log_mean_exp(torch.cat(means, 1))
    distillation = group.gather(torch.where(inside[:, None], torch.cat(away, 2).sum(2), 0.0), 1).mean(1)
    marginal_target = gap = torch.zeros_like(joint[:, 0])
    if target is not None:
        with torch.no_grad():
            log_target = group.log_mean_exp(_log_marginal(target, outside))
        marginal_target = divergence(log_target, log_mean, outside)
    if information:
        with torch.no_grad():
            # Latents are exchangeable: the first of all stands for them.
            first_latent = _log_p(component(logits, 0), weight)
            gap = group.gather(divergence(first_latent, log_mean.detach(), weight)[:, None], 1)[:, 0]
    return ops.MixtureObjective(
        distillation=distillation,
        marginal_teacher=divergence(_log_p(teacher, weight), log_mean, weight),
        marginal_target=marginal_target,
        joint_data=joint[:, 0],
        correlation_data=correlation[:, 0],
        joint_samples=joint[:, 1:],
        correlation_samples=correlation[:, 1:],
        information=gap,
    )


def _own_terms(logits: Logits, teacher: Logits, tokens: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of d positions and this process's l latents: log-probabilities of the tokens (B, l, d, 1 + K), log of the mean
    over l of p (B, d, S), and w KL(teacher || p_l) (B, l, d)."""
    log_p = _log_p(logits, weight)
    log_t = _log_p(teacher, weight)[:, None, :, None]  # (B, 1, d, 1, S): a position at a time is a row of its own
    away = divergence(log_t, log_p[:, :, :, None], None)
    used = (weight != 0)[:, None]
    away = torch.where(used, weight[:, None].to(away.dtype) * torch.where(used, away, 0.0), 0.0)
    return at_tokens(log_p, tokens), log_mean_exp(log_p, 1), away


def _log_p(logits: Logits, weight: Tensor | None) -> Tensor:
    """log softmax, float32 at least; uniform where the weight is 0, whatever stands there."""
    whole = logits if isinstance(logits, Tensor) else logits.logits()
    return torch.log_softmax(unread(whole, weight), -1)


def _log_marginal(target: Logits, weight: Tensor) -> Tensor:
    """log of the mean over T of p, (B, D, S), of one component's logits at a time."""
    total: Tensor | None = None
    for number in range(target.shape[1]):
        log_p = _log_p(component(target, number), weight)
        total = log_p if total is None else torch.logaddexp(total, log_p)
    if total is None:
        raise ValueError("shared_terms: at least one target is wanted, got none")
    return total - math.log(target.shape[1])


def _of_positions(logits: Any, at: slice) -> Any:
    """Logits (B, [L,] D, S) of some positions, of the same kind."""
    rows = (slice(None),) * (len(logits.shape) - 2) + (at,)
    if isinstance(logits, ops.Logistic):
        return logits._replace(mean=logits.mean[rows], log_scale=logits.log_scale[rows])
    return logits.mapped(lambda x: x[rows]) if isinstance(logits, ops.Hidden) else logits[rows]
