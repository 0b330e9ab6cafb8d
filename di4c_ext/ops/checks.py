"""Validation of what users pass: every message names the op, the argument, what came and what is expected.

Shapes, dtypes and devices are checked before the op is called, also under torch.compile. Values are checked
inside the op, on the CPU alone: on a GPU looking at them would stop the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_STATES = 1 << 18  # config.h: kMaxStates
MAX_STREAM = (1 << 31) - 1


def sum_dtype(logits: Tensor) -> torch.dtype:
    """What sums over these logits come back as: float32, float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def logits(op: str, name: str, value: object, dims: tuple[int, ...], letters: str) -> Tensor:
    """A floating tensor with one of these numbers of dimensions and 1 <= S <= 2^18 classes last."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {letters}, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{op}: {name} must have shape {letters}, got {shape(value)}")
    states = value.shape[-1]
    if states < 1 or states > MAX_STATES:
        raise ValueError(
            f"{op}: {name} must have between 1 and {MAX_STATES} classes in its last dimension, got {states}"
        )
    return value


def indices(op: str, name: str, value: object, expected: tuple[int, ...], letters: str, beside: Tensor) -> Tensor:
    """An int64 tensor of exactly this shape on the device of `beside`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 tensor {letters}, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}; convert with .long()")
    if shape(value) != expected:
        raise ValueError(f"{op}: {name} must have shape {letters} = {expected}, got {shape(value)}")
    same_device(op, name, value, beside)
    return value


def same_device(op: str, name: str, value: Tensor, beside: Tensor) -> None:
    if value.device != beside.device:
        raise ValueError(f"{op}: {name} must be on {beside.device} like the logits, got {value.device}")


def constant(op: str, name: str, value: Tensor) -> Tensor:
    """A tensor the op has no gradient for."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} is a constant of this op but requires grad; pass {name}.detach()")
    return value


def target(op: str, value: object, dims: tuple[int, ...], letters: str, beside: Tensor) -> Tensor:
    """Constant target logits: same B, D, S and device as `beside`; any floating dtype."""
    checked = constant(op, "target", logits(op, "target", value, dims, letters))
    ends = (checked.shape[0], *checked.shape[-2:])
    expected = (beside.shape[0], *beside.shape[-2:])
    if ends != expected:
        raise ValueError(
            f"{op}: target {letters} must have the logits' B, D, S = {expected}, got shape {shape(checked)}"
        )
    same_device(op, "target", checked, beside)
    return checked


def weight(op: str, value: object, beside: Tensor) -> Tensor | None:
    """None, or constant weights (B, D) in the dtype the op accumulates in; bool and int masks are converted."""
    if value is None:
        return None
    expected = (beside.shape[0], beside.shape[-2])
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: weight must be None or a tensor (B, D), got {type(value).__name__}")
    if shape(value) != expected:
        raise ValueError(f"{op}: weight must have shape (B, D) = {expected}, got {shape(value)}")
    if value.is_complex():
        raise TypeError(f"{op}: weight must be real, got {value.dtype}")
    same_device(op, "weight", value, beside)
    dtype = sum_dtype(beside)
    return constant(op, "weight", value).to(dtype).contiguous()


def weight_values(op: str, value: Tensor | None) -> None:
    """Weights are >= 0; looked at on the CPU only."""
    if value is not None and value.device.type == "cpu" and not bool((value >= 0).all()):
        worst = value[~(value >= 0)][0].item()
        raise ValueError(f"{op}: weight must be >= 0 everywhere, got {worst}")


def token_values(op: str, tokens: Tensor, weights: Tensor | None, states: int) -> None:
    """Tokens (B, [K,] D) lie in [0, S) wherever the weight is not 0; looked at on the CPU only."""
    if tokens.device.type != "cpu":
        return
    outside = (tokens < 0) | (tokens >= states)
    if weights is not None:
        outside = outside & ((weights if tokens.dim() == 2 else weights[:, None]) != 0)
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{op}: tokens must lie in [0, S) = [0, {states}) where the weight is not 0, got {tokens[at].item()} at "
            f"index {at}; give such positions weight 0"
        )


def count(op: str, name: str, value: int | None, smallest: int = 0) -> None:
    if value is not None and (isinstance(value, bool) or value < smallest):
        raise ValueError(f"{op}: {name} must be an integer >= {smallest}, got {value!r}")


def stream(op: str, value: int) -> None:
    if value < 0 or value >= MAX_STREAM:
        raise ValueError(f"{op}: stream must be an integer in [0, 2^31 - 1), got {value!r}")


def temperature(op: str, value: float) -> None:
    if not (0.0 <= value < math.inf):
        raise ValueError(f"{op}: temperature must be finite and >= 0 (0 takes the largest logit), got {value!r}")
