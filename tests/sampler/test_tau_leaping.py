"""Tau-leaping: the law of its leaps, its many jumps, its numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from levels import Chain, last_law, start, table
from tiny import chi_square_z, counts, product_law, sequences

from di4c_ext import random
from di4c_ext.process import GaussianProcess
from di4c_ext.sampler import (
    sample_tau_leaping,
)
from di4c_ext.sampler.tau_leaping import _poisson

S, D = 3, 2


def leap_law(process: Chain, logits: torch.Tensor, t: float, s: float, most: int = 40) -> torch.Tensor:
    """(S^D, S^D) of one leap, by adding up the Poisson numbers of jumps to each state."""
    q, states, laws = process.transition(t), sequences(S, D), []
    for x, p in zip(states, logits.double().softmax(-1), strict=True):
        marginals = []
        for d in range(D):
            ends = torch.zeros(2 * most * S + 1, dtype=torch.float64)
            ends[most * S] = 1  # the sum of the jumps, centred
            for target in range(S):
                if target == x[d]:
                    continue
                ratio = sum(p[d, x_0] * q[x_0, target] / (q[x_0, x[d]] + 1e-9) for x_0 in range(S))
                mean = process.beta(t) * (t - s) * process.rate[target, x[d]] * ratio
                after = torch.zeros_like(ends)
                weight = torch.exp(-mean)
                for n in range(most):
                    after += weight * ends.roll(n * (target - int(x[d])))
                    weight = weight * mean / (n + 1)
                ends = after
            place = (torch.arange(len(ends)) - most * S + x[d]).clamp(0, S - 1)
            marginals.append(torch.zeros(S, dtype=torch.float64).index_add_(0, place, ends))
        laws.append(product_law(torch.stack(marginals)))
    return torch.stack(laws)


@pytest.mark.parametrize("grid", [[1.0], [1.0, 0.6], [1.0, 0.5, 0.05], [1.0, 0.5, 0.05, 0.0]])
def test_tau_leaping_has_the_enumerated_law(grid):
    process, teacher = Chain(S), table(1, S, D, 14)
    x, keys = start(process, 13)
    x_0 = sample_tau_leaping(teacher, process, x, grid, keys, logits_bytes=4_000 * D * (24 * S + 160 * 64))
    law = torch.full((S**D,), 1 / S**D, dtype=torch.float64)
    for t, s in pairwise(grid):
        law = law @ leap_law(process, teacher.table[0], t, s)
    law = law @ last_law(teacher.table[0])
    assert abs(chi_square_z(counts(x_0, S), law)) < 4
    above = [t for t in grid if t]
    expected = grid if grid[-1] else [*above, above[-1]]  # the published grid ends with two looks at the last time
    assert [t for _, t in teacher.calls] == pytest.approx(expected)
    assert len(teacher.calls) == len(grid)


def test_gaussian_process_has_the_enumerated_law():
    process = GaussianProcess(S, rate_sigma=1.0, q_sigma=2.0, time_exponential=10.0, time_base=0.5)
    teacher, keys = table(1, S, D, 21), random.keys(21, 10_000)
    x_0 = sample_tau_leaping(teacher, process, process.prior((10_000, D), keys), [1.0, 0.5], keys)
    law = product_law(process.stationary.expand(D, S)) @ leap_law(process, teacher.table[0], 1.0, 0.5)
    assert abs(chi_square_z(counts(x_0, S), law @ last_law(teacher.table[0]))) < 4


@pytest.mark.parametrize("rate", [150.0, 900.0])
def test_many_jumps_have_the_mean_and_variance_of_their_sum(rate):
    """A chain of many levels and fast rates: 200 jumps, drawn one by one, and 1200, drawn as a Gaussian."""
    size = 4001

    class Fast(Chain):
        def __init__(self):
            self.num_states = size
            self.rate = torch.diag(torch.full((size - 1,), 1.0), 1) + torch.diag(torch.full((size - 1,), 0.5), -1)
            self.rate = self.rate.double()

        def beta(self, t):
            return rate

        def transition(self, t, s=0.0):
            return torch.full((size, size), 1 / size, dtype=torch.float64)

    x, keys, seen = torch.full((64, 8), 2000), random.keys(14, 64), []
    sample_tau_leaping(
        lambda x, t: torch.zeros(*x.shape, size),
        Fast(),
        x,
        [1.0, 0.1],
        keys,
        callback=seen.append,
        logits_bytes=1 << 24,
    )
    moved = (seen[0]["x_s"] - 2000).double()
    jumps = 0.9 * rate  # up at 0.5, down at 1: the rates into a state are its column's
    assert moved.mean().item() == pytest.approx(-0.5 * jumps, abs=4 * (1.5 * jumps / 512) ** 0.5)
    assert moved.var().item() == pytest.approx(1.5 * jumps, rel=0.25)


def test_poisson_numbers():
    stats = pytest.importorskip("scipy.stats")
    mean = torch.tensor([0.0, 1e-9, 0.3, 4.0, 77.5, 512.0], dtype=torch.float64)[:, None]
    u = torch.tensor([0.0, 1e-12, 0.1, 0.5, 0.999, 1 - 2.0**-53], dtype=torch.float64)
    found = _poisson(mean.expand(-1, 6), u.expand(6, -1))
    assert torch.equal(found[0], torch.zeros(6).long())
    cdf = torch.from_numpy(stats.poisson.cdf(found.numpy(), mean.numpy()))
    below = torch.from_numpy(stats.poisson.cdf(found.numpy() - 1, mean.numpy()))
    assert (cdf > u - 1e-12).all() and (below <= u + 1e-12).all()
