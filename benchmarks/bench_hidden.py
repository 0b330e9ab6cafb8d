"""Head and loss of a language model's student, from hidden states, beside logits made whole.

At (1, 16, 256, 768, 50258) the logits are 823 MB in float32, and a plain step holds several tensors of their size.
Promised on a CPU: 600 MB of memory at most, the gradient of the head (154 MB) included, and no slower than plain torch
on whole logits. The loss is everything of one Di4C step; with a target of as many components as the student has it is
also hidden, else there is none.
Floor: inputs read forward and backward, the gradients of states and head written; but the time is that of the matrix
products, three of whole logits (one more for a hidden target), and one more for as many logits as are not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import plain
import pytest
import torch
from measuring import free_memory, nbytes, shape_name
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Hidden

Shape = tuple[int, int, int, int, int]  # B, L, D, H, S

FULL: Shape = (1, 16, 256, 768, 50258)
DAILY: Shape = (1, 16, 32, 768, 50258)
GROWTH_LIMIT = 600e6
WAYS = ["di4c", "di4c, nothing kept", "di4c, whole logits", "torch, whole logits"]
LOGITS_OF_PLAIN = 8  # tensors of the logits' size that the plain step may hold at a time


@dataclass(frozen=True)
class Inputs:
    """A student's states and head, and what they are held against; K = T = L."""

    states: Tensor  # (B, L, D, H)
    weight: Tensor  # (S, H)
    teacher: Tensor  # (B, D, S)
    target: Tensor  # (B, T, D, H)
    data: Tensor  # (B, D)
    samples: Tensor  # (B, K, D)


@lru_cache(maxsize=1)
def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """States of unit variance, a head that makes logits of variance 2."""
    B, L, D, H, S = shape
    g = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device)

    def tokens(*sizes: int) -> Tensor:
        return torch.randint(0, S, sizes, generator=g, device=device)

    weight = normal(S, H).mul_((2 / H) ** 0.5).to(dtype)
    states, target, teacher = normal(B, L, D, H).to(dtype), normal(B, L, D, H).to(dtype), normal(B, D, S).to(dtype)
    return Inputs(states, weight, teacher, target, tokens(B, D), tokens(B, L, D))


def _ours(rows: Hidden | Tensor, target: Hidden | Tensor | None, i: Inputs, keep_bytes: int | None = None) -> Tensor:
    given = {"teacher": i.teacher, "data": i.data, "samples": i.samples, "target": target}
    if keep_bytes is None:
        found = ops.mixture_objective(rows, **given)
    else:
        found = ops.mixture_objective_from_hidden(rows, **given, keep_bytes=keep_bytes)
    parts = found.distillation, found.marginal_teacher, found.marginal_target
    return sum(part.sum() for part in (*parts, found.correlation_data, found.correlation_samples))


def _plain(logits: Tensor, target: Tensor | None, i: Inputs) -> Tensor:
    parts = plain.mixture_objective(logits, i.teacher, i.data, i.samples, target)
    return sum(part.sum() for part in parts)


def _loss(way: str, rows: Hidden, target: Hidden | None, i: Inputs) -> Tensor:
    if way == "di4c":
        return _ours(rows, target, i)
    if way == "di4c, nothing kept":
        return _ours(rows, target, i, 0)
    with torch.no_grad():
        whole_target = None if target is None else target.logits()
    return (_ours if way.startswith("di4c") else _plain)(rows.logits(), whole_target, i)


def _step(way: str, i: Inputs, with_target: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, to the states and the head."""

    def run() -> tuple[Tensor, ...]:
        states, weight = i.states.detach().requires_grad_(), i.weight.detach().requires_grad_()
        target = Hidden(i.target, weight) if with_target else None
        return torch.autograd.grad(_loss(way, Hidden(states, weight), target, i), (states, weight))

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_target", [False, True], ids=["", "target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [DAILY, FULL], ids=lambda s: shape_name(*s))
def test_objective(meter, device, shape, dtype, with_target, way):
    group = f"objective from hidden{' with target' if with_target else ''} {shape_name(*shape)} {str(dtype)[6:]}"
    B, L, D, _, S = shape
    if way.startswith("torch") and free_memory(device) < LOGITS_OF_PLAIN * B * L * D * S * 4:
        meter.absent(group, way, "memory")
    i = _inputs(shape, dtype, device)
    promised = way == "di4c" and shape == FULL and not with_target
    meter(
        group,
        way,
        _step(way, i, with_target),
        2 * nbytes(i.states, i.weight, i.teacher, i.target if with_target else None) + nbytes(i.states, i.weight),
        at_least={"torch, whole logits": 1} if promised else None,
        growth_limit=GROWTH_LIMIT if promised and dtype == torch.float32 else None,
        may_fail=way.startswith("torch"),
        graph=False,
    )


@pytest.mark.parametrize("way", ["di4c", "di4c, whole logits", "torch, whole logits"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.125])
def test_share_of_positions(meter, device, share, way):
    """Positions of weight 0 cost nothing: of hidden states not even the product."""
    i = _inputs(DAILY, torch.float32, device)
    weight = (torch.rand(i.data.shape, generator=torch.Generator().manual_seed(1)) < share).float().to(device)

    def run() -> tuple[Tensor, ...]:
        leaves = i.states.detach().requires_grad_(), i.weight.detach().requires_grad_()
        rows = Hidden(*leaves)
        if way == "di4c":
            joint, correlation = ops.mixture_log_prob(rows, i.samples, weight)
        else:
            f = ops.mixture_log_prob if way.startswith("di4c") else plain.mixture_log_prob
            joint, correlation = f(rows.logits(), i.samples, weight)
        return torch.autograd.grad(joint.sum() + correlation.sum(), leaves)

    meter(f"log_prob from hidden {shape_name(*DAILY)}, {share:.3g} of the positions", way, run, graph=False)


@pytest.mark.parametrize("way", ["di4c", "di4c, whole logits", "torch, whole logits"])
def test_sample(meter, device, way):
    """One draw for each row of hidden states; torch races whole logits."""
    i = _inputs(DAILY, torch.float32, device)
    keys, rows = random.keys(0, 1, device), Hidden(i.states, i.weight)

    def run() -> Tensor:
        if way == "di4c":
            return ops.sample_categorical(rows, keys)
        return ops.sample_categorical(rows.logits(), keys) if way.startswith("di4c") else plain.race(rows.logits())

    with torch.no_grad():
        meter(f"sample from hidden {shape_name(*DAILY)}", way, run, graph=False)
