"""Beyond its inputs an op needs the gradient and less than 5% of the logits' size: nothing of (B, L, D, S) is made."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache

import calls
import pytest
import torch

# A Hidden's logits are made in pieces of so many bytes, and here none of them are kept.
NAMES = (*(name for name in calls.SUMS if not name.endswith("_hidden")), *calls.FROM_HIDDEN)
PIECE = 4 << 20
LONG = {"states": 4096, "batch": 1, "components": 8, "length": 256}  # logits of 34 MB in float32
# Rows so short that what is kept of each weighs, of a target with as many as the mixture and as many sequences.
MANY = {"states": 256, "batch": 4, "components": 16, "length": 768, "sequences": 16, "mixed_target": 16}
SHORT = ("mixture_kl_of_mixture", "mixture_objective")

# For each op and dtype, prints by how many bytes forward and backward raise the peak of resident memory, and how many
# of those are gradients. A small call before it makes the threads and loads what is loaded once.
_PROGRAM = """
import json, os, sys, torch, calls, test_memory

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

def growth(name, dtype, sizes):
    calls.run(calls.make(name, 64, dtype))
    call = calls.make(name, dtype=dtype, **sizes)
    if name in calls.FROM_HIDDEN:
        call = call.changed(chunk_bytes=test_memory.PIECE)
        calls.run(call)  # the matrix library loads what it needs for products of this size
    with open("/proc/self/clear_refs", "w") as forget:
        forget.write("5")  # the peak so far
    before = resident("VmRSS")
    values, grads = calls.run(call)
    return resident("VmHWM") - before, sum(x.nbytes for x in grads)

torch.set_num_threads(2)
dtypes = torch.float32, torch.bfloat16
found = {f"{name} {dtype}": growth(name, dtype, test_memory.LONG) for name in test_memory.NAMES for dtype in dtypes}
for name in test_memory.SHORT:
    found |= {f"{name} {dtype} short": growth(name, dtype, test_memory.MANY) for dtype in dtypes}
os.environ["DI4C_NATIVE"] = "off"
found["plain"] = growth("masked_kl", torch.float32, test_memory.LONG)
print(json.dumps(found))
"""


@cache
def _growths() -> dict[str, list[int]]:
    """Peak growth and gradients in bytes, measured in a process of its own; empty where the peak cannot be reset."""
    try:
        with open("/proc/self/clear_refs", "w") as forget:
            forget.write("5")
    except OSError:
        return {}
    paths = os.pathsep.join(p for p in sys.path if p)
    # What glibc would keep of memory freed before, to hand it out again unseen, it is told to give back.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _logits(sizes: dict[str, int]) -> int:
    """Elements of (B, L, D, S)."""
    return math.prod(sizes[name] for name in ("batch", "components", "length", "states"))


def _beyond_the_gradient(what: str) -> int:
    if not _growths():
        pytest.skip("the peak of resident memory cannot be reset: /proc/self/clear_refs is not writable here")
    peak, grads = _growths()[what]
    return peak - grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_peak(kernels, name, dtype):
    """Forward and backward together raise the peak by the gradient and less than 5% of the logits' bytes."""
    if kernels.name != "cpu":
        pytest.skip("resident memory is the CPU's")
    pieces = PIECE if name in calls.FROM_HIDDEN else 0
    extra = (_beyond_the_gradient(f"{name} {dtype}") - pieces) / (_logits(LONG) * dtype.itemsize)
    assert extra < 0.05, f"{name}: {extra:.1%} of the logits beyond the gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHORT)
def test_peak_of_short_rows(kernels, name, dtype):
    """The same where rows are short and all that is kept of them is there: T = K = L = 16."""
    if kernels.name != "cpu":
        pytest.skip("resident memory is the CPU's")
    extra = _beyond_the_gradient(f"{name} {dtype} short") / (_logits(MANY) * dtype.itemsize)
    assert extra < 0.05, f"{name}: {extra:.1%} of the logits beyond the gradient"


def test_peak_of_the_plain_form():
    """The measure itself: the definition makes what the kernels do not, several times the logits."""
    assert _beyond_the_gradient("plain") > 3 * _logits(LONG) * 4


@pytest.mark.parametrize("name", NAMES)
def test_only_the_inputs_are_kept(backend, name):
    """Nothing of the logits' size is saved for the gradient but the inputs themselves."""
    call = calls.make(name, 4096, length=5).to(backend.device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        leaves, outputs = calls.forward(call)
    given = {x.untyped_storage().data_ptr() for x in [*call.tensors(), *leaves]}
    assert kept and any(o.requires_grad for o in outputs)
    rows = 2 * 4 * 5  # B L D
    assert all(x.untyped_storage().data_ptr() in given or x.numel() <= 10 * rows for x in kept)
