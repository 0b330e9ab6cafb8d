"""The absorbing step: coins that know nothing of the logits, tokens only where a coin says so, rows left unread."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from laws import chi_square
from scipy.stats import binomtest

from di4c_ext import ops, random


def test_law(backend):
    """All 4^3 outcomes of three positions (one clean, two masked) against the product of the exact laws."""
    states, mask, n = 3, 3, 40_000
    logits = torch.randn(3, states, generator=torch.Generator().manual_seed(0))
    keys = random.keys(11, n, backend.device)
    x_t = torch.tensor([mask, 1, mask], device=backend.device).expand(n, 3)
    x_s = ops.absorbing_step(logits.to(backend.device).expand(n, 3, states), x_t, keys, unmask_prob=0.3, mask_id=mask)
    law = torch.zeros(3, 4, dtype=torch.float64)
    law[:, :3] = 0.3 * torch.softmax(logits.double(), -1)
    law[:, 3] = 0.7
    law[1] = torch.tensor([0, 1, 0, 0])
    probs = torch.stack([law[0, i] * law[1, j] * law[2, k] for i, j, k in itertools.product(range(4), repeat=3)])
    code = (x_s * torch.tensor([16, 4, 1], device=backend.device)).sum(-1).cpu()
    assert chi_square(torch.bincount(code, minlength=64), probs) > 1e-4


def test_draws_follow_the_law(backend):
    n = 40_000
    logits = torch.tensor([[[0.0, 1.0, -1.0, 2.0]]], device=backend.device)
    x_t = torch.full((1, 1), 9, device=backend.device)
    keys = random.keys(12, 1, backend.device)
    x_s = ops.absorbing_step(logits, x_t, keys, unmask_prob=0.8, mask_id=9, draws=n, temperature=2.0)
    assert x_s.shape == (1, n, 1)
    probs = torch.cat([0.8 * torch.softmax(logits.double().flatten().cpu() / 2, 0), torch.tensor([0.2])])
    counts = torch.bincount(x_s.flatten().cpu().clamp(max=4), minlength=5)
    assert chi_square(counts, probs) > 1e-4


def test_rare_unmasking(backend):
    """A rate of 1/1024 per position, the first step of a long schedule: a million coins, and what they let in."""
    batch, length, rate = 1024, 1024, 1 / 1024
    logits = torch.tensor([0.0, 1.0], device=backend.device).expand(batch, length, 2)
    x_t = torch.full((batch, length), 2, device=backend.device)
    x_s = ops.absorbing_step(logits, x_t, random.keys(13, batch, backend.device), unmask_prob=rate, mask_id=2)
    ones, zeros = int((x_s == 1).sum()), int((x_s == 0).sum())
    assert binomtest(ones + zeros, batch * length, rate).pvalue > 1e-3
    assert binomtest(ones, ones + zeros, 1 / (1 + math.exp(-1))).pvalue > 1e-3
    for one_way in ((x_s != 2).sum(0), (x_s != 2).sum(1)):  # no position and no sample has more of them
        assert chi_square(one_way.cpu(), torch.full((1024,), 1 / 1024)) > 1e-3


def test_certain_coins(backend):
    """Every coin of a million falls below 1 and none below 0."""
    logits = torch.zeros(1, 10, 2, device=backend.device)
    x_t, keys = torch.full((1, 10), 2, device=backend.device), random.keys(20, 1, backend.device)
    for rate in (0.0, 1.0):
        x_s = ops.absorbing_step(logits, x_t, keys, unmask_prob=rate, mask_id=2, draws=100_000)
        assert ((x_s != 2) == bool(rate)).all()


@pytest.mark.parametrize("states", [5, 1500])
def test_mask_class_is_never_drawn(backend, states):
    """A language model's logits hold the mask token: its logit, even NaN or the only large one, does not count."""
    keys = random.keys(14, 200, backend.device)
    logits = torch.randn(200, 4, states, generator=torch.Generator().manual_seed(1)).to(backend.device)
    x_t = torch.full((200, 4), 3, device=backend.device)
    results = []
    for value in (0.0, 100.0, math.nan, math.inf):
        logits[..., 3] = value
        results.append(ops.absorbing_step(logits, x_t, keys, unmask_prob=1.0, mask_id=3, draws=2, return_log_prob=True))
    for tokens, log_prob in results:
        assert (tokens != 3).all() and (tokens >= 0).all()
        assert torch.equal(tokens, results[0][0]) and torch.equal(log_prob, results[0][1])
    logits[..., 3] = -math.inf
    exact = torch.log_softmax(logits.double(), -1)[:, None].expand(-1, 2, -1, -1)
    exact = exact.gather(-1, results[0][0][..., None])[..., 0]
    torch.testing.assert_close(results[0][1].double(), exact, rtol=1e-6, atol=2e-6)


