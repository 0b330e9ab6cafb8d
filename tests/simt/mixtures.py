"""Calls of the mixture's kernels, and their comparison with the float64 definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import emulate
import torch
from comparison import check, check_planes, poison
from torch import Tensor

from di4c_ext.ops import reference
from di4c_ext.ops.reference.mixture import unread
from di4c_ext.ops.reference.objective import packed_gradient, split_weight, unpacked

POSITIONS = 16  # config.h: kPositions
PARTS = 4  # api.h: kParts


@dataclass(frozen=True)
class Mixture:
    """What the op is given. Logistic operands are packed, (..., 2) float32."""

    logits: Tensor  # (B, L, D, S)
    teacher: Tensor | None = None  # (B, 1, D, S)
    target: Tensor | None = None  # (B, T, D, S)
    first: Tensor | None = None  # (B, D)
    tokens: Tensor | None = None  # (B, K, D)
    inside: Tensor | None = None  # (B,) uint8
    weight: Tensor | None = None  # (B, D)
    information: bool = False
    logistic_states: int | None = None

    def sequences(self) -> Tensor | None:
        """All of them, (B, K, D)."""
        if self.first is None:
            return self.tokens
        return self.first[:, None] if self.tokens is None else torch.cat([self.first[:, None], self.tokens], 1)

    def poisoned(self) -> Mixture:
        """NaN in all rows that no kernel may read."""
        outside = split_weight(self.logits, self.weight, self.inside)[1]
        return replace(
            self,
            logits=poison(self.logits, self.weight),
            teacher=None if self.teacher is None else poison(self.teacher, self.weight),
            target=None if self.target is None else poison(self.target, outside),
        )

    def computed(self, dtype: torch.dtype | None) -> Mixture:
        """With logits in that dtype, or their own, in place of two numbers a row."""

        def operand(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x if dtype is None else x.to(dtype)
            return x if self.logistic_states is None else unpacked(x, self.logistic_states)

        logits = operand(self.logits)
        assert logits is not None
        return replace(self, logits=logits, teacher=operand(self.teacher), target=operand(self.target))


class Result(NamedTuple):
    joint: Tensor
    correlation: Tensor
    parts: Tensor
    grad: Tensor
    lse: Tensor
    lse_teacher: Tensor
    lse_target: Tensor
    share: Tensor
    pull: Tensor


def upstream(batch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of joint, correlation and parts."""

    def spread(*shape: int) -> Tensor:
        return torch.linspace(-1.0, 2.0, torch.Size(shape).numel() + 1)[1:].view(*shape)

    return spread(batch, count), 0.5 - spread(batch, count), 1.3 - spread(PARTS, batch)  # none of the last is 0


def _inputs(m: Mixture, pad: int, offset: int) -> dict[str, object]:
    batch, latents, length, last = m.logits.shape

    def operand(x: Tensor | None, offset: int) -> emulate.Layout | None:
        if x is None:
            return None
        if m.logistic_states is None:
            return emulate.lay_out(x, pad, offset)
        return replace(emulate.lay_out(x, 2 * pad, offset), dtype=emulate.LOGISTIC)

    count = m.sequences()
    return {
        "logits": operand(m.logits, offset),
        "teacher": operand(m.teacher, (offset + 2) % 4),
        "target": operand(m.target, (offset + 1) % 4),
        **_apart("first", m.first),
        **_apart("tokens", m.tokens),
        **{"inside": m.inside, "weight": m.weight},
        **{"B": batch, "L": latents, "D": length, "S": m.logistic_states or last},
        "K": 0 if count is None else count.shape[1],
        "T": 0 if m.target is None else m.target.shape[1],
    }


def _apart(name: str, tokens: Tensor | None) -> dict[str, object]:
    """Tokens (B, [K,] D) with positions farthest apart in memory, and their strides."""
    if tokens is None:
        return {}
    stored = tokens.movedim(-1, 0).clone(memory_format=torch.contiguous_format)
    stride_d, stride_b, *stride_k = stored.stride()
    strides = {"stride_b": stride_b, "stride_k": stride_k[0] if stride_k else 0, "stride_d": stride_d}
    return {name: stored, **{f"{name}_{stride}": value for stride, value in strides.items()}}


