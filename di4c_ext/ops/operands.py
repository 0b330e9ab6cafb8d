"""Logits, teacher and target in any of their three forms: checked, and laid out as the operators take them."""

from __future__ import annotations

from torch import Tensor

from di4c_ext.ops import checks
from di4c_ext.ops.logits import Hidden, Logistic, Logits, checked, packed

MIXTURE, ROWS, TARGET = "(B, L, D, S)", "(B, D, S)", "(B, D, S) or (B, T, D, S)"


def mixture(op: str, value: object) -> Logits:
    """The student's logits (B, L, D, S), L >= 1."""
    x = _logits(op, "logits", value, (4,), MIXTURE)
    checks.count(op, "L, the second dimension of logits,", x.shape[1], 1)
    return x


def teacher(op: str, value: object, beside: Logits) -> Logits:
    """Constant logits (B, D, S), or as a Hidden a mixture (B, T, D, S), T >= 1."""
    if not isinstance(value, Hidden):
        return _constant(op, "teacher", value, (3,), ROWS, beside)
    y = _constant(op, "teacher", value, (3, 4), TARGET, beside)
    if len(y.shape) == 4:
        checks.count(op, "T, the second dimension of teacher,", y.shape[1], 1)
    return y


def target(op: str, value: object, beside: Logits) -> Logits:
    """Constant logits as a mixture (B, T, D, S), T >= 1: of one component where the caller gave none."""
    y = _constant(op, "target", value, (3, 4), TARGET, beside)
    if len(y.shape) == 4:
        checks.count(op, "T, the second dimension of target,", y.shape[1], 1)
        return y
    if isinstance(y, Logistic):
        return Logistic(y.mean.unsqueeze(1), y.log_scale.unsqueeze(1), y.num_states)
    return one_component(y) if isinstance(y, Hidden) else y.unsqueeze(1)


def one_component(value: Hidden) -> Hidden:
    """(B, D, S) as the mixture (B, 1, D, S)."""
    return value.mapped(lambda x: x.unsqueeze(1))


def laid_out(*values: Tensor | Logistic | None) -> tuple[list[Tensor | None], int | None]:
    """Every value as a tensor, and S where they are packed: if all are Logistic they stay rows of two floats, mean and
    log-scale; beside logits a Logistic is turned into logits."""
    given = [value for value in values if value is not None]
    if isinstance(given[0], Logistic) and all(isinstance(value, Logistic) for value in given):
        return [packed(v) if isinstance(v, Logistic) else None for v in values], given[0].num_states
    return [v.logits() if isinstance(v, Logistic) else v for v in values], None


def _logits(op: str, name: str, value: object, dims: tuple[int, ...], letters: str) -> Logits:
    if isinstance(value, Logistic):
        return checked(op, name, value, tuple(n - 1 for n in dims), letters.replace(", S", ""))
    if isinstance(value, Hidden):
        return hidden(op, name, value, dims, letters.replace("S", "H"))
    if isinstance(value, Tensor):
        return checks.logits(op, name, value, dims, letters)
    raise TypeError(f"{op}: {name} must be a tensor {letters}, a Logistic or a Hidden, got {type(value).__name__}")


def hidden(op: str, name: str, value: Hidden, dims: tuple[int, ...], letters: str) -> Hidden:
    """States with one of these numbers of dimensions, and a head that fits them."""
    head = {"states": value.states, "weight": value.weight, **({} if value.bias is None else {"bias": value.bias})}
    for field, x in head.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}.{field} must be a tensor, got {type(x).__name__}")
        if x.dtype not in checks.FLOATS:
            raise TypeError(f"{op}: {name}.{field} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        checks.same_device(op, f"{name}.{field}", x, value.states)
    if value.states.dim() not in dims:
        raise ValueError(f"{op}: {name}.states must have shape {letters}, got {checks.shape(value.states)}")
    width = value.states.shape[-1]
    if value.weight.dim() != 2 or value.weight.shape[1] != width or not 1 <= value.weight.shape[0] <= checks.MAX_STATES:
        raise ValueError(
            f"{op}: {name}.weight must have shape (S, H) with H = {width} and S between 1 and {checks.MAX_STATES}, "
            f"got {checks.shape(value.weight)}"
        )
    if value.certain is not None:
        checks.indices(op, f"{name}.certain", value.certain, checks.shape(value.states)[:-1], "of the states", value)
    if value.bias is not None and checks.shape(value.bias) != checks.shape(value.weight)[:1]:
        raise ValueError(
            f"{op}: {name}.bias must be None or have shape (S,) = {checks.shape(value.weight)[:1]}, "
            f"got {checks.shape(value.bias)}"
        )
    return value


def _constant(op: str, name: str, value: object, dims: tuple[int, ...], letters: str, beside: Logits) -> Logits:
    y = _logits(op, name, value, dims, letters)
    # The head of a constant Hidden may require grad, it is often the student's own; its states may not.
    for part in (y,) if isinstance(y, Tensor) else y[:1] if isinstance(y, Hidden) else y:
        if isinstance(part, Tensor):
            checks.constant(op, name, part)
    checks.alike(op, name, y, letters, beside)
    return y
