"""Timing one call: on a GPU by its own events, on a CPU by the clock, beside a copy of as many bytes."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

SECONDS = 1.5  # aimed at for the rounds of one measurement


class Meter:
    """Measures implementations and keeps a row for each: time, bytes of the floor, memory growth."""

    rows: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, benchmark: Any, device: torch.device) -> None:
        self._benchmark, self._device = benchmark, device

    def __call__(self, group: str, name: str, call: Callable[[], Any], floor_bytes: int) -> None:
        """Times `call` and records it.

        Args:
            group: what is computed, of which shape; rows of a group are compared.
            name: the implementation: "di4c" or a peer.
            call: does the work once; its result is dropped.
            floor_bytes: the least that must cross memory: each input read once, each output written once.
        """
        run = self._synchronised(call)
        run()  # warm-up: compilation, allocators, page faults
        start = time.perf_counter()
        growth = _memory_growth(run, self._device)
        rounds = max(3, min(50, int(SECONDS / (time.perf_counter() - start))))
        self._benchmark.group = group
        self._benchmark.pedantic(run, rounds=rounds)
        if self._device.type == "cuda":
            seconds = statistics.median(_events(call, rounds))
        else:
            seconds = self._benchmark.stats.stats.min  # whatever else the machine does only ever adds
        row = {
            "group": group,
            "name": name,
            "ms": seconds * 1e3,
            "floor_mb": floor_bytes / 1e6,
            "gb_per_s": floor_bytes / seconds / 1e9,
            "times_copy": seconds / floor_bytes * _copy_speed(self._device),
            "growth_mb": None if growth is None else growth / 1e6,
        }
        self._benchmark.extra_info.update(row)
        Meter.rows.append(row)

    def _synchronised(self, call: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            call()
            if self._device.type == "cuda":
                torch.cuda.synchronize()

        return run


def _events(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round on the device, its caches emptied before each, without a stop of the host between."""
    scrub = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in pairs:
        scrub.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


@lru_cache
def _copy_speed(device: torch.device) -> float:
    """Bytes per second of a copy, read and written together, of 128 MB: more than any cache holds."""
    source = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    if device.type == "cuda":
        return 2 * source.numel() / statistics.median(_events(lambda: target.copy_(source), 20))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() / min(times)


def _memory_growth(run: Callable[[], None], device: torch.device) -> int | None:
    """Bytes by which memory grew at its peak during one run; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def nbytes(*tensors: Tensor) -> int:
    """Bytes of the elements of all these tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def shape_name(*sizes: int) -> str:
    return "x".join(str(size) for size in sizes)


def step(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of a loss of the logits, the gradient made afresh each time."""

    def run() -> Tensor:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(x).sum(), x)[0]

    return run
