"""Divergences and cross entropy of rows, forward and backward, half the positions counting, against torch's own.

Floor: rows that count read once forward and once backward (student and target), the whole gradient written once.
"""

from __future__ import annotations

import math

import pytest
import torch
from measuring import nbytes, shape_name, step
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from di4c_ext import ops

SHAPES = [(2, 32, 256, 1025), (1, 8, 64, 50258)]


def _weighted(rows, weight):
    return (rows * weight[:, None]).sum(-1)


def _forward(target, logits, weight):
    log_t = log_softmax(target, -1)[:, None].expand_as(logits)
    return _weighted(kl_div(log_softmax(logits, -1), log_t, reduction="none", log_target=True).sum(-1), weight)


def _reverse(target, logits, weight):
    log_p = log_softmax(logits, -1)
    log_t = log_softmax(target, -1)[:, None].expand_as(logits)
    return _weighted(kl_div(log_t, log_p, reduction="none", log_target=True).sum(-1), weight)


def _js(target, logits, weight):
    log_p, log_t = log_softmax(logits, -1), log_softmax(target, -1)[:, None]
    log_m = torch.logaddexp(log_p, log_t) - math.log(2)
    to_m = log_t.exp() * (log_t - log_m) + log_p.exp() * (log_p - log_m)
    return _weighted(0.5 * to_m.sum(-1), weight)


def _tv(target, logits, weight):
    apart = torch.softmax(target, -1)[:, None] - torch.softmax(logits, -1)
    return _weighted(0.5 * apart.abs().sum(-1), weight)


def _cross_entropy(logits, tokens, weight):
    every = tokens[:, None].expand(logits.shape[:-1])
    return _weighted(cross_entropy(logits.flatten(0, 2), every.flatten(), reduction="none").view(every.shape), weight)


DIVERGENCES = {
    "masked_kl": _forward,
    "masked_reverse_kl": _reverse,
    "masked_js": _js,
    "masked_tv": _tv,
}


def _inputs(shape, device):
    batch, _, length, states = shape
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=g, device=device).mul_(2)
    target = torch.randn(batch, length, states, generator=g, device=device).mul_(2)
    tokens = torch.randint(0, states, (batch, length), generator=g, device=device)
    weight = (torch.arange(length, device=device) % 2).float().expand(batch, length).contiguous()
    return logits, target, tokens, weight


@pytest.mark.parametrize("name", ["di4c", "torch", "torch.compile"])
@pytest.mark.parametrize("op", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: shape_name(*s))
def test_divergence(meter, device, shape, op, name):
    if name == "torch.compile" and (shape is not SHAPES[0] or op != "masked_kl"):
        pytest.skip("compiled once")
    logits, target, _, weight = _inputs(shape, device)
    chain = torch.compile(DIVERGENCES[op], dynamic=False) if name == "torch.compile" else DIVERGENCES[op]
    f = getattr(ops, op) if name == "di4c" else chain
    floor = 2 * nbytes(logits) + nbytes(target)  # half of each twice, the gradient whole
    meter(f"{op} fwd+bwd {shape_name(*shape)}", name, step(lambda x: f(target, x, weight), logits), floor)


@pytest.mark.parametrize("name", ["di4c", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: shape_name(*s))
def test_cross_entropy(meter, device, shape, name):
    logits, _, tokens, weight = _inputs(shape, device)
    f = ops.masked_cross_entropy if name == "di4c" else _cross_entropy
    floor = 2 * nbytes(logits)
    call = step(lambda x: f(x, tokens, weight), logits)
    meter(f"masked_cross_entropy fwd+bwd {shape_name(*shape)}", name, call, floor)
