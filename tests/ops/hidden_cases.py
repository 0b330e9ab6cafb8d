"""Inputs of the from_hidden forms, and outputs and gradients by them and by the logits made whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import Hidden

NAMES = ("mixture_log_prob", "mixture_kl", "mixture_objective")


@dataclass(frozen=True)
class Case:
    """Student (B, L, D, H), teacher (B, D, H), target (B, T, D, H) with their heads, and what belongs to positions."""

    student: Hidden
    teacher: Hidden
    target: Hidden
    tokens: Tensor  # (B, K, D)
    weight: Tensor | None
    inside: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> Case:
        def of(value: Any) -> Any:
            if isinstance(value, Hidden):
                return Hidden(*(of(part) for part in value))
            return None if value is None else change(value)

        return Case(*(of(value) for value in vars(self).values()))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Case:
        return self.each(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))


def make(
    dtype: torch.dtype = torch.float32,
    *,
    states: int = 301,
    batch: int = 3,
    length: int = 53,
    weighted: bool = True,
    bias: bool = True,
    inside: bool = True,
    exact: bool = False,
) -> Case:
    """Normal states and heads; most weights 0, of the second sample all but one. exact: products without rounding, so
    that every way to multiply gives the same bits, also in bfloat16."""
    g = torch.Generator().manual_seed(7)
    components, mixed, sequences, width = 4, 2, 5, 12

    def normal(*shape: int) -> Tensor:
        if exact:
            return (torch.randint(-1, 2, shape, generator=g) / 2).to(dtype)
        return (torch.randn(shape, generator=g) / 1.5).to(dtype)

    weight = torch.rand(batch, length, generator=g) + 0.1
    weight[torch.rand(batch, length, generator=g) < 0.6] = 0.0
    weight[1:2] = 0.0
    weight[1:2, 5:6] = 0.3
    head, own_bias = normal(states, width), normal(states) if bias else None
    return Case(
        Hidden(normal(batch, components, length, width), head, own_bias),
        Hidden(normal(batch, length, width), head, own_bias),  # tied
        Hidden(normal(batch, mixed, length, width), normal(states, width), None),
        torch.randint(0, states, (batch, sequences, length), generator=g),
        weight if weighted else None,
        torch.arange(batch) % 2 == 0 if inside else None,
    )


def arguments(name: str, case: Case) -> dict[str, Any]:
    if name == "mixture_log_prob":
        return {"logits": case.student, "tokens": case.tokens, "weight": case.weight}
    if name == "mixture_kl":
        return {"target": case.target, "logits": case.student, "weight": case.weight}
    given = {"teacher": case.teacher, "data": case.tokens[:, 0], "samples": case.tokens, "target": case.target}
    return {"logits": case.student, **given, "weight": case.weight, "inside": case.inside, "information": True}


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def hidden(name: str, case: Case, **settings: int) -> tuple[Tensor, ...]:
    """By the from_hidden form, 16 positions at a time unless told."""
    settings = {"chunk_bytes": 1, **settings}
    return as_tuple(getattr(ops, f"{name}_from_hidden")(**arguments(name, case), **settings))


def whole(name: str, case: Case, of: Any = ops) -> tuple[Tensor, ...]:
    """By the logits made whole, by an op or by its definition; the constants' heads are constants."""
    given = {
        key: value.logits() if key == "logits" else value.logits().detach() if isinstance(value, Hidden) else value
        for key, value in arguments(name, case).items()
    }
    return as_tuple(getattr(of, name)(**given))


def with_gradients(
    run: Callable[[str, Case], tuple[Tensor, ...]], name: str, case: Case
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of states, weight and bias for fixed, unequal gradients of the outputs. A head
    that the teacher shares requires grad with the student's."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in case.student]
    teacher = case.teacher._replace(weight=leaves[1], bias=leaves[2])
    outputs = run(name, replace(case, student=Hidden(*leaves), teacher=teacher))
    summed = [o for o in outputs if o.requires_grad]
    grads = [torch.linspace(0.5, -1.5, o.numel(), dtype=o.dtype, device=o.device).view(o.shape) for o in summed]
    torch.autograd.backward(summed, grads)
    return [o.detach() for o in outputs], [x.grad for x in leaves if x is not None]
