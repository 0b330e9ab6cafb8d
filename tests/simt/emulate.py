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
LOGISTIC = 3
ORDERS = (0, 1, 2)  # by index; at random, twice
# Who sums the parts of a long row: one CTA; a cluster of them; CTAs that draw tickets. Capability, workspace or not.
WAYS = {"turns": (75, False), "cluster": (90, False), "ticket": (75, True)}

_FLAGS = [
    *("-std=c++17", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Wextra"),
    "-Wno-unknown-pragmas",
    *(f"-I{folder}" for folder in (HERE / "emulator", CSRC / "include", CSRC / "cuda")),
]
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_RUNNING = [
    *("-O1", "-g1", *_SANITIZERS),
    "-DDI4C_MAX_GRID=7",  # a grid of at most 7 CTAs a side: every kernel takes its rows in several turns
    "-DDI4C_MANY_CTAS=1",  # and looks at several positions at a time, where it may
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


def workspace(way: str, rows: int, numbers: int) -> Tensor | None:
    """What api.h calls `split`: a ticket of 0 to each row, then so many numbers of anything to each."""
    if not WAYS[way][1]:
        return None
    return torch.cat([torch.zeros(rows, dtype=torch.int32), torch.full((rows * numbers,), -1, dtype=torch.int32)])


def to_bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


@cache
def driver(*, runs: bool = True) -> Path:
    """The driver, from a folder named by the hash of all it is made of.

    Args:
        runs: with sanitizers and in small grids, to run kernels; without, to plan launches of any size.
    """
    flags = [*_FLAGS, *(_RUNNING if runs else ("-O0",))]
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler: {compiler} is not on the PATH")
    units = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp")), HERE / "emulator" / "simt.cpp"]
    parts = [p for folder in (CSRC / "cuda", CSRC / "include", HERE) for p in sorted(folder.rglob("*.[ch]*"))]
    text = repr((compiler, flags, [(p.name, p.read_bytes()) for p in parts]))
    folder = Path(tempfile.gettempdir()) / f"di4c-simt-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    program = folder / "driver"
    if program.exists():
        return program
    work = Path(tempfile.mkdtemp(prefix="di4c-simt-build-"))
    try:

        def compile_unit(unit: Path) -> Path:
            result = work / f"{unit.name}.o"
            _call([compiler, *flags, "-x", "c++", "-c", str(unit), "-o", str(result)])
            return result

        with ThreadPoolExecutor(2) as pool:
            largest_first = sorted(units, key=lambda p: p.name, reverse=True)
            objects = [str(o) for o in pool.map(compile_unit, largest_first)]
        _call([compiler, "-rdynamic", *_SANITIZERS, *objects, "-o", str(work / "driver")])
        folder.mkdir(exist_ok=True)
        (work / "driver").replace(program)  # whole or not at all, should two runs build at once
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
    capability: int = 75,
) -> dict[str, Tensor]:
    """Runs one op of namespace di4c::cuda.

    Args:
        op: its name.
        inputs: its numbers and arrays by the names of the struct's fields; None for a null pointer.
        outputs: shape and dtype of each array it writes.
        orders: seeds of the orders of threads to run it in.
        device: which of the emulator's two devices it is to run on.
        launch_error: what every launch is to answer, as the CUDA runtime numbers its errors.
        capability: the devices' compute capability: 75, 80, 86, 89, 90, 100 or 120.

    Raises:
        KernelFault: a sanitizer, the emulator or the launcher found fault.
    """
    numbers: dict[str, float] = {"device": device, "launch_error": launch_error, "capability": capability}
    arrays = {"orders": (b"a", to_bytes(torch.tensor(orders)), 0)}
    numbers["order_count"] = len(orders)
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
    answer = bytearray(_ask(op, numbers, arrays))

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


@dataclass(frozen=True)
class Launch:
    """A launch as its launcher asked for it: nothing ran."""

    name: str
    kernel: str  # mangled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int  # CTAs
    shared: int  # bytes of dynamic shared memory
    bytes: int  # that it moves at least


def plan(
    op: str, numbers: Mapping[str, float], arrays: Sequence[str], *, capability: int, small: bool = False
) -> list[Launch]:
    """The launches of one op of namespace di4c::cuda, for any sizes: memory is neither had nor touched.

    Args:
        op: its name.
        numbers: its sizes, dtypes and strides by the names of the struct's fields.
        arrays: names of the pointers that are not null.
        capability: the device's compute capability.
        small: by the driver that runs kernels, with its small grids.
    """
    given = {"device": 1, "launch_error": 0, "order_count": 0, "capability": capability, "plan": 1, **numbers}
    empty = {name: (b"a", b"", 0) for name in (*arrays, "orders")}
    lines = _ask(op, given, empty, runs=small).decode().splitlines()
    launches = []
    for line in lines:
        name, kernel, grid, block, cluster, shared, moved = line.split("\t")
        sizes = [tuple(int(n) for n in part.split()) for part in (grid, block)]
        launches.append(Launch(name, kernel, *sizes, int(cluster), int(shared), int(moved)))  # type: ignore[arg-type]
    return launches


def _ask(
    op: str, numbers: Mapping[str, float], arrays: Mapping[str, tuple[bytes, bytes, int]], *, runs: bool = True
) -> bytes:
    """The driver's reply to a request; arrays are (b"a" for input or b"o" for output, bytes, offset)."""
    request = [b"s", _text("op"), _text(op)]
    request += [b"n" + _text(name) + struct.pack("<d", value) for name, value in numbers.items()]
    for name, (kind, data, offset) in arrays.items():
        request += [kind, _text(name), struct.pack("<QI", len(data), offset), b"" if kind == b"o" else data]
    with tempfile.TemporaryDirectory(prefix="di4c-simt-run-") as folder:
        question, reply = Path(folder) / "request", Path(folder) / "reply"
        question.write_bytes(b"".join(request))
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run(
            [str(driver(runs=runs)), str(question), str(reply)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        if done.returncode != 0:
            raise KernelFault(done.stderr)
        return reply.read_bytes()
