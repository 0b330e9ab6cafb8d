"""The bound of a few steps on mixtures small enough to count every path."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.likelihood import mean_likelihood_bound
from di4c_ext.metrics.mixture_bound import few_step_bound, mean_few_step_bound
from di4c_ext.process import AbsorbingProcess

S, D, L = 2, 3, 2
STATES = torch.cartesian_prod(*[torch.arange(S)] * D)
PROCESS = AbsorbingProcess(S)


def mixture(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
    """Logits (B, L, D, S) that hang on the context, the position and which of two latents it is."""
    seen = torch.where(x_t == S, 0.3, x_t.float() - 0.5)
    around = seen @ torch.tensor([[0.0, 1.1, -0.7], [0.4, 0.0, 0.9], [1.3, -0.2, 0.0]])
    sign = 2 * latents - 1  # (B, L, 1)
    lean = around[:, None] + sign * torch.tensor([1.5, 1.2, -0.8])
    return torch.stack([torch.zeros_like(lean), lean], -1)


def teacher(x_t: Tensor, t: Tensor) -> Tensor:
    return mixture(x_t, t, torch.full((len(x_t), 1, 1), 0.5))[:, 0]


def both(keys: Tensor, count: int) -> Tensor:
    return torch.arange(count).float()[None, :, None].expand(len(keys), count, 1)


def exact(num_steps: int) -> Tensor:
    """p_k of all STATES for the mixture of both latents, alike in weight, by counting every path of coins."""
    law: dict[tuple[int, ...], float] = {(S,) * D: 1.0}
    for i in range(num_steps):
        unmask = 1 / (num_steps - i)  # of the linear schedule
        following: dict[tuple[int, ...], float] = {}
        for state, mass in law.items():
            x_t = torch.tensor([state])
            p = mixture(x_t, torch.ones(1), both(torch.zeros(1), L)).double().softmax(-1)[0]  # (L, D, S)
            masked = [d for d in range(D) if state[d] == S]
            for choice in product(*[(*range(S), S) if d in masked else (state[d],) for d in range(D)]):
                opened = [d for d in masked if choice[d] != S]
                coins = unmask ** len(opened) * (1 - unmask) ** (len(masked) - len(opened))
                drawn = sum(math.prod(float(p[j, d, choice[d]]) for d in opened) for j in range(L)) / L
                if coins:
                    following[choice] = following.get(choice, 0.0) + mass * coins * drawn
        law = following
    return torch.tensor([law[tuple(state)] for state in STATES.tolist()], dtype=torch.float64)


def test_one_step_is_the_likelihood() -> None:
    found = few_step_bound(
        mixture, PROCESS, STATES, random.keys(0, len(STATES)), num_steps=1, latents=both, num_latents=L
    )
    assert float(exact(1).sum()) == pytest.approx(1.0)
    assert torch.allclose(found, -exact(1).log(), atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 3])
def test_more_steps_are_bounded(num_steps: int) -> None:
    draws = 4000
    keys, x_0 = random.keys(1, draws * len(STATES)), STATES.repeat_interleave(draws, 0)
    found = few_step_bound(mixture, PROCESS, x_0, keys, num_steps=num_steps, latents=both, num_latents=L)
    found = found.view(len(STATES), draws)
    law = exact(num_steps)
    assert float(law.sum()) == pytest.approx(1.0)
    margin = found.mean(1) + law.log()
    assert (margin > -4 * found.std(1) / draws**0.5).all() and float(margin.max()) < 0.2, margin


def test_fewer_latents_bound_from_further_above() -> None:
    """Latents drawn one by one: with 1 the mixture is a product of its mean latent in the logarithm."""

    def drawn(keys: Tensor, count: int) -> Tensor:
        return (random.uniform(keys, count) < 0.5).float()[..., None]

    keys, x_0 = random.keys(2, 4000 * len(STATES)), STATES.repeat_interleave(4000, 0)
    means = [
        float(few_step_bound(mixture, PROCESS, x_0, keys, num_steps=1, latents=drawn, num_latents=n).mean())
        for n in (1, 4, 32)
    ]
    true = float(-exact(1).log().mean())
    assert means[0] > means[1] > means[2] > true and means[2] - true < 0.05


def test_a_teacher_of_many_steps_meets_its_own_bound() -> None:
    """With steps too short to unmask two positions at once what is left is the bound of `metrics.likelihood`."""
    keys = random.keys(3, 64 * len(STATES))
    x_0 = STATES.repeat(64, 1)
    slow = mean_few_step_bound(teacher, PROCESS, x_0, keys, num_steps=200, batch_size=1000)
    assert slow == pytest.approx(mean_likelihood_bound(teacher, PROCESS, x_0, keys, draws=16), abs=0.05)
    one = mean_few_step_bound(teacher, PROCESS, x_0, keys, num_steps=1)
    at_once = teacher(torch.full((1, D), S), torch.ones(1)).log_softmax(-1)[0].double()
    wanted = -at_once[torch.arange(D), STATES].sum(1).mean()
    assert one == pytest.approx(float(wanted), abs=1e-5)


def test_depends_on_the_keys_alone() -> None:
    keys = random.keys(4, len(STATES))
    whole = few_step_bound(mixture, PROCESS, STATES, keys, num_steps=2, latents=both, num_latents=L)
    parts = [
        few_step_bound(mixture, PROCESS, STATES[i : i + 1], keys[i : i + 1], num_steps=2, latents=both, num_latents=L)
        for i in range(len(STATES))
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    with pytest.raises(ValueError, match="num_steps 0"):
        few_step_bound(mixture, PROCESS, STATES, keys, num_steps=0)
