"""Opens checkpoint files that others have published, and holds their weights against a model's.

Such files are pickles, which may run any code when opened. Here they are read by torch's weights-only reader, which
makes tensors, numbers, strings and containers of them and refuses all else by name. Allowed on top are NumPy's numbers,
which optimisers' states hold; they are read by the few lines below, not by NumPy's own functions. And classes of the
frameworks that models are trained with, which their files name beside the weights (a callback, a configuration): an
empty object stands for each, what the file says of it is forgotten, and the framework need not be installed.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from di4c_ext import manifest

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_NAMED = 20  # names of one fault that a message lists
REMEDY = "for a network of another size name its settings by --model_config"

Network = TypeVar("Network", bound=nn.Module)


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
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
]
_FRAMEWORKS = re.compile(r"(pytorch_lightning|lightning|omegaconf)\.|typing\.Any$")


class _Inert:
    """What a file means by an object of a framework: takes whatever is said of it and keeps nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """The dict in a checkpoint file, its tensors on the CPU; nothing in the file is executed.

    Raises ValueError naming the file and what it holds beside tensors and numbers, or why it cannot be read.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a checkpoint as its authors published it")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if zipfile.is_zipfile(file):
        manifest.check_archive(file)
    stand_ins: dict[str, Any] = {}
    while True:
        try:
            found = _read(file, [(stand_in, name) for name, stand_in in stand_ins.items()])
            break
        except Exception as error:  # a damaged pickle can raise anything
            name = _refused_name(error)
            if name is None or name in stand_ins or not _FRAMEWORKS.match(name):
                raise ValueError(f"{file}: {_reason(error)}") from error
            stand_ins[name] = type(name, (_Inert,), {})  # each its own: files have such classes as keys
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, a dict of weights is wanted")
    return found


def _read(file: Path, stand_ins: Sequence[Any]) -> Any:
    with torch.serialization.safe_globals([*_ALLOWED, *stand_ins]):
        # Mapped, an optimiser's state that nobody asks for is never read. Files from before torch 1.6 are no zips.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _read_safetensors(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(file))
    except Exception as error:  # its own class of error, or the reader's of a file cut short
        raise ValueError(f"{file}: cannot be read ({error}); the file is damaged, copy it again") from error


def _refused_name(error: Exception) -> str | None:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    return named[1] if named else None


def _reason(error: Exception) -> str:
    text, name = str(error), _refused_name(error)
    if name:
        return (
            f"names {name}, which no checkpoint of weights needs; it was refused and nothing in the file was "
            "executed. Get the file from its authors again"
        )
    told = re.search(r"WeightsUnpickler error:\s*(.*)", text)
    first = told[1] if told else f"{type(error).__name__} {text.splitlines()[0] if text else ''}".strip()
    return f"cannot be read ({first}); the file is damaged or no checkpoint, copy it again"


def state_of(contents: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The weights that a file has under `key`, or the file itself where it is nothing but weights."""
    state = contents.get(key, contents)
    return state if isinstance(state, Mapping) else {}


def load_exactly(make: Callable[[], Network], weights: Mapping[str, Any]) -> Network:
    """A network with these weights, in evaluation mode; ValueError naming every one that is not as `make` has it."""
    with torch.device("meta"):
        wanted = make().state_dict()
    check_state("weights", wanted, weights, REMEDY)
    model = make()
    model.load_state_dict(weights)
    return model.eval()


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


def named_average(key: str, average: Any, names: Sequence[str]) -> dict[str, Any]:
    """A moving average that a file lists without names, under `names`: the order in which the file has its weights.

    key: what the file calls the list, for the messages of the ValueError where it is none, or of another length.
    """
    if not isinstance(average, (list, tuple)):
        raise ValueError(f"{key} is a {type(average).__name__}, a list of tensors is wanted")
    if len(average) != len(names):
        raise ValueError(
            f"{key} lists {len(average)} tensors, the file has {len(names)} weights; its average cannot be told apart"
        )
    return dict(zip(names, average, strict=True))


def number(kind: type, value: Any) -> Any:
    """A number that a file holds, plain or as a tensor of one; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return kind(value) if isinstance(value, (int, float)) else None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return "[" + ", ".join(names[:_NAMED]) + "]" + more