def test_coins_do_not_depend_on_the_logits(backend):
    keys = random.keys(15, 50, backend.device)
    x_t = torch.full((50, 20), 6, device=backend.device)
    g = torch.Generator().manual_seed(2)
    masked = [
        ops.absorbing_step(
            torch.randn(50, 20, 6, generator=g).mul(scale).to(backend.device), x_t, keys, unmask_prob=0.4, mask_id=6
        )
        == 6
        for scale in (0.1, 50.0)
    ]
    assert torch.equal(*masked)
    # The coin is the uniform of the same stream, and a token is what sample_categorical draws.
    coins = random.uniform(keys, 20, stream=8)
    logits = torch.randn(50, 20, 6, generator=g).to(backend.device)
    x_s = ops.absorbing_step(logits, x_t, keys, unmask_prob=0.4, mask_id=6, stream=8)
    assert torch.equal(x_s, torch.where(coins < 0.4, ops.sample_categorical(logits, keys, stream=8), 6))


def test_rows_that_stay_are_not_read(backend):
    keys = random.keys(16, 30, backend.device)
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(30, 8, 40, generator=g).to(backend.device)
    x_t = torch.randint(0, 41, (30, 8), generator=g).masked_fill(torch.rand(30, 8, generator=g) < 0.5, 40)
    x_t = x_t.to(backend.device)
    options = dict(unmask_prob=0.5, mask_id=40, draws=2, return_log_prob=True)
    x_s, log_prob = ops.absorbing_step(logits, x_t, keys, **options)
    stays = (x_s == x_t[:, None]).all(1)
    assert (x_t == 40)[stays].any() and (x_t != 40)[stays].any()
    again, again_log_prob = ops.absorbing_step(logits.masked_fill(stays[..., None], math.nan), x_t, keys, **options)
    assert torch.equal(again, x_s) and torch.equal(again_log_prob, log_prob)
    assert (log_prob[(x_s == x_t[:, None])] == 0).all() and (log_prob[x_s != x_t[:, None]] < 0).all()


def test_only_class_is_the_mask(backend):
    """Nothing is left to draw when the one class is the mask: a bad row, not a hang."""
    x_t = torch.zeros(1, 2, dtype=torch.int64, device=backend.device)
    logits = torch.zeros(1, 2, 1, device=backend.device)
    assert (ops.absorbing_step(logits, x_t, random.keys(0, 1, backend.device), unmask_prob=1.0, mask_id=0) == -1).all()


def test_probability_of_each_sample(backend):
    keys = random.keys(18, 3, backend.device)
    logits = torch.zeros(3, 2000, 4, device=backend.device)
    x_t = torch.full((3, 2000), 4, device=backend.device)
    prob = torch.tensor([0.0, 0.25, 1.0], device=backend.device)
    x_s = ops.absorbing_step(logits, x_t, keys, unmask_prob=prob, mask_id=4)
    rate = (x_s != 4).double().mean(1)
    assert rate[0] == 0 and rate[2] == 1 and abs(rate[1] - 0.25) < 0.04
    assert torch.equal(x_s[1:2], ops.absorbing_step(logits[1:2], x_t[1:2], keys[1:2], unmask_prob=0.25, mask_id=4))


def test_kernels_step_as_the_reference_does(implementation, monkeypatch):
    if not implementation.is_native:
        pytest.skip("it is what the others are compared with")
    g = torch.Generator().manual_seed(19)
    keys = random.keys(19, 20, implementation.device)
    for states, dtype in ((17, torch.float32), (1025, torch.bfloat16), (5000, torch.float16)):
        logits = torch.randn(20, 6, states, generator=g).mul(3).to(implementation.device, dtype)
        x_t = torch.randint(0, states, (20, 6), generator=g).masked_fill(torch.rand(20, 6, generator=g) < 0.7, 4)
        x_t, options = x_t.to(implementation.device), dict(unmask_prob=0.6, mask_id=4, draws=5, temperature=0.9)
        runs = [ops.absorbing_step(logits, x_t, keys, **options) for _ in range(20)]
        with monkeypatch.context() as patch:
            patch.setenv("DI4C_NATIVE", "off")
            expected = ops.absorbing_step(logits, x_t, keys, **options)
        assert all(torch.equal(tokens, expected) for tokens in runs)
