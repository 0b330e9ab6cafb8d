"""Runs the CUDA launchers and kernels of csrc/cuda on the CPU: builds the driver, hands it requests, reads replies.

The driver is compiled with the address and undefined-behaviour sanitizers; every array it is given is guarded at
both ends, and every request is run in several orders of the threads, which must agree to the last bit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # config.h: DType
ORDERS = (0, 1, 2)  # by index; at random; at random, CTAs backwards

_FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra"),
    *("-Wno-unknown-pragmas", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-DDI4C_MAX_GRID=7",  # a grid of at most 7 CTAs a side: every kernel takes its rows in several turns
    *(f"-I{folder}" for folder in (HERE / "emulator", CSRC / "include", CSRC / "cuda")),
]


class KernelFault(Exception):
    """The driver ended with an error; its message."""


@dataclass(frozen=True)
class Layout:
    """Logits as the kernels get them: bytes, strides in elements, and how far the first lies off a boundary."""

    data: bytes
    dtype: int
    strides: tuple[int, int, int]
    offset: int


def lay_out(values: Tensor, pad: int = 0, offset: int = 0) -> Layout:
    """Rows of values (B, L, D, S), `pad` elements of NaN between them, `offset` elements off a 64-byte boundary."""
    batch, latents, length, states = values.shape
    step = states + pad
    storage = torch.full((batch * latents * length * step,), torch.nan, dtype=values.dtype)
    storage.view(batch, latents, length, step)[..., :states] = values
    end = storage.numel() - pad if storage.numel() else 0  # nothing behind the last row: the guard is
    return Layout(
        to_bytes(storage[:end]),
        DTYPES[values.dtype],
        (latents * length * step, length * step, step),
        offset * values.element_size(),
    )


def to_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


@cache
def driver() -> Path:
    """The driver, from a folder named by the hash of all it is made of."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on the PATH")
    units = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp")), HERE / "emulator" / "simt.cpp"]
    parts = [p for folder in (CSRC / "cuda", CSRC / "include", HERE) for p in sorted(folder.rglob("*.[ch]*"))]
    text = repr((compiler, _FLAGS, [(p.name, p.read_bytes()) for p in parts]))
    folder = Path(tempfile.gettempdir()) / f"di4c-simt-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    program = folder / "driver"
    if program.exists():
        return program
    work = Path(tempfile.mkdtemp(prefix="di4c-simt-build-"))
    try:

        def compile_unit(unit: Path) -> Path:
            result = work / f"{unit.name}.o"
            _call([compiler, *_FLAGS, "-x", "c++", "-c", str(unit), "-o", str(result)])
            return result

        with ThreadPoolExecutor(2) as pool:
            largest_first = sorted(units, key=lambda p: p.name, reverse=True)
            objects = [str(o) for o in pool.map(compile_unit, largest_first)]
        _call([compiler, "-fsanitize=address,undefined", *objects, "-o", str(work / "driver")])
        folder.mkdir(exist_ok=True)
        (work / "driver").replace(program)  # whole or not at all, should two sessions build at once
    finally:
        shutil.rmtree(work)
    return program


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise KernelFault(f"{' '.join(command)}\n{done.stderr}")


def _text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def run(
    op: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, tuple[Sequence[int], torch.dtype]],
    *,
    orders: Sequence[int] = ORDERS,
    device: int = 1,
    launch_error: int = 0,
) -> dict[str, Tensor]:
    """Runs one op of namespace di4c::cuda.

    Args:
        op: its name.
        inputs: its numbers and arrays by the names of the struct's fields; None for a null pointer.
        outputs: shape and dtype of each array it writes.
        orders: seeds of the orders of threads to run it in.
        device: which of the emulator's two devices it is to run on.
        launch_error: what every launch is to answer, as the CUDA runtime numbers its errors.

    Raises:
        KernelFault: a sanitizer, the emulator or the launcher found fault.
    """
    request = [b"s", _text("op"), _text(op)]
    numbers: dict[str, float] = {"device": device, "launch_error": launch_error, "order_count": len(orders)}
    arrays = {"orders": (b"a", to_bytes(torch.tensor(orders)), 0)}
    for name, value in inputs.items():
        if isinstance(value, Layout):
            numbers |= {f"{name}_dtype": value.dtype}
            numbers |= {f"{name}_stride_{i}": s for i, s in zip("bld", value.strides, strict=True)}
            arrays[name] = (b"a", value.data, value.offset)
        elif isinstance(value, Tensor):
            arrays[name] = (b"a", to_bytes(value), 0)
        elif value is not None:
            numbers[name] = value
    for name, (shape, dtype) in outputs.items():
        arrays[name] = (b"o", bytes(torch.Size(shape).numel() * dtype.itemsize), 0)
    request += [b"n" + _text(name) + struct.pack("<d", value) for name, value in numbers.items()]
    for name, (kind, data, offset) in arrays.items():
        request += [kind, _text(name), struct.pack("<QI", len(data), offset), b"" if kind == b"o" else data]

    with tempfile.TemporaryDirectory(prefix="di4c-simt-run-") as folder:
        question, reply = Path(folder) / "request", Path(folder) / "reply"
        question.write_bytes(b"".join(request))
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run(
            [str(driver()), str(question), str(reply)], capture_output=True, text=True, env=environment, timeout=300
        )
        if done.returncode != 0:
            raise KernelFault(done.stderr)
        answer = bytearray(reply.read_bytes())

    result, start = {}, 0
    for name, (shape, dtype) in outputs.items():
        count = torch.Size(shape).numel()
        result[name] = (
            torch.frombuffer(answer, dtype=dtype, count=count, offset=start).view(*shape)
            if count
            else torch.empty(*shape, dtype=dtype)
        )
        start += count * dtype.itemsize
    return result
