"""One good call of every public op, in every form its logits may come in, to be changed in one argument at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Hidden, Logistic

DIVERGENCES = ("masked_kl", "masked_reverse_kl", "masked_js", "masked_tv")
MIXTURES = ("mixture_log_prob", "mixture_kl", "mixture_kl_of_mixture", "mixture_objective")
FORMS = ("", "_of_logistic", "_of_hidden")
NAMES = (
    *("random_bits", "sample_product", "reveal", "absorbing_step", *DIVERGENCES, "masked_cross_entropy"),
    *(name + form for name in ("sample_categorical", *MIXTURES) for form in FORMS),
)
FROM_HIDDEN = tuple(f"{name}_from_hidden" for name in MIXTURES if name != "mixture_kl_of_mixture")
SUMS = tuple(name for name in NAMES if name.startswith("m"))  # sums over positions, with a gradient


@dataclass(frozen=True)
class Call:
    """An op of di4c_ext.ops and its arguments by name: tensors, Logistic, Hidden and numbers."""

    op: str
    arguments: dict[str, Any]

    def __call__(self) -> tuple[Tensor, ...]:
        """The op's outputs."""
        result = getattr(ops, self.op)(**self.arguments)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def changed(self, **arguments: Any) -> Call:
        return replace(self, arguments={**self.arguments, **arguments})

    def each(self, change: Callable[[Tensor], Tensor]) -> Call:
        """With every tensor changed, also those within a Logistic or a Hidden."""
        return replace(self, arguments={name: _each(value, change) for name, value in self.arguments.items()})

    def to(self, device: torch.device) -> Call:
        return self.each(lambda x: x.to(device))

    def tensors(self) -> Iterator[Tensor]:
        for value in self.arguments.values():
            yield from (x for x in _parts(value) if isinstance(x, Tensor))


def _parts(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Logistic | Hidden) else (value,)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Logistic | Hidden):
        return type(value)(*(_each(part, change) for part in value))
    return change(value) if isinstance(value, Tensor) else value


def forward(call: Call) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The tensors of `logits`, requiring grad where the op has a gradient, and the outputs of the op on them."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    if call.op.startswith("m"):
        call = call.changed(logits=_each(call.arguments["logits"], leaf))
    return leaves, call()


def run(call: Call) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The outputs and the gradient of each tensor of `logits`, for fixed, unequal gradients of the outputs."""
    leaves, outputs = forward(call)
    summed = [o for o in outputs if o.requires_grad]
    if summed:
        grads = (torch.linspace(0.5, -1.5, o.numel() + 1, dtype=o.dtype, device=o.device)[1:] for o in summed)
        torch.autograd.backward(summed, [g.view(o.shape) for g, o in zip(grads, summed, strict=True)])
    return tuple(o.detach() for o in outputs), [x.grad for x in leaves]


def make(name: str, *given: Any, **options: Any) -> Call:
    """The call of this name; of X_from_hidden, the function that X calls for a Hidden, with its own arguments."""
    call = _make(name, *given, **options)
    if not name.endswith("_from_hidden"):
        return call
    kept = {} if call.op == "sample_categorical" else {"keep_bytes": 0}
    return replace(call.changed(chunk_bytes=1000, **kept), op=f"{call.op}_from_hidden")


def _make(
    name: str,
    states: int = 5,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    components: int = 4,
    length: int = 3,
    sequences: int = 2,
    mixed_target: int = 2,
    width: int = 6,
    weighted: bool = True,
) -> Call:
    """Normal logits, weights in [0.5, 1.5) where `weighted`, hidden states of this width."""
    g = torch.Generator().manual_seed(states)
    op = re.sub("_(of_logistic|of_hidden|from_hidden)$", "", name)

    def rows(*shape: int) -> Any:
        if name.endswith("_of_logistic"):
            mean = torch.rand(*shape, length, generator=g) * 2 - 1
            return Logistic(mean.to(dtype), torch.randn(*shape, length, generator=g).to(dtype), states)
        if name.endswith("_hidden"):
            head, bias = torch.randn(states, width, generator=g), torch.randn(states, generator=g)
            return Hidden(*(x.to(dtype) for x in (torch.randn(*shape, length, width, generator=g), head, bias)))
        return torch.randn(*shape, length, states, generator=g).mul(2).to(dtype)

    tokens = torch.randint(0, states, (batch, sequences, length), generator=g)
    weight = {"weight": torch.rand(batch, length, generator=g) + 0.5} if weighted else {}
    keys = random.keys(states, batch)
    if op == "random_bits":
        return Call(op, {"keys": keys, "n": 3, "stream_word": 0})
    if op == "sample_product":
        left, right, base = torch.rand(3, batch, states, states, dtype=torch.float64, generator=g)
        i, j = tokens[:, 0], tokens
        return Call(op, {"left": left, "right": right, "i": i, "j": j, "keys": keys, "base": base, "stream": 1})
    if op == "reveal":
        x_t = torch.where(torch.arange(length) % 3 < 2, states, tokens[:, 0])
        options = {"count": torch.full((batch,), 1), "mask_id": states, "noise": torch.full((batch,), 0.5), "stream": 1}
        log_prob = -torch.rand(tokens.shape, generator=g)
        return Call(op, {"x_t": x_t, "tokens": tokens, "log_prob": log_prob, "keys": keys, **options})
    if op == "sample_categorical":
        options = {"draws": 2, "stream": 1, "temperature": 0.7, "return_log_prob": True, "first_position": 4}
        return Call(op, {"logits": rows(batch), "keys": keys, **options})
    if op == "absorbing_step":
        x_t = torch.full((batch, length), states)
        options = {"unmask_prob": torch.full((batch,), 0.9), "mask_id": states, "draws": 2, "return_log_prob": True}
        return Call(op, {"logits": rows(batch), "x_t": x_t, "keys": keys, "stream": 1, "temperature": 0.7, **options})
    if op == "masked_cross_entropy":
        return Call(op, {"logits": rows(batch, components), "tokens": tokens[:, 0], **weight})
    if op in DIVERGENCES:
        return Call(op, {"target": rows(batch), "logits": rows(batch, components), **weight})
    logits = rows(batch, components)
    if op == "mixture_log_prob":
        return Call(op, {"logits": logits, "tokens": tokens, **weight})
    if op == "mixture_kl":
        return Call(op, {"target": rows(batch), "logits": logits, **weight})
    if op == "mixture_kl_of_mixture":
        return Call("mixture_kl", {"target": rows(batch, mixed_target), "logits": logits, **weight})
    given = {"teacher": rows(batch), "data": tokens[:, 0], "samples": tokens, "target": rows(batch, mixed_target)}
    return Call(op, {"logits": logits, **given, "information": True, **weight})
