"""Pickles that hold arrays are read, whatever wrote them; pickles that ask for more are refused and nothing is run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from di4c_ext import safe_pickle

ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    np.array([1.5, -2.0], dtype=">f8"),
    np.zeros((0, 3), dtype=np.float32),
    np.array(True),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values(tmp_path: Path, protocol: int) -> None:
    value = {"arrays": ARRAYS, b"bytes": b"\x00\xff", "more": (1, 2.5, None, True, "text", {"deep": [ARRAYS[0]]})}
    file = tmp_path / "value"
    file.write_bytes(pickle.dumps(value, protocol))
    found = safe_pickle.load(file)
    for mine, theirs in zip(found["arrays"], ARRAYS, strict=True):
        assert isinstance(mine, np.ndarray) and mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    assert found[b"bytes"] == b"\x00\xff" and found["more"][:5] == (1, 2.5, None, True, "text")
    assert np.array_equal(found["more"][5]["deep"][0], ARRAYS[0])


def python2(value: object) -> bytes:
    """A value as Python 2 pickled it under protocol 2: text and an array's numbers are its 8-bit strings."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(python2(item) for item in value) + b"e"
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(python2(n) for n in value.shape) + b"t"
    return made + b"(K\x01" + shape + kind + b"\x89" + python2(value.tobytes()) + b"tb"


def test_pickles_of_python_2(tmp_path: Path) -> None:
    content = b"\x80\x02" + python2({b"data": ARRAYS[0], b"labels": [3, 1], b"batch_label": b"one of five"}) + b"."
    if hasattr(np, "core"):  # numpy itself reads the bytes as meant
        assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], ARRAYS[0])
    (tmp_path / "batch").write_bytes(content)
    found = safe_pickle.load(tmp_path / "batch")
    assert found[b"labels"] == [3, 1] and found[b"batch_label"] == b"one of five"
    assert np.array_equal(found[b"data"], ARRAYS[0])


class Calls:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


class Subclass(np.ndarray):
    pass


RECURSIVE: list[object] = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(os.system, "touch {}"), r"asks for (posix|nt)\.system, which was not run"),
        (Calls(eval, "open('{}', 'w')"), r"asks for (builtins|__builtin__)\.eval, which was not run"),
        ([{"deep": Calls(exec, "open('{}', 'w')")}], r"asks for (builtins|__builtin__)\.exec"),
        (Calls(np.load, "{}", None, True), r"asks for numpy\.load"),
        (np.array([{}], dtype=object), "holds an array of 'O8', not of numbers"),
        (np.zeros(2, dtype=[("a", "u1"), ("b", "f4")]), "holds an array of 'V5', not of numbers"),
        (np.array(["text"]), "holds an array of 'U4', not of numbers"),
        (np.zeros(2).view(Subclass), r"asks for .*Subclass"),
        (np.float64(1.0), r"asks for numpy.*\.scalar"),
        ({1, 2}, r"asks for (builtins|__builtin__)\.set"),
        (RECURSIVE, "recursion"),
    ],
)
def test_refuses_what_is_no_plain_value(tmp_path: Path, value: object, message: str) -> None:
    trace = tmp_path / "trace"
    if isinstance(value, Calls):
        value.call = value.call[0], (str(value.call[1][0]).format(trace), *value.call[1][1:])
    file = tmp_path / "data_batch_1"
    file.write_bytes(pickle.dumps(value, 2))
    with pytest.raises(ValueError, match=rf"data_batch_1: refused, (?s:.*){message}(?s:.*)only arrays of numbers"):
        safe_pickle.load(file)
    assert not trace.exists()


_RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
_BYTE = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (b"no pickle at all", ""),
        (pickle.dumps(ARRAYS[0])[:40], ""),
        (_RECONSTRUCT + b"(cnumpy\ndtype\n(K\x00tU\x01btR.", "array of a class of its own"),
        (_RECONSTRUCT + b"(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x09t" + _BYTE + b"\x89U\x01atb.", "reshape"),
        (_RECONSTRUCT + b"(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x01tU\x02u1\x89U\x01atb.", "without its numbers"),
        (_RECONSTRUCT + b"(cnumpy\nndarray\n(K\x00tU\x01btR.", ""),
        (_BYTE + b"(K\x03U\x01|U\x01a(U\x01atNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.", "array of records"),
        (b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", ""),
        (b"c_codecs\nencode\n(V{}\nVrot13\ntR.", "unknown encoding"),
    ],
)
def test_refuses_damaged_and_doctored_pickles(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken: refused, .*{message}"):
        safe_pickle.load(tmp_path / "broken")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: cannot be read \(No such file"):
        safe_pickle.load(tmp_path / "missing")
