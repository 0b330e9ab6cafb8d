"""The discretised Gaussian process's noise and its two steps, against Bayes' rule written out."""

import pytest
import torch
from gaussians import normal, small
from tiny import chi_square_z, counts, product_law
from torch.utils._python_dispatch import TorchDispatchMode

from di4c_ext import ops, random
from di4c_ext.ops import Hidden, Logistic
from di4c_ext.process import GaussianProcess

FORMS = ("step", "step_marginal")


# ---- noise ----


def test_prior():
    process, keys = small(4), random.keys(1, 20_000)
    x = process.prior((20_000, 3), keys)
    assert abs(chi_square_z(counts(x, 4), product_law(process.stationary.expand(3, 4)))) < 4
    assert torch.equal(process.prior((5, 3), keys[7:12]), x[7:12])


def test_corrupt():
    process, n = small(), 20_000
    keys, x_0 = random.keys(3, n), torch.tensor([0, 2]).expand(n, 2)
    law = product_law(process.transition(0.4)[[0, 2]])
    assert abs(chi_square_z(counts(process.corrupt(x_0, 0.4, keys), 3), law)) < 4
    several = process.corrupt(x_0[:4000], torch.full((4000,), 0.4, dtype=torch.float64), keys[:4000], draws=5)
    assert several.shape == (4000, 5, 2) and abs(chi_square_z(counts(several, 3), law)) < 4
    assert torch.equal(process.corrupt(x_0, 0.0, keys), x_0)


def test_corrupt_at_a_time_for_each_draw():
    process, n = small(), 6000
    keys, x_0 = random.keys(4, n), torch.tensor([1, 2]).expand(n, 2)
    t = torch.tensor([0.8, 0.5, 0.8, 0.4], dtype=torch.float64).expand(n, 4)
    x_t = process.corrupt(x_0, t, keys, draws=4)
    for draw in range(4):
        law = product_law(process.transition(t[0, draw].item())[[1, 2]])
        assert abs(chi_square_z(counts(x_t[:, draw], 3), law)) < 4
    pairs = x_t[:, 0] * 3 + x_t[:, 2]  # draws at one time are independent
    rows = process.transition(0.8)[[1, 2]]
    assert abs(chi_square_z(counts(pairs, 9), product_law((rows[:, :, None] * rows[:, None]).flatten(1)))) < 4


@pytest.mark.parametrize("num_states", [2, 31, 256])
def test_corrupt_is_a_function_of_the_key(num_states):
    process, keys = GaussianProcess(num_states), random.keys(0, 6)
    x_0 = torch.arange(6 * 40).view(6, 40) % num_states
    t = torch.linspace(0.01, 1, 24).view(6, 4)
    whole = process.corrupt(x_0, t, keys, draws=4)
    assert ((whole >= 0) & (whole < num_states)).all()
    for b in range(6):
        assert torch.equal(process.corrupt(x_0[b : b + 1], t[b : b + 1], keys[b : b + 1], draws=4)[0], whole[b])
    assert torch.equal(process.corrupt(x_0, t[:, :2], keys, draws=2), whole[:, :2])
    assert torch.equal(process.corrupt(x_0, t[:, 0], keys), whole[:, 0])
    assert not torch.equal(process.corrupt(x_0, t, keys, draws=4, stream=1), whole)


def test_corrupt_draws_no_state_that_cannot_be():
    process, keys = GaussianProcess(cutoff=1e-8, epsilon=1e-9), random.keys(0, 40)
    x_0 = torch.arange(256).repeat(40, 4)
    q = process.transition(0.01)
    x_t = process.corrupt(x_0, 0.01, keys)
    assert (q == 0).any(1).all() and (q[x_0, x_t] > 0).all()


# ---- steps ----


