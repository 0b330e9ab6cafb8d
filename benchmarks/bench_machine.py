"""What the machine itself gives, measured in the same run: copies, the cost of fresh memory, of a call, of a reading.

A copy into warm memory is what every other row is held against. A fresh tensor costs more on a CPU: its pages are made
on first touch, and every gradient is a fresh tensor, ours and the peers'.
"""

from __future__ import annotations

import time

import pytest
import torch
from measuring import Meter, memory_growth, nbytes
from torch import Tensor

from di4c_ext import ops, random

COPIED = "copy 128 MiB"


@pytest.mark.parametrize("by", ["into warm memory", "into a fresh tensor", "fresh tensor, filled", "read, torch.sum"])
def test_copy(meter, device, by):
    source = torch.empty(32 << 20, device=device).fill_(1)
    target = torch.empty_like(source).fill_(2)
    calls = {
        "into warm memory": (lambda: target.copy_(source), 2),
        "into a fresh tensor": (lambda: source.clone(), 2),
        "fresh tensor, filled": (lambda: torch.empty_like(source).fill_(1), 1),
        "read, torch.sum": (lambda: source.sum(), 1),
    }
    call, times = calls[by]
    meter(COPIED, by, call, times * nbytes(source))


def _micro(call, device) -> float:
    """Seconds of the host in one call, the best of ten times a hundred, without waiting for the device."""
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(100):
            call()
        best = min(best, (time.perf_counter() - start) / 100)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return best


@pytest.mark.parametrize("by", ["di4c", "torch"])
@pytest.mark.parametrize("what", ["sample", "mixture_kl forward", "mixture_kl forward and backward"])
def test_python_overhead(device, what, by):
    """The host's time for a call on a row of two classes: Python, the dispatcher, autograd, the launch."""
    x = torch.zeros(1, 1, 1, 2, device=device)
    keys, target = random.keys(0, 1, device), torch.zeros(1, 1, 2, device=device)
    leaf = x.clone().requires_grad_()

    def plain_kl(target: Tensor, logits: Tensor) -> Tensor:
        log_t = torch.log_softmax(target, -1)
        return (log_t.exp() * (log_t - torch.logsumexp(torch.log_softmax(logits, -1), 1))).sum((-1, -2))

    kl = ops.mixture_kl if by == "di4c" else plain_kl
    calls = {
        "sample": (lambda: ops.sample_categorical(x, keys))
        if by == "di4c"
        else (lambda: torch.multinomial(torch.softmax(x[0, 0], -1), 1)),
        "mixture_kl forward": lambda: kl(target, x),
        "mixture_kl forward and backward": lambda: torch.autograd.grad(kl(target, leaf).sum(), leaf),
    }
    calls[what]()
    Meter.rows.append({"group": f"host's time of a call: {what}", "name": by, "ms": 1e3 * _micro(calls[what], device)})


@pytest.mark.parametrize("megabytes", [0, 0.5, 2, 8, 64])
def test_meter_of_memory(device, megabytes):
    """The meter sees a known tensor, small or large, to 0.3 MB and half a percent."""
    size = int(megabytes * 1e6)

    def run() -> None:
        torch.empty(size, dtype=torch.uint8, device=device).fill_(1)

    run()
    growth = memory_growth(run, device)
    if growth is None:
        pytest.skip("this system does not tell its peak memory")
    Meter.rows.append({"group": "growth of a known tensor", "name": f"{megabytes:g} MB", "growth_mb": growth / 1e6})
    assert abs(growth - size) <= 0.3e6 + 0.005 * size
