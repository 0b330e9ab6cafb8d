"""The discretised Gaussian process: its rates and its numbers as published, its transitions to the last digit."""

import itertools
import math
from pathlib import Path

import mpmath
import pytest
import torch
from gaussians import small

from di4c_ext.process import GaussianProcess

FIXTURE = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures" / "pixels.pt"


def published(part):
    if not FIXTURE.is_file():
        pytest.skip(f"{FIXTURE} is not there: the published system's golden numbers are not part of the repository")
    return torch.load(FIXTURE, weights_only=True)[part]


# ---- the rates ----


def rate_by_loops(num_states, rate_sigma, q_sigma):
    pi = [math.exp(-((i + 1 - num_states // 2) ** 2) / (2 * q_sigma**2)) for i in range(num_states)]
    rate = torch.zeros(num_states, num_states, dtype=torch.float64)
    for i, j in itertools.permutations(range(num_states), 2):
        outer = min(i, j) if i + j < num_states else max(i, j)
        rate[i, j] = math.exp(-((abs(i - j) - 1) ** 2) / rate_sigma**2)
        if i != outer:
            rate[i, j] *= pi[j] / pi[i]
    return rate - rate.sum(1).diag(), torch.tensor(pi, dtype=torch.float64) / sum(pi)


@pytest.mark.parametrize("num_states", [2, 3, 8, 9])
def test_rate_is_its_definition(num_states):
    process = small(num_states)
    rate, pi = rate_by_loops(num_states, 1.5, 3.0)
    torch.testing.assert_close(process.rate, rate, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(process.stationary, pi, rtol=1e-13, atol=0)


def test_published_rate():
    process = GaussianProcess()
    rate, pi = process.rate, process.stationary
    assert -rate.diagonal().amin() == pytest.approx(11.634, abs=5e-4)
    assert -rate.diagonal().amax() == pytest.approx(5.817, abs=5e-4)
    assert 1 < (rate - rate.diagonal().diag()).amax() <= 1.000002
    assert pi.amax() / pi.amin() == pytest.approx(1.0317, abs=5e-5) and pi.argmax() == 127
    flow = pi[:, None] * rate
    assert torch.allclose(flow, flow.mT, rtol=1e-12, atol=0)  # detailed balance
    eigenvalues = torch.linalg.eigvalsh(pi.sqrt()[:, None] * rate / pi.sqrt()).flip(0)
    for i, value in ((0, 0.0), (1, -0.02092), (2, -0.0827), (255, -12.870)):
        assert eigenvalues[i] == pytest.approx(value, abs=5e-4 if i == 255 else 5e-5)
    for t, beta in ((0.01, 14.47), (1.0, 1381.6)):
        assert process.beta(t) == pytest.approx(beta, rel=5e-4)


# t, I(t), P(stay) at 128, standard deviation from 128, largest TV to pi, fraction of entries below 1e-8
TABLE = [
    (0.01, 0.141, 0.219, 6.2, 0.923, 0.62),
    (0.02, 0.289, 0.073, 8.9, 0.90, 0.55),
    (0.1, 1.755, 0.0185, 21.9, 0.79, 0.25),
    (0.3, 8.94, 0.0081, 48.6, 0.58, 0.0),
    (0.5, 27.0, 0.0048, 68.6, 0.37, 0.0),
    (0.7, 72.4, 0.0040, 73.5, 0.14, 0.0),
    (1.0, 297.0, 0.0039, 73.6, 0.0013, 0.0),
]


@pytest.mark.parametrize(("t", "interval", "stay", "width", "distance", "clamped"), TABLE)
def test_published_table(t, interval, stay, width, distance, clamped):
    process = GaussianProcess()
    q = process.transition(t)
    assert process.interval(t) == pytest.approx(interval, rel=4e-3)
    assert q[128, 128] == pytest.approx(stay, abs=5e-4 if stay > 0.1 else 6e-5 if stay < 0.07 else 5e-4)
    variance = (q[128] * (torch.arange(256.0) - 128) ** 2).sum()
    assert math.sqrt(variance) == pytest.approx(width, abs=0.06)
    assert 0.5 * (q - process.stationary).abs().sum(1).amax() == pytest.approx(distance, rel=0.02)
    assert (q < 1e-8).double().mean() == pytest.approx(clamped, abs=0.006)


def test_published_transitions():
    given = published("transition")
    process, rows = GaussianProcess(cutoff=1e-8, epsilon=1e-9), given["rows"]
    assert (process.rate[rows] - given["base_rate"]).abs().max() < 5e-7
    t, s = given["t"], given["s"]
    for q, theirs, error in (
        (process.transition(t), given["q"], 5e-7),
        (process.transition(t, s), given["qts"], 3e-6),  # theirs: I(t) - I(s) in float32
    ):
        assert (q[:, rows] - theirs).abs().max() < error
        assert (q == 0).double().mean() > 0.1  # the cut


def test_published_posterior():
    given = published("posterior")
    settings = {"rate_sigma": 3.0, "q_sigma": 64.0, "time_base": 1.0}
    process = GaussianProcess(32, **settings, epsilon=1e-9, cutoff=1e-8)
    x_t, t, s = given["x_t"], given["t"], given["s"]
    at_x_0 = torch.nn.functional.one_hot(given["x_0"], 32).double().log()
    assert (process.posterior(x_t, at_x_0, t, s) - given["ps_given_x0"]).abs().max() < 1e-6
    exact = GaussianProcess(32, **settings)
    assert (exact.posterior(x_t, given["p0t"].log(), t, s) - given["ps_marginal"]).abs().max() < 1e-6


# ---- the transitions ----


@pytest.mark.parametrize("num_states", [2, 3, 32, 256])
def test_transitions_are_a_semigroup_that_keeps_pi(num_states):
    process = GaussianProcess(num_states, rate_sigma=1 + num_states / 50, q_sigma=2.0 * num_states)
    pi = process.stationary
    for r, s, t in ((0.0, 0.001, 0.3), (0.1, 0.5, 1.0), (0.0, 0.5, 0.5001)):
        first, second, whole = process.transition(s, r), process.transition(t, s), process.transition(t, r)
        assert torch.allclose(first @ second, whole, rtol=1e-8, atol=0)
        for q in (first, second, whole):
            assert (q > 0).all() and torch.allclose(q.sum(1), torch.ones(num_states).double(), atol=1e-11)
            assert torch.allclose(pi @ q, pi, rtol=1e-10)
            assert torch.allclose(pi[:, None] * q, (pi[:, None] * q).mT, rtol=1e-8, atol=0)


def test_transitions_at_small_times_have_all_digits():
    """Every entry, however small, against an exponential of 60 digits."""
    process = GaussianProcess(20, rate_sigma=1.0, q_sigma=40.0)
    rate = process.rate
    with mpmath.workdps(60):
        for t in (1e-6, 0.01, 0.2):
            exact = mpmath.expm(process.interval(t).item() * mpmath.matrix(rate.tolist()))
            exact = torch.tensor([[float(exact[i, j]) for j in range(20)] for i in range(20)], dtype=torch.float64)
            q = process.transition(t)
            assert exact.amin() < 1e-12 or t == 0.2
            assert ((q - exact) / exact).abs().max() < 1e-10


def test_the_two_ways_to_the_exponential_meet():
    process = GaussianProcess()
    rate = process._rate(torch.device("cpu"))
    assert 8 < rate._long < 64
    tau = rate._long * torch.tensor([0.5, 1.0], dtype=torch.float64)
    squared, spectral = rate._by_squaring(tau, tau[1].item()), rate._by_spectrum(tau)
    assert torch.allclose(squared, spectral, rtol=1e-8, atol=0)
    mixed = rate.exponential(tau * 1.5)
    assert torch.allclose(mixed[0] @ mixed[1], rate.exponential(tau.sum()[None] * 1.5)[0], rtol=1e-8, atol=0)
    assert torch.allclose(rate.exponential(tau / 9, 297.0), rate.exponential(tau / 9), rtol=1e-9, atol=0)  # unseen
    assert torch.allclose(rate.laws(tau / 9), rate.exponential(tau / 9), rtol=0, atol=2e-14)
    stay = rate.laws(torch.zeros(1).double())[0]
    assert torch.equal(stay > 0, torch.eye(256).bool()) and torch.allclose(stay.diagonal(), torch.ones(256).double())


def test_a_narrow_pi_has_no_entry_that_is_lost():
    process = GaussianProcess(64, rate_sigma=0.5, q_sigma=3.0)
    assert process.stationary.amin() < 1e-20
    for t in (1e-9, 0.01, 1.0):
        q = process.transition(t)
        assert (q >= 1e-150).all() and torch.allclose(q.sum(1), torch.ones(64).double(), atol=1e-9)
    assert torch.allclose(process.transition(1.0), process.stationary.expand(64, 64), rtol=1e-6, atol=1e-9)


def test_times_of_a_transition():
    process = small(5)
    q = process.transition(torch.tensor([0.2, 0.7, 0.2]), 0.1)
    assert q.shape == (3, 5, 5) and q.dtype == torch.float64
    for b, t in enumerate((0.2, 0.7, 0.2)):
        t = torch.tensor(t).double().item()  # as a float32 holds it
        assert torch.allclose(q[b], process.transition(t, 0.1), rtol=1e-13)
    shared = process.transition(torch.full((4,), 0.3))
    assert shared.shape == (4, 5, 5) and shared.stride(0) == 0
    assert torch.equal(process.transition(0.3, 0.3), torch.eye(5).double())
    assert process.transition(torch.zeros(0)).shape == (0, 5, 5)
    before = process.transition(0.3)
    process.transition(0.3).zero_()  # the caller's own
    assert torch.equal(process.transition(0.3), before)
    # what is lost in I(t) - I(s) if the two are subtracted
    assert process.interval(1.0, 1 - 1e-9) == pytest.approx(0.05 * 100 * math.log(100) * 1e-9, rel=1e-6)