def bayes(process, x_t, p, t, s):
    """sum over x_0 of p(x_0) q(x_s | x_t, x_0) at one position, as published: with its epsilons."""
    q_ts, q_s, q_t = process.transition(t, s), process.transition(s), process.transition(t)
    law, e = torch.zeros_like(p), process.epsilon
    for x_0 in range(len(p)):
        w = (q_ts[:, x_t] + e) * (q_s[x_0] + e) / (q_t[x_0, x_t] + e) + e
        law += p[x_0] * w / w.sum()
    return law


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.5, 0.45), (0.25, 0.0)])
def test_step_is_the_true_posterior(form, t, s):
    for process, seed in ((small(), 0), (small(epsilon=1e-2, cutoff=1e-3), 1)):
        logits = normal(1, 2, 3, seed=seed)
        for x_t in ([0, 2], [1, 1]):
            exact = torch.stack([bayes(process, v, logits[0, d].softmax(0), t, s) for d, v in enumerate(x_t)])
            state = torch.tensor([x_t])
            assert torch.allclose(process.posterior(state, logits, t, s)[0], exact, atol=1e-12)
            step = getattr(process, form)
            n, draws = 500, 40
            x_s = step(state.expand(n, -1), logits.expand(n, -1, -1).float(), t, s, random.keys(7, n), draws=draws)
            assert x_s.shape == (n, draws, 2)
            assert abs(chi_square_z(counts(x_s, 3), product_law(exact))) < 4
            state, row = state.expand(20_000, -1), logits.expand(20_000, -1, -1).float()
            once = step(state, row, t, s, random.keys(8, 20_000))
            assert abs(chi_square_z(counts(once, 3), product_law(exact))) < 4


@pytest.mark.parametrize("num_states", [2, 32, 256])
def test_posterior_of_an_unlikely_x_0(num_states):
    """States that no noise brings together: all digits count, and the two halves of the way are shared alike."""
    process = GaussianProcess(num_states)
    x_t = torch.zeros(1, 1, dtype=torch.int64)
    logits = torch.full((1, 1, num_states), -torch.inf)
    logits[..., -1] = 0
    t, s = 0.02, 0.01
    law = process.posterior(x_t, logits, t, s)[0, 0]
    assert law.sum() == pytest.approx(1, abs=1e-9) and (law > 0).all()
    q_ts, q_s = process.transition(t, s), process.transition(s)
    assert torch.allclose(law, q_ts[:, 0] * q_s[-1] / process.transition(t)[-1, 0], rtol=1e-8)
    for form in FORMS:
        x_s = getattr(process, form)(x_t, logits, t, s, random.keys(0, 1), draws=2000)
        assert abs(x_s.double().mean() - (law * torch.arange(num_states)).sum()) < 0.02 * num_states
        assert (law[x_s] > 1e-9).all()


@pytest.mark.parametrize("form", FORMS)
def test_step_takes_one_time_per_sample_and_is_a_function_of_the_key(form):
    process, keys = small(40, rate_sigma=4.0, q_sigma=80.0, time_base=1.0), random.keys(5, 8)
    logits = normal(8, 6, 40, seed=2).float()
    x_t = process.prior((8, 6), keys)
    step = getattr(process, form)
    t = torch.linspace(0.5, 1, 8, dtype=torch.float64)
    whole = step(x_t, logits, t, t / 3, keys, draws=5)
    for b in range(8):
        one = step(x_t[b : b + 1], logits[b : b + 1], t[b].item(), t[b].item() / 3, keys[b : b + 1], draws=5)
        assert torch.equal(one[0], whole[b])
    assert torch.equal(step(x_t, logits, t, t / 3, keys, draws=3), whole[:, :3])
    assert torch.equal(step(x_t, logits, t, t / 3, keys), whole[:, 0])
    same = torch.full((8,), 0.75, dtype=torch.float64)
    assert torch.equal(step(x_t, logits, same, 0.5, keys), step(x_t, logits, 0.75, 0.5, keys))
    assert not torch.equal(step(x_t, logits, t, t / 3, keys, draws=5, stream=1), whole)


