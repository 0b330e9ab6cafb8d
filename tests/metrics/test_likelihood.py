"""The likelihood bound on a joint that can be enumerated."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.likelihood import likelihood_bound, mean_likelihood_bound
from di4c_ext.process import AbsorbingProcess

S, D = 2, 3
STATES = torch.cartesian_prod(*[torch.arange(S)] * D)  # (S^D, D)
JOINT = torch.tensor([0.30, 0.02, 0.05, 0.13, 0.07, 0.20, 0.03, 0.20], dtype=torch.float64)


def exact_conditionals(x_t: Tensor, t: Tensor) -> Tensor:
    """log p(x^d | the clean positions of x_t) of JOINT: (B, D) -> (B, D, S)."""
    agrees = ((x_t[:, None] == S) | (x_t[:, None] == STATES)).all(-1)  # (B, S^D)
    mass = agrees * JOINT
    value = torch.nn.functional.one_hot(STATES, S).double()  # (S^D, D, S)
    return torch.log(torch.einsum("bn,nds->bds", mass, value) / mass.sum(-1)[:, None, None]).float()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_is_the_likelihood_where_the_denoiser_is_exact(schedule: str) -> None:
    """The chain rule in a random order: with exact conditionals the bound is tight, for every x_0."""
    process = AbsorbingProcess(S, schedule)
    draws = 4000
    keys = random.keys(0, draws * len(STATES))
    x_0 = STATES.repeat_interleave(draws, 0)
    bound = likelihood_bound(exact_conditionals, process, x_0, keys).double().view(len(STATES), draws)
    error = bound.mean(1) + JOINT.log()
    assert (error.abs() < 4.5 * bound.std(1) / draws**0.5).all(), error


def test_stratified_mean_estimates_the_entropy() -> None:
    counts = (JOINT * 1000).round().long()
    x_0 = STATES.repeat_interleave(counts, 0)
    found = mean_likelihood_bound(exact_conditionals, AbsorbingProcess(S), x_0, random.keys(1, len(x_0)), draws=32)
    assert found == pytest.approx(float(-(JOINT * JOINT.log()).sum()), abs=0.02)


def test_depends_on_the_keys_alone_and_has_a_gradient() -> None:
    logits = torch.zeros(D, S, requires_grad=True)
    x_0, keys, process = STATES, random.keys(2, len(STATES)), AbsorbingProcess(S)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        assert bool(((t > 0) & (t <= 1)).all())
        return logits.expand(len(x_t), D, S)

    whole = likelihood_bound(denoiser, process, x_0, keys)
    one_by_one = [likelihood_bound(denoiser, process, x_0[i : i + 1], keys[i : i + 1]) for i in range(len(x_0))]
    assert torch.equal(whole, torch.cat(one_by_one))
    whole.sum().backward()
    assert logits.grad is not None and float(logits.grad.abs().sum()) > 0
