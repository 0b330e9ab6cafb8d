"""Opens checkpoint files that others have published, and holds their weights against a model's.

Such files are pickles, which may run any code when opened. Here they are read by torch's weights-only reader, which
makes tensors, numbers, strings and containers of them and refuses all else by name. The one thing allowed on top are
NumPy's numbers, which optimisers' states hold; they are read by the few lines below, not by NumPy's own functions.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_NAMED = 20  # names of one fault that a message lists


class _NumberType:
    """What a file means by numpy.dtype, for numbers."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _NUMBERS:
            raise UnpicklingError(f"a NumPy value of type {code!r}, where only numbers are allowed")
        self.code = code

    def __setstate__(self, state: Sequence[Any]) -> None:
        if state[1] not in ("<", ">", "|"):
            raise UnpicklingError(f"a NumPy number of byte order {state[1]!r}")
        self.code = state[1] + self.code.lstrip("<>|")


def _number(kind: _NumberType, data: bytes) -> int | float | bool:
    """What a file means by a NumPy scalar."""
    if not isinstance(kind, _NumberType):
        raise UnpicklingError("a NumPy number without its type")
    value: int | float | bool = np.frombuffer(data, kind.code, count=1).item()
    return value


_ALLOWED: list[Any] = [
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),  # written under NumPy 1
    (_number, "numpy._core.multiarray.scalar"),
]


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file, its tensors on the CPU; nothing in the file is executed.

    Raises ValueError naming the file and what it holds beside tensors and numbers, or why it cannot be read.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a checkpoint as its authors published it")
    found: Any
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            # Mapped, an optimiser's state that nobody asks for is never read. Files from before torch 1.6 are no zips.
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{file}: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, a dict of weights is wanted")
    return found


def _reason(error: Exception) -> str:
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    if named:
        return (
            f"names {named[1]}, which no checkpoint of weights needs; it was refused and nothing in the file was "
            "executed. Get the file from its authors again"
        )
    told = re.search(r"WeightsUnpickler error:\s*(.*)", text)
    first = told[1] if told else f"{type(error).__name__} {text.splitlines()[0] if text else ''}".strip()
    return f"cannot be read ({first}); the file is damaged or no checkpoint, copy it again"


def check_state(where: str, wanted: Mapping[str, Tensor], state: Mapping[str, Any], remedy: str = "") -> None:
    """Raises ValueError unless `state` has exactly the names of `wanted`, each a floating tensor of that shape.

    Every kind of fault is named with the keys it concerns, the first 20 of each.
    """
    faults = [
        ("missing", [name for name in wanted if name not in state]),
        ("unexpected", [name for name in state if name not in wanted]),
    ]
    both = [(name, state[name], wanted[name]) for name in wanted if name in state]
    tensors = [(name, x, y) for name, x, y in both if isinstance(x, Tensor) and x.is_floating_point()]
    known = {name for name, _, _ in tensors}
    faults += [
        ("no floating tensor", [name for name, _, _ in both if name not in known]),
        (
            "of another shape",
            [f"{n} {tuple(x.shape)}, not {tuple(y.shape)}" for n, x, y in tensors if x.shape != y.shape],
        ),
    ]
    found = [f"{fault} {_listed(names)}" for fault, names in faults if names]
    if found:
        raise ValueError(
            f"{where}: the weights are not the model's: {'; '.join(found)}" + (f"; {remedy}" if remedy else "")
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "[" + ", ".join(names[:_NAMED]) + "]" + more