def test_pieces_of_the_marginal_step_are_the_whole(monkeypatch):
    process, keys = small(7), random.keys(5, 3)
    x_t, logits = process.prior((3, 50), keys), normal(3, 50, 7).float()
    whole = process.step_marginal(x_t, logits, 0.6, 0.3, keys, draws=2)
    monkeypatch.setattr("di4c_ext.process.gaussian._PIECE", 200)
    assert torch.equal(process.step_marginal(x_t, logits, 0.6, 0.3, keys, draws=2), whole)
    assert torch.equal(process.corrupt(x_t, torch.rand(3, 4), keys, draws=4) >= 0, torch.ones(3, 4, 50).bool())


@pytest.mark.parametrize("form", FORMS)
def test_step_to_the_data_and_bad_rows(form):
    process, keys = small(4), random.keys(0, 500)
    logits = normal(500, 3, 4).float()
    logits[17, 1] = torch.nan
    logits[20, 0] = -torch.inf
    logits[30, 2, 1] = torch.inf
    x_t = process.prior((500, 3), keys)
    step = getattr(process, form)
    x_s, x_0 = step(x_t, logits, 0.7, 0.3, keys), step(x_t, logits, 0.7, 0.0, keys)
    bad = torch.zeros(500, 3, dtype=torch.bool)
    bad[17, 1] = bad[20, 0] = True
    assert torch.equal(x_s == -1, bad) and torch.equal(x_0 == -1, bad) and x_0[30, 2] == 1
    if form == "step":
        assert torch.equal(x_0, ops.sample_categorical(logits, keys))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_temperature(form, temperature):
    process, n = small(), 20_000
    logits, x_t = normal(1, 2, 3, seed=3), torch.tensor([[0, 1]])
    p = logits.softmax(-1) ** 2 if temperature else (logits == logits.amax(-1, keepdim=True)).double()
    law = process.posterior(x_t, p.log(), 0.8, 0.3)[0]
    x_s = getattr(process, form)(
        x_t.expand(n, -1), logits.float().expand(n, -1, -1), 0.8, 0.3, random.keys(1, n), temperature=temperature
    )
    assert abs(chi_square_z(counts(x_s, 3), product_law(law))) < 4


