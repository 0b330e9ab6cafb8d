"""Uniform-state diffusion: its noise, and its step of three masses against Bayes' rule written out."""

import itertools
import math

import pytest
import torch
from tiny import chi_square_z, counts, product_law

from di4c_ext import random
from di4c_ext.ops import Logistic
from di4c_ext.process import SCHEDULES, UniformProcess

# P(not lost at t), written down apart from the package
KEPT = {
    "log_linear": lambda t: math.exp(math.log(1 - 0.999 * t)),
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 1 - math.cos(math.pi * (1 - t) / 2),
    "arccos": lambda t: 1 - 2 / math.pi * math.acos(1 - t),
    "square": lambda t: (1 - t) ** 2,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transition(process, t, s=0.0):
    """q(x_t | x_s), rows x_s."""
    kept = KEPT[process.schedule](t) / KEPT[process.schedule](s)
    num = process.num_states
    return kept * torch.eye(num).double() + (1 - kept) / num


def test_every_schedule_is_checked_here():
    assert set(KEPT) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise(schedule):
    process, n = UniformProcess(4, schedule), 20_000
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(process.alpha(t), torch.tensor([KEPT[schedule](v) for v in t.tolist()]).double(), atol=1e-7)
    keys, x_0 = random.keys(3, n), torch.tensor([0, 3]).expand(n, 2)
    law = product_law(transition(process, 0.3)[[0, 3]])
    assert abs(chi_square_z(counts(process.corrupt(x_0, 0.3, keys), 4), law)) < 4
    assert torch.equal(process.corrupt(x_0, 0.0, keys), x_0)
    prior = process.prior((n, 2), random.keys(4, n))
    assert abs(chi_square_z(counts(prior, 4), torch.full((16,), 1 / 16))) < 4
    times = torch.tensor([0.3, 0.9, 0.3], dtype=torch.float64).expand(5000, 3)
    x_t = process.corrupt(x_0[:5000], times, keys[:5000], draws=3)
    for draw in range(3):
        law = product_law(transition(process, times[0, draw].item())[[0, 3]])
        assert abs(chi_square_z(counts(x_t[:, draw], 4), law)) < 4


def test_corrupt_is_a_function_of_the_key():
    process, keys = UniformProcess(50), random.keys(0, 32)
    x_0 = torch.arange(32 * 9).view(32, 9) % 50
    t = torch.linspace(0.1, 1, 32)
    whole = process.corrupt(x_0, t, keys, draws=3)
    for b in range(32):
        assert torch.equal(process.corrupt(x_0[b : b + 1], t[b].item(), keys[b : b + 1], draws=3)[0], whole[b])
    assert torch.equal(process.corrupt(x_0, t, keys), whole[:, 0])
    assert not torch.equal(process.corrupt(x_0, t, keys, draws=3, stream=1), whole)
    earlier = process.corrupt(x_0, t / 2, keys)
    assert torch.equal(earlier[earlier != x_0], whole[:, 0][earlier != x_0])  # lost early, and to that state


def bayes(process, x_t, p, t, s):
    """p(x_s | x_t) where p is the law of x_0 given the other positions: the joint of x_0, x_s and x_t, summed."""
    law = torch.zeros(process.num_states, dtype=torch.float64)
    to_s, to_t = transition(process, s), transition(process, t, s)
    for x_0, x_s in itertools.product(range(process.num_states), repeat=2):
        law[x_s] += p[x_0] * to_s[x_0, x_s] * to_t[x_s, x_t]
    return law / law.sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.7, 0.2), (0.25, 0.0)])
def test_step_is_the_true_posterior(schedule, t, s):
    process, logits = UniformProcess(3, schedule), normal(1, 2, 3, seed=1)
    for x_t in ([0, 2], [1, 1]):
        exact = torch.stack([bayes(process, v, logits[0, d].softmax(0), t, s) for d, v in enumerate(x_t)])
        state = torch.tensor([x_t])
        assert torch.allclose(process.posterior(state, logits, t, s)[0], exact, atol=1e-7)
        n, draws = 500, 40
        x_s = process.step(state.expand(n, -1), logits.expand(n, -1, -1).float(), t, s, random.keys(9, n), draws=draws)
        assert x_s.shape == (n, draws, 2)
        assert abs(chi_square_z(counts(x_s, 3), product_law(exact))) < 4
        state, row = state.expand(20_000, -1), logits.expand(20_000, -1, -1).float()
        once = process.step(state, row, t, s, random.keys(8, 20_000))
        assert abs(chi_square_z(counts(once, 3), product_law(exact))) < 4


