"""Divergences and cross entropy of rows, forward and backward, half the positions counting, beside torch's and peers'.

Floor: rows that count read once forward and once backward (student and target), the whole gradient written once.
"""

from __future__ import annotations

import math

import peers
import plain
import pytest
import torch
from cases import COMPILED, DTYPES, LARGE, SHAPES, Shape, inputs, name
from measuring import nbytes, step
from torch.nn.functional import cross_entropy, kl_div

from di4c_ext import ops

CASES = [(COMPILED, DTYPES[0]), *((shape, dtype) for shape in (SHAPES[3], *LARGE[1:]) for dtype in DTYPES)]
IDS = [name(*case) for case in CASES]


def _weighted(rows, weight):
    return (rows * weight[:, None]).sum(-1)


def _forward(target, logits, weight):
    log_t = plain.log_p(target)[:, None].expand_as(logits)
    return _weighted(kl_div(plain.log_p(logits), log_t, reduction="none", log_target=True).sum(-1), weight)


def _reverse(target, logits, weight):
    log_t = plain.log_p(target)[:, None].expand_as(logits)
    return _weighted(kl_div(log_t, plain.log_p(logits), reduction="none", log_target=True).sum(-1), weight)


def _js(target, logits, weight):
    log_p, log_t = plain.log_p(logits), plain.log_p(target)[:, None]
    log_m = torch.logaddexp(log_p, log_t) - math.log(2)
    to_m = log_t.exp() * (log_t - log_m) + log_p.exp() * (log_p - log_m)
    return _weighted(0.5 * to_m.sum(-1), weight)


def _tv(target, logits, weight):
    t = torch.softmax(target, -1, dtype=torch.float32)[:, None]
    return _weighted(0.5 * (t - torch.softmax(logits, -1, dtype=torch.float32)).abs().sum(-1), weight)


def _cross_entropy(logits, tokens, weight):
    every = tokens[:, None].expand(logits.shape[:-1])
    rows = cross_entropy(logits.flatten(0, 2).float(), every.flatten(), reduction="none")
    return _weighted(rows.view(every.shape), weight)


DIVERGENCES = {"masked_kl": _forward, "masked_reverse_kl": _reverse, "masked_js": _js, "masked_tv": _tv}


def _half(shape: Shape, device):
    """Every other position counts."""
    return (torch.arange(shape[2], device=device) % 2).float().expand(shape[0], shape[2]).contiguous()


def _peer(meter, group, by, make):
    """What a peer's adapter gives; where there is none, the row says why and the test ends."""
    try:
        return make()
    except peers.Missing as missing:
        meter.absent(group, by, str(missing))


@pytest.mark.parametrize("by", ["di4c", "torch", "torch.compile", "Liger-Kernel"])
@pytest.mark.parametrize("op", DIVERGENCES)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_divergence(meter, device, case, op, by):
    if by == "torch.compile" and (case != CASES[0] or op != "masked_kl"):
        pytest.skip("compiled once")
    if by == "Liger-Kernel" and op == "masked_reverse_kl":
        pytest.skip("that is masked_kl with the roles changed, where it has no gradient for the target")
    i, weight = inputs(*case, device), _half(case[0], device)
    group = f"{op} fwd+bwd {name(*case)}"
    if by == "Liger-Kernel":  # its losses know a token to ignore, or nothing: it gets the rows that count, gathered
        liger = _peer(meter, group, by, lambda: peers.liger_divergence(op, device))
        S = case[0][3]

        def f(target, x, _):
            rows = x[:, :, 1::2].reshape(-1, S)
            return liger(target[:, None, 1::2].expand_as(x[:, :, 1::2]).reshape(-1, S), rows)
    else:
        chain = DIVERGENCES[op]
        f = {"di4c": getattr(ops, op), "torch": chain, "torch.compile": peers.compiled(chain, device)}[by]
    floor = 2 * nbytes(i.logits) + nbytes(i.teacher)  # half of each twice, the gradient whole
    call = step(lambda x: f(i.teacher, x, weight), i.logits)
    meter(group, by, call, floor, may_fail=by != "di4c", graph=by != "torch.compile")


@pytest.mark.parametrize("by", ["di4c", "torch", "torch.compile", "Liger-Kernel", "quack"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_cross_entropy(meter, device, case, by):
    if by == "torch.compile" and case != CASES[0]:
        pytest.skip("compiled once")
    shape, dtype = case
    i, weight = inputs(shape, dtype, device), _half(shape, device)
    group = f"masked_cross_entropy fwd+bwd {name(shape, dtype)}"
    logits = i.logits
    if by in ("Liger-Kernel", "quack"):  # both skip rows of class -100
        make = peers.liger_cross_entropy if by == "Liger-Kernel" else peers.quack_cross_entropy
        rows_of = _peer(meter, group, by, lambda: make(device))
        tokens = torch.where(weight > 0, i.data, -100)[:, None].expand(logits.shape[:3]).flatten()
        logits = logits.clone()  # Liger-Kernel writes the gradient over them

        def f(x):
            return rows_of(x.view(-1, shape[3]), tokens)
    else:
        chain = {
            "di4c": ops.masked_cross_entropy,
            "torch": _cross_entropy,
            "torch.compile": peers.compiled(_cross_entropy, device),
        }[by]

        def f(x):
            return chain(x, i.data, weight)

    call = step(f, logits)
    meter(group, by, call, 2 * nbytes(logits), may_fail=by != "di4c", graph=by != "torch.compile")


@pytest.mark.parametrize("by", ["di4c", "torch", "TRL"])
def test_chunked_divergence(meter, device, by):
    """KL of a student's rows from hidden states, its gradient of them; the head is shared and stays as it is."""
    rows, width, states = 256, 768, 50258
    g = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.randn(rows, width, generator=g, device=device) for _ in range(2))
    head = torch.randn(states, width, generator=g, device=device).div_(width**0.5)
    group = f"KL from hidden states fwd+bwd {rows}x{width}x{states} float32"

    def ours(x):
        return ops.mixture_kl(ops.Hidden(teacher[None], head, None), ops.Hidden(x[None, None], head, None))

    def materialised(x):
        log_t = plain.log_p(teacher @ head.T)
        return (log_t.exp() * (log_t - plain.log_p(x @ head.T))).sum(-1)

    if by == "TRL":
        chunked = _peer(meter, group, by, lambda: peers.trl_chunked_divergence(device))
    f = {"di4c": ours, "torch": materialised, "TRL": lambda x: chunked(x, teacher, head)}[by]
    meter(group, by, step(f, student), may_fail=by != "di4c")
