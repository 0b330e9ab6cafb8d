"""A value of -inf has no gradient: kernels and definition agree, other sequences keep theirs."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES

from di4c_ext import ops
from di4c_ext.ops import reference

STATES = (17, 300, 2100)  # a latent to a lane, a row in one piece, one of three chunks


def _case(states: int, dtype: torch.dtype, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, 3, 4, S) and tokens (2, 3, 4), of which sequence 1 of sample 0 has probability 0."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, states, generator=g).to(dtype)
    tokens = torch.randint(1, states, (2, 3, 4), generator=g)
    if which == "at one position":  # no component has the token: joint alone is -inf
        logits[0, :, 2, 0] = -math.inf
        tokens[0, 1, 2] = 0
    else:  # every component lacks one of the tokens, each at a position of its own: correlation is -inf too
        for component in range(3):
            logits[0, component, component, 0] = -math.inf
            tokens[0, 1, component] = 0
    return logits, tokens


@pytest.mark.parametrize("which", ["at one position", "under every component"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", STATES)
def test_impossible_sequences(backend, states, dtype, which):
    logits, tokens = _case(states, dtype, which)
    ours = logits.to(backend.device, copy=True).requires_grad_()
    exact = logits.to(torch.float64, copy=True).requires_grad_()
    got = ops.mixture_log_prob(ours, tokens.to(backend.device))
    expected = reference.mixture_log_prob(exact, tokens, None)
    assert expected[0][0, 1] == -math.inf and got[0][0, 1] == -math.inf
    assert (expected[1][0, 1] == -math.inf) == (which == "under every component")
    assert torch.equal(got[1].cpu() == -math.inf, expected[1] == -math.inf)
    weights = torch.tensor([[0.5, 2.0, -1.0], [1.0, -3.0, 0.25]], dtype=torch.float64)
    for value, other in zip(got, expected, strict=True):
        value.backward(weights.to(value), retain_graph=True)
        other.backward(weights, retain_graph=True)
        assert exact.grad is not None and ours.grad is not None
        assert exact.grad.isfinite().all()
        rough = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(ours.grad.double().cpu(), exact.grad, **rough)
        ours.grad = exact.grad = None


def test_it_takes_the_others_nothing(backend):
    """The gradient is that of the call without the impossible sequence."""
    logits, tokens = _case(300, torch.float32, "at one position")
    grads = []
    for some in (tokens, tokens[:, [0, 2]]):
        x = logits.to(backend.device, copy=True).requires_grad_()
        joint = ops.mixture_log_prob(x, some.to(backend.device))[0]
        joint[:1].sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
