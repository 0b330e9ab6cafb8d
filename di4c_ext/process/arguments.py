"""Validation of what callers pass to a process: every message names process, method, argument and value.

Values are looked at on the CPU alone: on another device that would stop the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from di4c_ext.ops import Logits
from di4c_ext.process.base import Time


def time(process: str, name: str, t: Time, dims: int = 1) -> Tensor:
    """A time in [0, 1] as a float64 tensor of at most so many dimensions: (), (B,), (B, n)."""
    value = torch.as_tensor(t, dtype=torch.float64)
    if value.ndim > dims:
        letters = "(B,)" if dims == 1 else "(B,) or (B, draws)"
        raise ValueError(f"{process}: {name} must be a number or {letters}, got shape {tuple(value.shape)}")
    if value.device.type == "cpu" and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{process}: {name} must lie in [0, 1], 1 = noise, 0 = data; got {_short(value)}")
    return value


def falling(process: str, t: Tensor, s: Tensor) -> None:
    """A step leads from t down to a smaller s."""
    if t.device.type == s.device.type == "cpu" and not bool((s < t).all()):
        raise ValueError(
            f"{process}: a step goes from t down to a smaller s, got "
            f"t = {_short(t)}, s = {_short(s)}; swap them or space the times out"
        )


def one_a_sample(caller: str, name: str, value: Tensor, x: Tensor) -> None:
    """value is () or (B,), x (B, ...)."""
    if value.ndim and value.shape != (x.shape[0],):
        raise ValueError(
            f"{caller}: {name} must be a number or ({x.shape[0]},), one a sample, got {tuple(value.shape)}"
        )


def per_sample(caller: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """() or (B,) as (B,) on the device of the states x (B, ...); a number is filled in there, not copied over."""
    if value.ndim == 0 and value.device.type == "cpu":
        return torch.full((x.shape[0],), value.item(), dtype=value.dtype, device=x.device)
    one_a_sample(caller, name, value, x)
    return value.to(x.device).expand(x.shape[0])


def times_of_draws(caller: str, t: Time, x: Tensor, draws: int | None) -> Tensor:
    """One time for all of x (B, D), one for each sample, or one for each of `draws`: (), (B,) or (B, draws)."""
    process, _, _ = caller.partition(".")
    value = time(process, "t", t, dims=1 if draws is None else 2)
    if value.ndim < 2:
        one_a_sample(caller, "t", value, x)
    elif value.shape != (x.shape[0], draws):
        raise ValueError(
            f"{caller}: t must be a number, ({x.shape[0]},) or (B, draws) = ({x.shape[0]}, {draws}), "
            f"got {tuple(value.shape)}"
        )
    return value


def states(caller: str, name: str, x: Tensor, keys: Tensor | None) -> None:
    """x is int64 (B, D), with a key to each sample where keys are asked for."""
    if x.ndim != 2 or x.dtype != torch.int64:
        raise ValueError(f"{caller}: {name} must be int64 (B, D), got {x.dtype} {tuple(x.shape)}")
    if keys is not None and keys.shape != (x.shape[0],):
        raise ValueError(f"{caller}: keys must be ({x.shape[0]},), one a sample of {name}, got {tuple(keys.shape)}")


def logits(caller: str, value: Logits, x: Tensor, num_states: int) -> None:
    """A row of S logits to each state of x."""
    expected = (*x.shape, num_states)
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{caller}: logits must be {expected}, the states' shape and then S = {num_states}, "
            f"got {tuple(value.shape)}"
        )


def known_states(caller: str, name: str, x: Tensor, num_states: int) -> None:
    """Every entry of x is one of the S states."""
    if x.device.type != "cpu" or x.numel() == 0:
        return
    smallest, largest = (int(v) for v in x.aminmax())
    if smallest < 0 or largest >= num_states:
        raise ValueError(
            f"{caller}: {name} must hold states 0..{num_states - 1}, got {smallest if smallest < 0 else largest}"
        )


def prior_shape(process: str, shape: Sequence[int], keys: Tensor) -> tuple[int, int]:
    """(B, D), with a key to each sample."""
    if len(shape) != 2 or shape[0] != keys.shape[0]:
        raise ValueError(
            f"{process}.prior: shape must be (B, D) with one key a sample, got {tuple(shape)} and keys "
            f"{tuple(keys.shape)}"
        )
    return shape[0], shape[1]


def draws(caller: str, value: int | None) -> int:
    """How many draws: one for None."""
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{caller}: draws must be None or a number of draws >= 0, got {value!r}")
    return value


def _short(value: Tensor) -> str:
    listed = value.flatten()[:4].tolist()
    return str(listed[0]) if value.ndim == 0 else f"{listed}{'...' if value.numel() > 4 else ''}"
