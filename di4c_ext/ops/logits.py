"""What ops take for logits: a tensor (B, L, D, S), or one of two short forms from which the S states are computed.

Logistic(mean, log_scale, num_states) is a pixel network's head, Hidden(states, weight, bias) a token network's last
layer left unapplied. The ops never hold either's logits whole; `.logits()` does, and is the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear

from di4c_ext.ops import checks
from di4c_ext.ops.reference.logistic import logistic_logits


class Logistic(NamedTuple):
    """S states as the bins of a logistic distribution, cut to [-1, 1] (equation in ops/reference/logistic.py).

    mean, log_scale: (B, L, D) or (B, D), alike in shape, dtype and device; half floats are computed with in float32.
    A mean of -1 is the first state's left edge, 1 the last one's right edge; a log-scale of 0 is a scale of e^-2.
    """

    mean: Tensor
    log_scale: Tensor
    num_states: int

    @property
    def shape(self) -> torch.Size:
        """Of the logits: (B, [L,] D, S)."""
        return torch.Size((*self.mean.shape, self.num_states))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two, where they differ."""
        return torch.promote_types(self.mean.dtype, self.log_scale.dtype)

    def logits(self) -> Tensor:
        """The logits (B, [L,] D, S), differentiable; float32, or float64 where either number is."""
        return logistic_logits(*_alike(self.mean, self.log_scale), self.num_states)


class Hidden(NamedTuple):
    """The states (B, L, D, H) or (B, D, H) of the last layer, and the head that makes S logits of each.

    weight: (S, H). bias: (S,) or None. Logits are states @ weight.T + bias, in the states' dtype. certain: (B, L, D) or
    (B, D) int64, the class that a position has for sure, whatever its states say, and -1 where they decide; or None.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    certain: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the logits: (B, [L,] D, S)."""
        return torch.Size((*self.states.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.states.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the states."""
        return self.states.dtype

    def logits(self) -> Tensor:
        """The logits (B, [L,] D, S), differentiable."""
        made = linear(self.states, self.weight, self.bias)
        return made if self.certain is None else settled(made, self.certain)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Hidden:
        """The same head after `change` of the leading dimensions (B, [L,] D), which it is called with both as those of
        the states and of what is certain."""
        return self._replace(states=change(self.states), certain=None if self.certain is None else change(self.certain))


Logits: TypeAlias = Tensor | Logistic | Hidden


def settled(logits: Tensor, certain: Tensor) -> Tensor:
    """Logits (..., S), anew, in which class certain (...) >= 0 has 0 and all others -inf; -1 leaves a row alone."""
    known = (certain >= 0)[..., None]
    here = torch.arange(logits.shape[-1], device=logits.device) == certain[..., None]
    return logits.masked_fill(known, 0.0).masked_fill(known & ~here, -torch.inf)


def packed(value: Logistic) -> Tensor:
    """A Logistic as the registered ops take it: (..., 2) of mean and log-scale, float32 or float64; differentiable."""
    return torch.stack(_alike(value.mean, value.log_scale), -1)


def checked(op: str, name: str, value: Logistic, dims: tuple[int, ...], letters: str) -> Logistic:
    """A Logistic whose fields agree.

    Args:
        op, name: of the caller and its argument, for messages.
        dims: numbers of dimensions that the mean may have.
        letters: its shape in words, such as "(B, L, D)".

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    for field, x in (("mean", value.mean), ("log_scale", value.log_scale)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}.{field} must be a tensor {letters}, got {type(x).__name__}")
        if x.dtype not in checks.FLOATS:
            raise TypeError(f"{op}: {name}.{field} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    mean, log_scale = value.mean, value.log_scale
    if mean.dim() not in dims:
        raise ValueError(f"{op}: {name}.mean must have shape {letters}, got {checks.shape(mean)}")
    if mean.shape != log_scale.shape:
        raise ValueError(
            f"{op}: {name}.log_scale must have the mean's shape {checks.shape(mean)}, got {checks.shape(log_scale)}"
        )
    if mean.device != log_scale.device:
        raise ValueError(f"{op}: {name}.log_scale must be on {mean.device} like the mean, got {log_scale.device}")
    states = value.num_states
    if isinstance(states, bool) or not isinstance(states, int | torch.SymInt):
        raise TypeError(f"{op}: {name}.num_states must be an integer, got {states!r}")
    if states < 1 or states > checks.MAX_STATES:
        raise ValueError(f"{op}: {name}.num_states must lie between 1 and {checks.MAX_STATES}, got {states}")
    return value


def _alike(mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 where either is, else in float32."""
    dtype = torch.float64 if torch.float64 in (mean.dtype, log_scale.dtype) else torch.float32
    return mean.to(dtype), log_scale.to(dtype)
