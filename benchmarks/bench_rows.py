"""What a row costs: of odd width beside an even one, of weight 0, on one thread and on two. Ours alone.

Promised on a CPU: an odd number of states (1025, 50257, 50258) takes at most 10% more time per element than the next
multiple of 16.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import COMPILED, MASKED_KL, MIXTURE, Inputs, inputs, name
from measuring import nbytes, step

from di4c_ext import ops, random

OPS = {**MIXTURE, "masked_kl": MASKED_KL}
ODD = {1025: 1040, 50257: 50272, 50258: 50272}
SLOWER = 1.10
# Of every 16 positions, those that weigh nothing: none, a quarter, half, three quarters, all but one.
IDLE = (0, 4, 8, 12, 15)


def _call(op: str, i: Inputs):
    """The op forward and backward, or a draw from every row, and its floor."""
    if op != "sample":
        return step(lambda x: OPS[op].ours(x, i), i.logits), OPS[op].floor(i)
    keys = random.keys(0, i.logits.shape[0], i.logits.device)
    return lambda: ops.sample_categorical(i.logits, keys), nbytes(i.logits)


@pytest.mark.parametrize("which", ["odd", "even"])
@pytest.mark.parametrize("states", ODD)
@pytest.mark.parametrize("op", ["sample", *OPS])
def test_odd_states(meter, device, op, states, which):
    """Odd and even take turns: the machine's own ups and downs are larger than what is to be seen."""
    shape = (2, 32, 256) if states == 1025 else (1, 8, 64)
    calls = {}
    for name_, wide in {"di4c": states, f"di4c, S = {ODD[states]}": ODD[states]}.items():
        calls[name_] = _call(op, inputs((*shape, wide), torch.float32, device, op == "mixture_objective"))
    odd, even = calls
    group = f"odd S: {op} {name((*shape, states), torch.float32)}"
    if which == "odd":
        meter(group, odd, *calls[odd], at_least={even: 1 / SLOWER}, turns={even: calls[even]})
    else:
        meter(group, even, *calls[even])


@pytest.mark.parametrize("idle", IDLE)
@pytest.mark.parametrize("op", OPS)
def test_weight_zero(meter, device, op, idle):
    """Rows of weight 0 are not read; what remains is the gradient's zeros."""
    i = inputs(COMPILED, torch.float32, device, op == "mixture_objective")
    B, _, D, _ = COMPILED
    weight = (torch.arange(D, device=device) % 16 >= idle).float().expand(B, D).contiguous()
    i = replace(i, weight=weight)
    floor = OPS[op].floor(i, 1 - idle / 16)
    call = step(lambda x: OPS[op].ours(x, i), i.logits)
    meter(f"weight 0: {op} fwd+bwd {name(COMPILED, torch.float32)}", f"{idle} of 16 idle", call, floor)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", ["sample", *OPS])
def test_threads(meter, device, op, threads):
    if device.type != "cpu":
        pytest.skip("threads of the CPU")
    i = inputs(COMPILED, torch.float32, device, op == "mixture_objective")
    torch.set_num_threads(threads)
    call, floor = _call(op, i)
    meter(f"threads: {op} {name(COMPILED, torch.float32)}", f"{threads} thread{'s' * (threads > 1)}", call, floor)
