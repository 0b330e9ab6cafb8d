"""The mixture's losses, forward and backward, against the published chain of torch calls.

Floor: the logits (and target) read once forward and once backward, the gradient written once.
"""

from __future__ import annotations

import math

import pytest
import torch
from measuring import nbytes, shape_name, step
from torch.nn.functional import log_softmax

from di4c_ext import ops

SHAPES = [(4, 16, 768, 256), (2, 32, 256, 1025), (1, 8, 64, 50258), (16, 32, 64, 17)]
COMPILED = SHAPES[1]


def _log_prob(logits, tokens):
    """joint and correlation by log_softmax, gather and logsumexp, all K sequences in one gather."""
    index = tokens.transpose(1, 2)[:, None].expand(-1, logits.shape[1], -1, -1)
    a = log_softmax(logits, -1).gather(-1, index)
    log_l = math.log(logits.shape[1])
    marginal = torch.logsumexp(a, 1, keepdim=True) - log_l
    return torch.logsumexp(a.sum(2), 1) - log_l, torch.logsumexp((a - marginal).sum(2), 1) - log_l


def _kl(target, logits):
    log_p = torch.logsumexp(log_softmax(logits, -1), 1) - math.log(logits.shape[1])
    log_t = log_softmax(target, -1)
    return (log_t.exp() * (log_t - log_p)).sum((-1, -2))


def _inputs(shape, device):
    batch, components, length, states = shape
    g = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=g, device=device).mul_(2)
    target = torch.randn(batch, length, states, generator=g, device=device).mul_(2)
    tokens = torch.randint(0, states, (batch, components, length), generator=g, device=device)
    return logits, target, tokens


@pytest.mark.parametrize("name", ["di4c", "torch", "torch.compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: shape_name(*s))
def test_log_prob(meter, device, shape, name):
    """K = L sequences at once, both outputs used: the data and consistency terms of the loss."""
    if name == "torch.compile" and shape is not COMPILED:
        pytest.skip("compiled once")
    logits, _, tokens = _inputs(shape, device)
    chain = torch.compile(_log_prob, dynamic=False) if name == "torch.compile" else _log_prob
    f = ops.mixture_log_prob if name == "di4c" else chain
    floor = 3 * nbytes(logits) + 2 * nbytes(tokens)
    meter(f"mixture_log_prob fwd+bwd {shape_name(*shape)}", name, step(lambda x: sum(f(x, tokens)), logits), floor)


@pytest.mark.parametrize("name", ["di4c", "torch", "torch.compile"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: shape_name(*s))
def test_kl(meter, device, shape, name):
    if name == "torch.compile" and shape is not COMPILED:
        pytest.skip("compiled once")
    logits, target, _ = _inputs(shape, device)
    chain = torch.compile(_kl, dynamic=False) if name == "torch.compile" else _kl
    f = ops.mixture_kl if name == "di4c" else chain
    floor = 3 * nbytes(logits) + 2 * nbytes(target)
    meter(f"mixture_kl fwd+bwd {shape_name(*shape)}", name, step(lambda x: f(target, x), logits), floor)


@pytest.mark.parametrize("name", ["di4c", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_prob_forward(meter, device, dtype, name):
    """Without a gradient: evaluating held-out sequences. bf16 logits are read as they are."""
    logits, _, tokens = _inputs(SHAPES[1], device)
    logits = logits.to(dtype)
    f = ops.mixture_log_prob if name == "di4c" else lambda x, t: _log_prob(x.float(), t)
    group = f"mixture_log_prob forward {shape_name(*SHAPES[1])} {str(dtype)[6:]}"
    with torch.no_grad():
        meter(group, name, lambda: f(logits, tokens), nbytes(logits, tokens))
