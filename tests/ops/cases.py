"""Inputs for the ops with a gradient, their calls and their definitions, and the rule by which a result passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import reference

STATES = (1, 2, 31, 255, 256, 1025, 4099, 50257, 50258, 126464)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inputs:
    """logits (B, L, D, S), target (B, D, S), targets (B, T, D, S), tokens (B, K, D), weight (B, D) or None."""

    logits: Tensor
    target: Tensor
    targets: Tensor
    tokens: Tensor
    weight: Tensor | None

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Inputs:
        """Moved, and with every floating tensor in `dtype` where one is given."""

        def move(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        weight = None if self.weight is None else move(self.weight)
        return Inputs(move(self.logits), move(self.target), move(self.targets), move(self.tokens), weight)

    def samples(self, which: slice) -> Inputs:
        weight = None if self.weight is None else self.weight[which]
        return Inputs(self.logits[which], self.target[which], self.targets[which], self.tokens[which], weight)


def make(
    states: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    batch: int = 2,
    components: int = 3,
    length: int = 5,
    sequences: int = 2,
    mixed_target: int = 2,
    weighted: bool = True,
    seed: int = 0,
) -> Inputs:
    """Normal logits times scale plus shift; weights in (0, 1] with some zeros."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, states, generator=g) * scale + shift).to(dtype)

    weight = torch.rand(batch, length, generator=g) + 1e-3
    weight[torch.rand(batch, length, generator=g) < 0.3] = 0.0
    return Inputs(
        normal(batch, components, length),
        normal(batch, length),
        normal(batch, mixed_target, length),
        torch.randint(0, states, (batch, sequences, length), generator=g),
        weight if weighted else None,
    )


Call = Callable[[Inputs], tuple[Tensor, ...]]


def _op_divergence(op: Callable[..., Tensor]) -> Call:
    return lambda i: (op(i.target, i.logits, i.weight),)


def _row(kind: int) -> Call:
    if kind == 4:
        return lambda i: (reference.row_loss(kind, None, i.tokens[:, 0], i.logits, i.weight),)
    return lambda i: (reference.row_loss(kind, i.target, None, i.logits, i.weight),)


def _objective(i: Inputs) -> dict[str, Tensor | None]:
    """target as the teacher, targets as the target, the first tokens as data and the rest as samples."""
    return {
        "teacher": i.target,
        "data": i.tokens[:, 0] if i.tokens.shape[1] else None,
        "samples": i.tokens[:, 1:],
        "target": i.targets,
        "weight": i.weight,
    }


OPS: dict[str, Call] = {
    "mixture_log_prob": lambda i: ops.mixture_log_prob(i.logits, i.tokens, i.weight),
    "mixture_kl": lambda i: (ops.mixture_kl(i.target, i.logits, i.weight),),
    "mixture_kl_of_mixture": lambda i: (ops.mixture_kl(i.targets, i.logits, i.weight),),
    "mixture_objective": lambda i: ops.mixture_objective(i.logits, **_objective(i), information=True),
    "masked_kl": _op_divergence(ops.masked_kl),
    "masked_reverse_kl": _op_divergence(ops.masked_reverse_kl),
    "masked_js": _op_divergence(ops.masked_js),
    "masked_tv": _op_divergence(ops.masked_tv),
    "masked_cross_entropy": lambda i: (ops.masked_cross_entropy(i.logits, i.tokens[:, 0], i.weight),),
}

DEFINITIONS: dict[str, Call] = {
    "mixture_log_prob": lambda i: reference.mixture_log_prob(i.logits, i.tokens, i.weight),
    "mixture_kl": lambda i: (reference.mixture_kl(i.target[:, None], i.logits, i.weight),),
    "mixture_kl_of_mixture": lambda i: (reference.mixture_kl(i.targets, i.logits, i.weight),),
    "mixture_objective": lambda i: reference.mixture_objective(i.logits, **_objective(i), information=True),
    "masked_kl": _row(0),
    "masked_reverse_kl": _row(1),
    "masked_js": _row(2),
    "masked_tv": _row(3),
    "masked_cross_entropy": _row(4),
}

READS_TARGET = [name for name in OPS if name not in ("mixture_log_prob", "masked_cross_entropy")]


def value_and_grad(call: Call, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """The outputs, and the gradient of the logits for fixed, unequal gradients of the outputs that have one."""
    logits = inputs.logits.detach().requires_grad_()
    outputs = call(replace(inputs, logits=logits))
    felt = [o for o in outputs if o.requires_grad]
    grads = [torch.linspace(0.5, -1.5, max(1, o.numel()), dtype=o.dtype, device=o.device)[: o.numel()] for o in felt]
    torch.autograd.backward(felt, [g.view(o.shape) for g, o in zip(grads, felt, strict=True)])
    assert logits.grad is not None
    return [o.detach() for o in outputs], logits.grad


def _worst(value: Tensor, exact: Tensor) -> float:
    """The largest error over the finite entries; entries that are not finite must be the same ones."""
    value = value.double()
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(value), finite), "finite in other places than the definition"
    assert torch.equal(value[~finite].isnan(), exact[~finite].isnan()), "NaN in other places than the definition"
    return (value - exact)[finite].abs().max().item() if finite.any() else 0.0


def check(name: str, inputs: Inputs, device: torch.device) -> None:
    """An op passes if its error against the float64 definition is at most twice that of the plain float32 path on the
    same inputs, with a few ulp of what is summed on top; a gradient is rounded once more, to the logits' dtype."""
    inputs = inputs.to(device)
    dtype = inputs.logits.dtype
    outputs, grad = value_and_grad(OPS[name], inputs)
    plain_outputs, plain_grad = value_and_grad(DEFINITIONS[name], inputs.to(dtype=torch.float32))
    exact_outputs, exact_grad = value_and_grad(DEFINITIONS[name], inputs.to(dtype=torch.float64))
    assert grad.dtype == dtype and grad.shape == inputs.logits.shape

    wide = inputs.logits.double()
    wide = wide.masked_fill(~torch.isfinite(wide), 0.0)
    span = 1.0 + (wide.amax(-1) - wide.amin(-1)).max().item()
    ulp = 4 * torch.finfo(torch.float32).eps * span
    for output, plain, exact in zip(outputs, plain_outputs, exact_outputs, strict=True):
        assert output.dtype == torch.float32
        error, allowed = _worst(output, exact), 2 * _worst(plain, exact) + ulp * math.sqrt(inputs.logits.shape[2])
        assert error <= allowed, f"{name}: value off by {error:.3e}, allowed {allowed:.3e}"
    error, allowed = _worst(grad, exact_grad), 2 * _worst(plain_grad.to(dtype), exact_grad) + ulp
    assert error <= allowed, f"{name}: gradient off by {error:.3e}, allowed {allowed:.3e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and values, NaN counting as equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same(name: str, a: Inputs, b: Inputs, pick: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Outputs and gradients of the op on a and on b are bit for bit equal (of both, what `pick` takes)."""
    (values_a, grad_a), (values_b, grad_b) = value_and_grad(OPS[name], a), value_and_grad(OPS[name], b)
    for x, y in zip([*values_a, grad_a], [*values_b, grad_b], strict=True):
        assert same_bits(pick(x), pick(y)), name
