"""Timing one call: on a GPU by its own events, on a CPU by the clock, beside a copy of as many bytes."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

SECONDS = 0.5  # aimed at for the rounds of one measurement
TURNS_SECONDS = 3.0  # where two calls take turns
ALONE = "DI4C_BENCHMARK_MEMORY"  # environment: the file that a process of its own writes a call's growth into

Turn = tuple[Callable[[], Any], int | None]  # a call and its floor in bytes
LAUNCH_BOUND = 5e-4  # seconds: below it a call on a GPU is also captured in a graph and replayed


class Meter:
    """Measures implementations and keeps a row for each: time, bytes of the floor, memory growth."""

    rows: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, benchmark: Any, device: torch.device, test: str) -> None:
        """`test`: what pytest knows the running test by, a path and a name."""
        self._benchmark, self._device, self._test = benchmark, device, test

    def __call__(
        self,
        group: str,
        name: str,
        call: Callable[[], Any],
        floor_bytes: int | None = None,
        *,
        at_least: Mapping[str, float | None] | None = None,
        turns: Mapping[str, Turn] | None = None,
        growth_limit: float | None = None,
        may_fail: bool = False,
        graph: bool = True,
        items: int | None = None,
    ) -> None:
        """Times `call` and records it.

        Args:
            group: what is computed, of which shape; rows of a group are compared.
            name: the implementation: "di4c" or a peer.
            call: does the work once; its result is dropped.
            floor_bytes: the least that must cross memory: each input read once, each output written once. None: the
                call is no business of memory alone, a network's step for one.
            at_least: what this row promises on a CPU: by the name of another row of the group, how many times as many
                bytes of the floor it moves in a second; None where the number is told and nothing promised.
            turns: of the rows in `at_least`, those whose calls on a CPU take turns with this one, so that whatever
                slows the machine down slows both.
            growth_limit: bytes of memory that one call may take on top of its inputs, a promise too: on a CPU it is
                measured in a process of its own.
            may_fail: a peer's; an exception becomes a row that says so.
            graph: whether replaying a captured graph makes sense; not where the call captures one itself.
            items: images, say, that one call is done with.
        """
        try:
            run = self._synchronised(call)
            run()  # warm-up: compilation, allocators, page faults
            start = time.perf_counter()
            growth = memory_growth(run, self._device)
            once = time.perf_counter() - start
            if ALONE in os.environ:
                Path(os.environ[ALONE]).write_text(str(growth))
                pytest.skip("memory alone was asked for")
            if growth_limit is not None and growth is not None and self._device.type == "cpu":
                growth = growth_alone(self._test)
        except Exception as error:
            if not may_fail:
                raise
            self.absent(group, name, f"fails: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        others = {} if self._device.type == "cuda" else dict(turns or {})
        best = dict.fromkeys(others, math.inf)

        def take_turns() -> None:
            for peer, (theirs, _) in others.items():
                best[peer] = min(best[peer], _clock(theirs))

        rounds = max(3 if once < 0.5 else 2, min(50, int(SECONDS / once)))
        if others:
            take_turns()
            rounds = max(5, min(20, int(TURNS_SECONDS / (once + sum(best.values())))))
        self._benchmark.group = group
        self._benchmark.pedantic(run, setup=take_turns if others else None, rounds=rounds)
        graph_seconds = None
        if self._device.type == "cuda":
            seconds = statistics.median(_events(call, max(rounds, 10)))
            if graph and seconds < LAUNCH_BOUND:
                graph_seconds = _graph_seconds(call)
        else:
            seconds = self._benchmark.stats.stats.min  # whatever else the machine does only ever adds
        row = {
            "group": group,
            "name": name,
            "ms": seconds * 1e3,
            "graph_ms": None if graph_seconds is None else graph_seconds * 1e3,
            "floor_mb": None if floor_bytes is None else floor_bytes / 1e6,
            "growth_mb": None if growth is None else growth / 1e6,
            "growth_limit_mb": None if growth_limit is None else growth_limit / 1e6,
            "at_least": dict(at_least or {}),
            "items_per_s": None if items is None else items / seconds,
        }
        if floor_bytes is not None:
            row |= self._speed(floor_bytes, seconds if graph_seconds is None else min(seconds, graph_seconds))
        row["turns"] = {
            peer: {"ms": best[peer] * 1e3} | ({} if floor is None else self._speed(floor, best[peer]))
            for peer, (_, floor) in others.items()
        }
        self._benchmark.extra_info.update(row)
        Meter.rows.append(row)

    def absent(self, group: str, name: str, why: str) -> None:
        """Records a peer that cannot be measured here, so that no table leaves it out in silence; ends the test."""
        Meter.rows.append({"group": group, "name": name, "note": why})
        pytest.skip(f"{name}: {why}")

    def _speed(self, floor_bytes: int, seconds: float) -> dict[str, float]:
        speed = floor_bytes / seconds
        return {"gb_per_s": speed / 1e9, "of_copy": speed / copy_speed(self._device)}

    def _synchronised(self, call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            if self._device.type == "cuda":
                torch.cuda.synchronize()

        return run


@lru_cache
def _scrub() -> Tensor:
    """A tensor larger than any second-level cache, written between two rounds."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def _events(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round on the device, its caches emptied before each, without a stop of the host between."""
    scrub = _scrub()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        scrub.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _graph_seconds(call: Callable[[], Any]) -> float | None:
    """Seconds of a replay of the call's graph: the device's work without the host's; None where it has none."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # a peer that waits for the device, or draws from a generator that no graph knows
        torch.cuda.synchronize()
        return None
    return statistics.median(_events(graph.replay, 20))


@lru_cache
def copy_speed(device: torch.device) -> float:
    """Bytes per second of a copy, read and written together, between two warm tensors that no cache holds."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (128 << 20), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(2)
    if device.type == "cuda":
        return 2 * source.numel() / statistics.median(_events(lambda: target.copy_(source), 20))
    return 2 * source.numel() / min(_clock(lambda: target.copy_(source)) for _ in range(20))


def _clock(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def memory_growth(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes by which memory grew at its peak during one run; None where the system does not tell.

    On a CPU: peak resident size, after what the C library keeps of freed memory is given back; without that, all that
    fits into it (up to 32 MB) would go unseen. Good to 0.2 MB, see bench_machine.py.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def growth_alone(test: str) -> int:
    """`memory_growth` of a test's call in a fresh process, where nothing but that test has taken or kept memory.

    In a long process it reads up to 2 MB more or less from run to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "growth"
        # A fixed threshold: memory freed above it is given back to the system and not handed out again unseen.
        environment = {**os.environ, ALONE: str(found), "MALLOC_MMAP_THRESHOLD_": "131072"}
        command = [sys.executable, "-m", "pytest", test, "-p", "no:cacheprovider"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not found.is_file():
            raise RuntimeError(f"memory of {test} was not measured: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return int(found.read_text())


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements of all these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def shape_name(*sizes: int) -> str:
    return "x".join(str(size) for size in sizes)


def step(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of a loss of the logits, the gradient made afresh each time."""

    def run() -> Tensor:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(x).sum(), x)[0]

    return run