@pytest.mark.parametrize("form", FORMS)
def test_logits_in_short_forms(form):
    process, keys = GaussianProcess(64, rate_sigma=4.0, q_sigma=128.0), random.keys(2, 4)
    x_t = process.prior((4, 300), keys)
    logistic = Logistic(normal(4, 300).tanh().float(), normal(4, 300, seed=1).float() - 2, 64)
    hidden = Hidden(normal(4, 300, 8).float(), normal(64, 8, seed=2).float())
    for logits in (logistic, hidden):
        step = getattr(process, form)
        x_s = step(x_t, logits, 0.5, 0.2, keys, draws=3)
        whole = step(x_t, logits.logits(), 0.5, 0.2, keys, draws=3)
        assert (x_s == whole).double().mean() > 0.999  # but for draws within rounding of a boundary
        assert torch.allclose(
            process.posterior(x_t, logits, 0.5, 0.2), process.posterior(x_t, logits.logits(), 0.5, 0.2), atol=1e-5
        )
        assert process.carry_over(logits, x_t) is logits
    assert torch.equal(process.weight(x_t), torch.ones(4, 300))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > 0:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_nothing_of_all_states_and_positions_is_made(kernels):
    if kernels.name != "cpu":
        pytest.skip("the same on every device")
    process, keys = GaussianProcess(64), random.keys(0, 2)
    logistic = Logistic(torch.zeros(2, 1000), torch.zeros(2, 1000), 64)
    x_0 = torch.zeros(2, 1000, dtype=torch.int64)
    process.step(x_0, logistic, 0.9, 0.1, keys)  # what is kept is made first
    with Largest() as largest:
        x_t = process.corrupt(x_0, 0.9, keys)
        process.step(x_t, logistic, 0.9, 0.1, keys)
    assert largest.elements <= 5 * 64 * 64 < 1000 * 64  # tables alone


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_states must be at least 2, got 1"):
        GaussianProcess(1)
    with pytest.raises(ValueError, match="rate_sigma must be greater than 0 and finite, got -1"):
        GaussianProcess(4, rate_sigma=-1)
    with pytest.raises(ValueError, match="time_exponential must be greater than 1 and finite, got 1"):
        GaussianProcess(4, time_exponential=1)
    with pytest.raises(ValueError, match=r"cutoff = 1e-08 without epsilon.*take epsilon = 1e-9"):
        GaussianProcess(4, cutoff=1e-8)
    with pytest.raises(ValueError, match=r"epsilon and cutoff must lie in \[0, 1\), got -1 and 0"):
        GaussianProcess(4, epsilon=-1, cutoff=0)
    process, keys = small(), random.keys(0, 2)
    x, logits = process.prior((2, 4), keys), torch.zeros(2, 4, 3)
    for form in (process.step, process.step_marginal):
        with pytest.raises(ValueError, match=r"t down to a smaller s, got t = 0\.2, s = 0\.2"):
            form(x, logits, 0.2, 0.2, keys)
        with pytest.raises(ValueError, match=r"logits must be \(2, 4, 3\)"):
            form(x, torch.zeros(2, 4, 4), 1.0, 0.5, keys)
        with pytest.raises(ValueError, match=r"x_t must hold states 0\.\.2, got [345]"):
            form(x + 3, logits, 1.0, 0.5, keys)
        with pytest.raises(ValueError, match=r"t must be a number or \(2,\)"):
            form(x, logits, torch.ones(3), 0.5, keys)
        with pytest.raises(ValueError, match=r"temperature must be finite and >= 0.*got -1"):
            form(x, logits, 1.0, 0.5, keys, temperature=-1)
    with pytest.raises(ValueError, match=r"s must not be after t, got t = 0\.1, s = 0\.2"):
        process.transition(0.1, 0.2)
    with pytest.raises(ValueError, match=r"x_0 must hold states 0\.\.2, got -[123]"):
        process.corrupt(x - 3, 0.5, keys)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*got 1.5"):
        process.corrupt(x, 1.5, keys)
    with pytest.raises(ValueError, match=r"t must be a number or \(B,\), got shape \(2, 3\)"):
        process.corrupt(x, torch.ones(2, 3), keys)
    with pytest.raises(ValueError, match=r"\(B, draws\) = \(2, 4\), got \(2, 3\)"):
        process.corrupt(x, torch.ones(2, 3), keys, draws=4)
    with pytest.raises(ValueError, match="draws must be None or a number of draws >= 0, got -1"):
        process.corrupt(x, 0.5, keys, draws=-1)
    with pytest.raises(ValueError, match=r"keys must be \(2,\)"):
        process.corrupt(x, 0.5, random.keys(0, 3))
    with pytest.raises(ValueError, match=r"shape must be \(B, D\)"):
        process.prior((3, 4), keys)


def test_what_is_kept_serves_after_inference_mode():
    with torch.inference_mode():
        small(6).step_marginal(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 6), 0.9, 0.4, random.keys(0, 1))
    logits = torch.zeros(1, 2, 6, requires_grad=True)
    small(6).posterior(torch.zeros(1, 2, dtype=torch.int64), logits, 0.9, 0.4)[..., 0].sum().backward()
    assert logits.grad.abs().sum() > 0


def test_empty():
    process = small()
    for batch, length in ((0, 4), (2, 0)):
        keys, x = random.keys(0, batch), torch.zeros(batch, length, dtype=torch.int64)
        logits, t = torch.zeros(batch, length, 3), torch.linspace(0.5, 0.9, batch)
        assert process.corrupt(x, t, keys, draws=2).shape == (batch, 2, length)
        for form in (process.step, process.step_marginal):
            assert form(x, logits, t, t / 2, keys, draws=2).shape == (batch, 2, length)