def test_step_takes_one_time_per_sample_and_is_a_function_of_the_key():
    process, keys = UniformProcess(4, "cosine"), random.keys(5, 32)
    logits = normal(32, 6, 4, seed=2).float()
    x_t = process.prior((32, 6), random.keys(6, 32))
    t = torch.linspace(0.5, 1, 32, dtype=torch.float64)
    whole = process.step(x_t, logits, t, t / 3, keys, draws=5)
    for b in range(32):
        one = process.step(x_t[b : b + 1], logits[b : b + 1], t[b].item(), t[b].item() / 3, keys[b : b + 1], draws=5)
        assert torch.equal(one[0], whole[b])
    assert torch.equal(process.step(x_t, logits, t, t / 3, keys, draws=3), whole[:, :3])
    assert torch.equal(process.step(x_t, logits, t, t / 3, keys), whole[:, 0])


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_temperature(temperature):
    process, n = UniformProcess(3), 20_000
    logits, x_t = normal(1, 2, 3, seed=3), torch.tensor([[0, 1]])
    p = logits.softmax(-1) ** 2 if temperature else (logits == logits.amax(-1, keepdim=True)).double()
    law = process.posterior(x_t, p.log(), 0.8, 0.3)[0]
    x_s = process.step(
        x_t.expand(n, -1), logits.float().expand(n, -1, -1), 0.8, 0.3, random.keys(1, n), temperature=temperature
    )
    assert abs(chi_square_z(counts(x_s, 3), product_law(law))) < 4


def test_last_step_and_bad_rows():
    """At s = 0 no state comes that the logits do not allow, x_t excepted where they allow it."""
    process, keys = UniformProcess(5), random.keys(0, 1000)
    logits = normal(1000, 3, 5).float()
    logits[..., 2] = -torch.inf
    logits[17, 1] = torch.nan
    logits[20, 0, 3] = torch.inf
    x_t = process.prior((1000, 3), random.keys(1, 1000))
    for t in (0.01, 0.5, 1.0):
        x_0 = process.step(x_t, logits, t, 0.0, keys)
        bad = torch.zeros(1000, 3, dtype=torch.bool)
        bad[17, 1] = True
        assert torch.equal(x_0 == -1, bad) and (x_0 != 2).all() and x_0[20, 0] == 3
    x_s = process.step(x_t, logits, 0.5, 0.49, keys)
    assert (x_s == x_t).double().mean() > 0.9 and ((x_s == 2) & (x_t == 2)).any()


def test_many_states_and_short_forms():
    process, keys = UniformProcess(256), random.keys(0, 2)
    logits = Logistic(torch.zeros(2, 100), torch.zeros(2, 100), 256)
    x_t = process.prior((2, 100), keys)
    assert torch.equal(process.step(x_t, logits, 0.9, 0.1, keys), process.step(x_t, logits.logits(), 0.9, 0.1, keys))
    law = process.posterior(x_t, logits, 0.9, 0.1)
    assert torch.allclose(law.sum(-1), torch.ones(2, 100).double())
    assert process.carry_over(logits, x_t) is logits and torch.equal(process.weight(x_t), torch.ones(2, 100))


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown schedule 'sqrt'; known are log_linear, linear, cosine, arccos"):
        UniformProcess(3, "sqrt")
    with pytest.raises(ValueError, match="UniformProcess: num_states must be at least 2, got 1"):
        UniformProcess(1)
    process, keys = UniformProcess(3), random.keys(0, 2)
    x, logits = process.prior((2, 4), keys), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"t down to a smaller s, got t = 0\.2, s = 0\.2"):
        process.step(x, logits, 0.2, 0.2, keys)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*got 1.5"):
        process.corrupt(x, 1.5, keys)
    with pytest.raises(ValueError, match=r"t must be a number or \(2,\)"):
        process.corrupt(x, torch.ones(3), keys)
    with pytest.raises(ValueError, match=r"\(B, draws\) = \(2, 4\), got \(2, 3\)"):
        process.corrupt(x, torch.ones(2, 3), keys, draws=4)
    with pytest.raises(ValueError, match=r"logits must be \(2, 4, 3\)"):
        process.step(x, torch.zeros(2, 4, 4), 1.0, 0.5, keys)
    with pytest.raises(ValueError, match=r"x_t must hold states 0\.\.2"):
        process.step(x + 3, logits, 1.0, 0.5, keys)
    with pytest.raises(ValueError, match="x_0 must be int64"):
        process.corrupt(x.float(), 0.5, keys)
    with pytest.raises(ValueError, match=r"shape must be \(B, D\)"):
        process.prior((3, 4), keys)


def test_empty():
    process = UniformProcess(3)
    for batch, length in ((0, 4), (2, 0)):
        keys, x = random.keys(0, batch), torch.zeros(batch, length, dtype=torch.int64)
        logits, t = torch.zeros(batch, length, 3), torch.linspace(0.5, 0.9, batch)
        assert process.corrupt(x, t, keys, draws=2).shape == (batch, 2, length)
        assert process.step(x, logits, t, t / 2, keys, draws=2).shape == (batch, 2, length)
    assert process.step(torch.zeros(2, 4).long(), torch.zeros(2, 4, 3), 1, 0, random.keys(0, 2), draws=0).numel() == 0
