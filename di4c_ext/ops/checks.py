"""Validation of what users pass: every message names the op, the argument, what came and what is expected.

Shapes, dtypes and devices are checked before the op is called, also under torch.compile. Values are checked
inside the op, on the CPU alone: on a GPU looking at them would stop the host.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from di4c_ext.ops.logits import Logits

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_STATES = 1 << 18  # config.h: kMaxStates
MAX_STREAM = (1 << 31) - 1


def sum_dtype(logits: Logits) -> torch.dtype:
    """What sums over these logits come back as: float32, float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def shape(tensor: Logits) -> tuple[int, ...]:
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


def indices(op: str, name: str, value: object, expected: tuple[int, ...], letters: str, beside: Logits) -> Tensor:
    """An int64 tensor of exactly this shape on the device of `beside`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be an int64 tensor {letters}, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}; convert with .long()")
    if shape(value) != expected:
        raise ValueError(f"{op}: {name} must have shape {letters} = {expected}, got {shape(value)}")
    same_device(op, name, value, beside)
    return value


def sequences(op: str, name: str, value: object, beside: Logits) -> Tensor:
    """int64 tokens (B, K, D), any K."""
    if not isinstance(value, Tensor) or value.dim() != 3:
        kind = f"shape {shape(value)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name} must be an int64 tensor (B, K, D), got {kind}")
    return indices(op, name, value, (beside.shape[0], value.shape[1], beside.shape[-2]), "(B, K, D)", beside)


def same_device(op: str, name: str, value: Logits, beside: Logits) -> None:
    if value.device != beside.device:
        raise ValueError(f"{op}: {name} must be on {beside.device} like the logits, got {value.device}")


def constant(op: str, name: str, value: Tensor) -> Tensor:
    """A tensor the op has no gradient for."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} is a constant of this op but requires grad; pass {name}.detach()")
    return value


def target(op: str, value: object, dims: tuple[int, ...], letters: str, beside: Logits) -> Tensor:
    """Constant target logits: same B, D, S and device as `beside`; any floating dtype."""
    checked = constant(op, "target", logits(op, "target", value, dims, letters))
    alike(op, "target", checked, letters, beside)
    return checked


def alike(op: str, name: str, value: Logits, letters: str, beside: Logits) -> None:
    """Same B, D, S and device as the logits."""
    ends = (value.shape[0], *value.shape[-2:])
    expected = (beside.shape[0], *beside.shape[-2:])
    if ends != expected:
        raise ValueError(f"{op}: {name} {letters} must have the logits' B, D, S = {expected}, got shape {shape(value)}")
    same_device(op, name, value, beside)


def weight(op: str, value: object, beside: Logits) -> Tensor | None:
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


def inside(op: str, value: object, beside: Logits) -> Tensor | None:
    """None, or a mask of samples (B,) as bool."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: inside must be None or a bool tensor (B,), got {type(value).__name__}")
    if value.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{op}: inside must be bool, got {value.dtype}; say which samples, as in t <= window")
    if shape(value) != (beside.shape[0],):
        raise ValueError(f"{op}: inside must have shape (B,) = ({beside.shape[0]},), got {shape(value)}")
    same_device(op, "inside", value, beside)
    return value.to(torch.bool)


def weight_values(op: str, value: Tensor | None) -> None:
    """Weights are >= 0; looked at on the CPU only."""
    if value is None or value.device.type != "cpu" or value.numel() == 0 or value.amin().item() >= 0:
        return
    worst = value[~(value >= 0)][0].item()
    raise ValueError(f"{op}: weight must be >= 0 everywhere, got {worst}")


def token_values(op: str, tokens: Tensor, weights: Tensor | None, states: int, name: str = "tokens") -> None:
    """Tokens (B, [K,] D) lie in [0, S) wherever the weight is not 0; looked at on the CPU only."""
    if tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    smallest, largest = tokens.aminmax()
    if smallest.item() >= 0 and largest.item() < states:
        return  # by far the most common case, in one pass
    outside = (tokens < 0) | (tokens >= states)
    if weights is not None:
        outside = outside & ((weights if tokens.dim() == 2 else weights[:, None]) != 0)
    if bool(outside.any()):
        at = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{op}: {name} must lie in [0, S) = [0, {states}) where the weight is not 0, got {tokens[at].item()} at "
            f"index {at}; give such positions weight 0"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def count(op: str, name: str, value: int, smallest: int = 0) -> None:
    if not _is_integer(value):
        raise TypeError(f"{op}: {name} must be an integer >= {smallest}, got {value!r}")
    if value < smallest:
        raise ValueError(f"{op}: {name} must be an integer >= {smallest}, got {value!r}")


def draws(op: str, value: int | None) -> int:
    """How many draws per row: one for None."""
    if value is None:
        return 1
    count(op, "draws", value)
    return value


def stream(op: str, value: int) -> None:
    if not _is_integer(value):
        raise TypeError(f"{op}: stream must be an integer in [0, 2^31 - 1), got {value!r}")
    if value < 0 or value >= MAX_STREAM:
        raise ValueError(f"{op}: stream must be an integer in [0, 2^31 - 1), got {value!r}")


def temperature(op: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{op}: temperature must be finite and >= 0 (0 takes the largest logit), got {value!r}")
    if not (0.0 <= value < math.inf):
        raise ValueError(f"{op}: temperature must be finite and >= 0 (0 takes the largest logit), got {value!r}")
