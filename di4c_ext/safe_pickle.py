"""Reading a pickle without trusting it: arrays of numbers, dicts, lists, tuples, text and bytes, and nothing else.

A pickle is a program that may call what it names. Here it may name only what numpy's arrays are written with, and
those names lead to the stand-ins below: none of numpy's own code for pickles runs, and nothing else can be reached.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


class _Type:
    """Stands for numpy.dtype(code) with the byte order that its state names."""

    def __init__(self, code: Any, *_: Any) -> None:
        name = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or len(name) > 4 or np.dtype(name).kind not in "biuf":
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, not of numbers")
        self.value = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("it holds an array of records, not of numbers")
        self.value = np.dtype(order + self.value.str[1:])


class _Array:
    """Stands for numpy.ndarray; `value` is the array once its state has come."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        self.value = _filled(raw, kind, shape, "F" if fortran else "C")


class _ArrayName:
    """Stands for the class numpy.ndarray, which a pickle names but has no business calling."""


def _filled(raw: Any, kind: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(raw, bytes | bytearray):
        raise pickle.UnpicklingError("it holds an array without its numbers")
    return np.frombuffer(raw, kind.value).reshape(shape, order="F" if order == "F" else "C")


def _from_state(name: Any, *_: Any) -> _Array:
    if name is not _ArrayName:
        raise pickle.UnpicklingError("it holds an array of a class of its own")
    return _Array()


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _filled(raw, kind, shape, str(order))
    return array


def _bytes(text: Any, encoding: Any) -> bytes:
    """How older protocols write bytes: _codecs.encode(text, 'latin1')."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it holds bytes in an unknown encoding")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How older protocols write b''."""
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ArrayName,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _from_state,
    ("numpy._core.multiarray", "_reconstruct"): _from_state,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _bytes,
    ("builtins", "bytes"): _no_bytes,
    ("__builtin__", "bytes"): _no_bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was not run")
        return _ALLOWED[module, name]


def load(file: Path) -> Any:
    """What a pickle holds, with text of Python 2 as bytes; ValueError naming the file and what is wrong with it."""
    try:
        with open(file, "rb") as handle:
            return _plain(_Unpickler(handle, encoding="bytes").load())
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle can fail in any way; none of them may pass for another
        raise ValueError(
            f"{file}: refused, {error or type(error).__name__}; only arrays of numbers, dicts, lists and text are "
            "read from a pickle. Fetch the file again from where it is published"
        ) from error


def _plain(value: Any) -> Any:
    """The stand-ins replaced by the arrays."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