def run(
    m: Mixture,
    *,
    pad: int = 0,
    offset: int = 0,
    orders: Sequence[int] = emulate.ORDERS,
    capability: int = 75,
    in_place: bool = False,
) -> Result:
    """The kernels' results, forward and backward (for the output gradients that `upstream` gives)."""
    batch, latents, length, _ = m.logits.shape
    inputs = _inputs(m, pad, offset)
    count, targets = inputs["K"], inputs["T"]
    assert isinstance(count, int) and isinstance(targets, int)
    pulls = (m.teacher is not None) + (m.target is not None)
    shapes = {
        "joint": (batch, count),
        "correlation": (batch, count),
        "parts": (PARTS, batch),
        "lse": (2, batch, latents, length),
        "lse_teacher": (2, batch, 0 if m.teacher is None else 1, length),
        "lse_target": (2, batch, targets, length),
        "share": (batch, latents, count),
        "pull": (pulls, batch, latents, length),
        "row": (PARTS, batch, length),
    }
    work = {"work": ((batch, -(-length // POSITIONS), latents + 1, count), torch.float64)}
    forward = emulate.run(
        "mixture",
        {**inputs, "information": int(m.information)},
        {name: (shape, torch.float32) for name, shape in shapes.items()} | work,
        orders=orders,
        capability=capability,
    )
    kept = {name: forward[name] for name in ("lse", "lse_teacher", "lse_target", "share", "pull")}
    values = {name: forward[name] for name in ("joint", "correlation")}
    grads = dict(zip(("grad_joint", "grad_correlation", "grad_parts"), upstream(batch, count), strict=True))
    backward = emulate.run(
        "mixture_backward",
        {**inputs, **values, **kept, **grads, "in_place": int(in_place)},
        {"grad": (m.logits.shape, m.logits.dtype)},
        orders=orders,
        capability=capability,
    )
    return Result(forward["joint"], forward["correlation"], forward["parts"], backward["grad"], **kept)


def definition(m: Mixture, dtype: torch.dtype | None) -> Result:
    """The same by the definition, in that dtype or the logits' own."""
    x = m.computed(dtype)
    teacher = None if x.teacher is None else x.teacher[:, 0]
    operands = (x.logits, teacher, x.target, x.sequences(), x.inside, x.weight)
    joint, correlation, parts, *kept = reference.mixture_forward(*operands, x.information)
    grads = [g.to(joint.dtype) for g in upstream(*joint.shape)]
    grad = reference.mixture_backward(*grads, *operands, joint, correlation, *kept)
    packed = m.logits if dtype is None else m.logits.to(dtype)
    return Result(joint, correlation, parts, packed_gradient(packed, grad, m.logistic_states), *kept)


def check_mixture(
    m: Mixture,
    *,
    pad: int = 0,
    offset: int = 0,
    orders: Sequence[int] = emulate.ORDERS,
    capability: int = 75,
    in_place: bool = False,
) -> Result:
    """Runs the kernels with NaN where nothing may be read, and compares all they give and keep."""
    got = run(m.poisoned(), pad=pad, offset=offset, orders=orders, capability=capability, in_place=in_place)
    compare(got, m)
    return got


def compare(got: Result, m: Mixture) -> None:
    exact, plain = definition(m, torch.float64), definition(m, None)
    for name in ("joint", "correlation", "parts", "grad", "share", "pull"):
        value = getattr(got, name)
        if name in ("parts", "pull"):  # each by its own size
            for i in range(value.shape[0]):
                check(value[i], getattr(exact, name)[i], getattr(plain, name)[i], f"{name}[{i}]")
        elif name == "grad" and m.logistic_states is not None:
            for i in range(2):
                check(value[..., i], exact.grad[..., i], plain.grad[..., i], f"grad[..., {i}]")
        else:
            check(value, getattr(exact, name), getattr(plain, name), name)
    if m.weight is not None:
        assert (got.grad.transpose(1, 2)[m.weight == 0] == 0).all()
    if m.logistic_states is None:  # to the bit, where the logits are no rounded numbers themselves
        outside = split_weight(m.logits, m.weight, m.inside)[1]
        check_planes(got.lse, m.logits, m.weight)
        if m.teacher is not None:
            check_planes(got.lse_teacher, m.teacher, m.weight)
        if m.target is not None:
            check_planes(got.lse_target, unread(m.target, outside), outside)
