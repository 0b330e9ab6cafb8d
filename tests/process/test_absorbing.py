"""The absorbing process: its schedules, its noise, and its step against Bayes' rule written out."""

import itertools
import math

import pytest
import torch
from tiny import chi_square_z, counts, product_law

from di4c_ext import random
from di4c_ext.ops import Hidden, Logistic
from di4c_ext.process import SCHEDULES, AbsorbingProcess

# P(masked at t), written down apart from the package
MASKED = {
    "log_linear": lambda t: 1 - math.exp(math.log(1 - 0.999 * t)),
    "linear": lambda t: t,
    "cosine": lambda t: math.cos(math.pi * (1 - t) / 2),
    "arccos": lambda t: 2 / math.pi * math.acos(1 - t),
    "square": lambda t: 1 - (1 - t) ** 2,
}


def test_every_schedule_is_checked_here():
    assert set(MASKED) == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule(schedule):
    process = AbsorbingProcess(3, schedule)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = process.alpha(t)
    assert torch.allclose(alpha, torch.tensor([1 - MASKED[schedule](v) for v in t.tolist()]).double(), atol=1e-7)
    assert alpha[0] == 1
    assert alpha[-1] == pytest.approx(1e-3 if schedule == "log_linear" else 0, abs=1e-15)
    assert (alpha.diff() < 0).all()
    assert process.unmask_prob(1, 0) == process.unmask_prob(0.37, 0) == 1  # the last step leaves no mask

    inner, h = t[1:-1], 1e-6
    slope = (process.alpha(inner + h) - process.alpha(inner - h)) / (2 * h)
    assert torch.allclose(process.elbo_weight(inner), -slope / (1 - alpha[1:-1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "revealed"),
    [
        ("arccos", [41, 44, 53, 118]),
        ("cosine", [19, 56, 83, 98]),
        ("linear", [64, 64, 64, 64]),
        ("square", [16, 48, 80, 112]),
    ],
)
def test_schedules_mean_what_image_token_models_mean(schedule, revealed):
    """How many of 256 tokens MaskGIT reveals in each of 4 steps."""
    m = AbsorbingProcess(3, schedule).mask_prob(torch.linspace(1, 0, 5))
    assert (-(256 * m).round().diff()).tolist() == revealed


def test_log_linear_reveals_like_the_language_models():
    """sigma(1) = 6.9078, and a step of dt from t unmasks dt / t."""
    process = AbsorbingProcess(3, "log_linear")
    assert -process.alpha(1.0).log().item() == pytest.approx(6.9078, abs=1e-4)
    assert process.unmask_prob(0.5, 0.5 - 1 / 1024).item() == pytest.approx(2 / 1024, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corrupt(schedule):
    process, n, length = AbsorbingProcess(3, schedule), 20_000, 4
    keys = random.keys(3, n)
    x_0 = torch.arange(n * length).view(n, length) % 3
    t = 0.3
    masked = process.corrupt(x_0, t, keys) == process.mask_id
    assert torch.equal(process.corrupt(x_0, t, keys)[~masked], x_0[~masked])
    m = torch.tensor([1 - MASKED[schedule](t), MASKED[schedule](t)])
    law = product_law(m.expand(length, 2))
    assert abs(chi_square_z(counts(masked.long(), 2), law)) < 4  # independent positions, each with m(t)


def test_corrupt_is_a_function_of_the_key():
    process, keys = AbsorbingProcess(5), random.keys(0, 64)
    x_0 = torch.randint(5, (64, 9), generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 1, 64)
    whole = process.corrupt(x_0, t, keys)
    for b in range(64):
        assert torch.equal(process.corrupt(x_0[b : b + 1], t[b : b + 1], keys[b : b + 1])[0], whole[b])
    assert not torch.equal(process.corrupt(x_0, t, keys, stream=1), whole)
    earlier = process.corrupt(x_0, t / 2, keys) == process.mask_id
    assert (whole == process.mask_id)[earlier].all()  # masked early, masked late


def bayes(process, x_t, p, t, s):
    """sum over x_0 of p(x_0) q(x_s | x_t, x_0) for one position, from the forward kernels; mask id S."""
    m_t, m_s = MASKED[process.schedule](t), MASKED[process.schedule](s)
    num = process.num_states
    law = torch.zeros(num + 1, dtype=torch.float64)
    for x_0, x_s in itertools.product(range(num), range(num + 1)):
        at_s = 1 - m_s if x_s == x_0 else m_s if x_s == num else 0.0  # q(x_s | x_0)
        stay = (1 - m_t) / (1 - m_s)  # a clean position survives s -> t
        onward = float(x_t == num) if x_s == num else stay if x_t == x_s else 1 - stay if x_t == num else 0.0
        at_t = 1 - m_t if x_t == x_0 else m_t if x_t == num else 0.0
        if at_t > 0:
            law[x_s] += p[x_0] * at_s * onward / at_t
    return law


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.7, 0.2), (0.25, 0.0)])
def test_step_is_the_true_posterior(schedule, t, s):
    process, num, length = AbsorbingProcess(3, schedule), 3, 2
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(1, length, num, generator=generator, dtype=torch.float64)
    for x_t in ([3, 3], [3, 1], [0, 2]):
        if t == 1 and x_t != [3, 3]:
            continue
        state = torch.tensor([x_t])
        # where x_t is clean, x_0 = x_t: the denoiser's row is not asked
        p = [logits[0, d].softmax(0) if v == 3 else torch.eye(3, dtype=torch.float64)[v] for d, v in enumerate(x_t)]
        exact = torch.stack([bayes(process, v, p[d], t, s) for d, v in enumerate(x_t)])
        exact[exact < 1e-15] = 0  # the rounding of cos(pi / 2)
        assert torch.allclose(process.posterior(state, logits, t, s)[0], exact, atol=1e-12)

        n, draws = 500, 200
        x_s = process.step(state.expand(n, -1), logits.expand(n, -1, -1).float(), t, s, random.keys(7, n), draws=draws)
        assert x_s.shape == (n, draws, length)
        assert abs(chi_square_z(counts(x_s, num + 1), product_law(exact))) < 4
        state, row = state.expand(20_000, -1), logits.expand(20_000, -1, -1).float()
        once = process.step(state, row, t, s, random.keys(8, 20_000))
        assert abs(chi_square_z(counts(once, num + 1), product_law(exact))) < 4


def test_step_takes_one_time_per_sample_and_is_a_function_of_the_key():
    process, keys = AbsorbingProcess(4, "cosine"), random.keys(5, 32)
    logits = torch.randn(32, 6, 4, generator=torch.Generator().manual_seed(2))
    x_t = process.corrupt(torch.zeros(32, 6, dtype=torch.int64), 0.8, keys, stream=9)
    t = torch.linspace(0.5, 1, 32, dtype=torch.float64)
    whole = process.step(x_t, logits, t, t / 3, keys, draws=5)
    for b in range(32):
        one = process.step(x_t[b : b + 1], logits[b : b + 1], t[b].item(), t[b].item() / 3, keys[b : b + 1], draws=5)
        assert torch.equal(one[0], whole[b])
    assert torch.equal(process.step(x_t, logits, t, t / 3, keys, draws=3), whole[:, :3])
    clean = x_t != process.mask_id
    assert torch.equal(whole.masked_select(clean[:, None]), x_t[:, None].expand_as(whole).masked_select(clean[:, None]))


def test_step_to_zero_leaves_no_mask_and_a_bad_row_is_told():
    process, keys = AbsorbingProcess(2), random.keys(0, 1000)
    logits = torch.zeros(1000, 3, 2)
    logits[17, 1] = torch.nan
    x_s = process.step(process.prior((1000, 3), keys), logits, 1.0, 0.0, keys)
    bad = torch.zeros(1000, 3, dtype=torch.bool)
    bad[17, 1] = True
    assert torch.equal(x_s == -1, bad)
    assert ((x_s[~bad] == 0) | (x_s[~bad] == 1)).all()


def test_mask_id_among_the_states():
    process, keys = AbsorbingProcess(4, mask_id=1), random.keys(0, 20_000)
    x_t = process.prior((20_000, 2), keys)
    assert (x_t == 1).all() and process.weight(x_t).sum() == 40_000
    logits = torch.tensor([0.0, 30.0, 1.0, -1.0]).expand(20_000, 2, 4)
    x_s = process.step(x_t, logits, 1.0, 0.5, keys)
    posterior = process.posterior(x_t[:1], logits[:1], 1.0, 0.5)[0]
    assert posterior[0, 1] == pytest.approx(0.5) and posterior.shape == (2, 4)
    assert abs(chi_square_z(counts(x_s, 4), product_law(posterior))) < 4


def test_weight_and_carry_over():
    process = AbsorbingProcess(3)
    x = torch.tensor([[3, 0, 2]])
    assert process.weight(x).tolist() == [[1, 0, 0]]
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = torch.nan  # not looked at
    carried = process.carry_over(logits, x)
    assert torch.equal(carried[0, 0], logits[0, 0])
    assert carried.softmax(-1)[0, 1:].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown schedule 'sqrt'; known are log_linear, linear, cosine, arccos"):
        AbsorbingProcess(3, "sqrt")
    with pytest.raises(ValueError, match="num_states must be at least 1, got 0"):
        AbsorbingProcess(0)
    with pytest.raises(ValueError, match=r"mask_id must lie in 0\.\.num_states = 0\.\.3, got 7"):
        AbsorbingProcess(3, mask_id=7)
    process, keys = AbsorbingProcess(3), random.keys(0, 2)
    x, logits = process.prior((2, 4), keys), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"t down to a smaller s, got t = 0\.2, s = 0\.2"):
        process.step(x, logits, 0.2, 0.2, keys)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\].*got 1.5"):
        process.corrupt(x, 1.5, keys)
    with pytest.raises(ValueError, match=r"t must lie in .*nan"):
        process.corrupt(x, torch.tensor([0.5, torch.nan]), keys)
    with pytest.raises(ValueError, match=r"t must be a number or \(2,\)"):
        process.corrupt(x, torch.ones(3), keys)
    with pytest.raises(ValueError, match=r"logits must be \(2, 4, 3\)"):
        process.step(x, torch.zeros(2, 4, 4), 1.0, 0.5, keys)
    with pytest.raises(ValueError, match=r"keys must be \(2,\)"):
        process.corrupt(x, 0.5, random.keys(0, 3))
    with pytest.raises(ValueError, match="x_0 must be int64"):
        process.corrupt(x.float(), 0.5, keys)
    with pytest.raises(ValueError, match=r"shape must be \(B, D\)"):
        process.prior((3, 4), keys)


def test_logits_in_short_forms():
    process, keys = AbsorbingProcess(16), random.keys(0, 3)
    logits = Logistic(torch.linspace(-1, 1, 12).view(3, 4), torch.zeros(3, 4), 16)
    x_t = process.prior((3, 4), keys)
    assert torch.equal(process.step(x_t, logits, 0.9, 0.2, keys), process.step(x_t, logits.logits(), 0.9, 0.2, keys))
    assert torch.equal(process.carry_over(logits, x_t), logits.logits())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_time_of_a_level(schedule):
    process = AbsorbingProcess(3, schedule)
    t = torch.cat([torch.linspace(0, 1, 101), torch.tensor([1e-12, 1e-6])]).double()
    torch.testing.assert_close(process.time_of(process.mask_prob(t)), t, rtol=1e-12, atol=1e-15)


def test_what_a_step_unmasks_is_known_before_the_logits():
    process, keys = AbsorbingProcess(4, "cosine"), random.keys(3, 50)
    x_t = torch.where(torch.arange(50 * 7).view(50, 7) % 3 == 0, 2, 4)
    for t, s, stream in ((0.9, 0.4, 0), (0.5, 0.0, 1)):
        told = process.unmasked(x_t, t, s, keys, stream=stream)
        x_s = process.step(x_t, torch.randn(50, 7, 4), t, s, keys, stream=stream)
        assert torch.equal(told, (x_t == 4) & (x_s != 4)) and told.any()


@pytest.mark.parametrize("mask_id", [5, 2])
def test_hidden_logits(mask_id):
    """A step and what is carried over, of hidden states as of the logits they stand for."""
    g = torch.Generator().manual_seed(0)
    process, keys = AbsorbingProcess(5, mask_id=mask_id), random.keys(1, 4)
    x_t = torch.where(torch.rand(4, 6, generator=g) < 0.7, mask_id, 1)
    for bias in (None, torch.randn(5, generator=g)):
        hidden = Hidden(torch.randn(4, 6, 3, generator=g), torch.randn(5, 3, generator=g), bias)
        for draws in (None, 3):
            options = {"draws": draws, "temperature": 0.7, "top_p": 0.8, "stream": 2}
            expected = process.step(x_t, hidden.logits(), 0.8, 0.3, keys, **options)
            assert torch.equal(process.step(x_t, hidden, 0.8, 0.3, keys, **options), expected)
        carried = process.carry_over(hidden, x_t)
        assert isinstance(carried, Hidden) and carried.states is hidden.states
        expected = process.carry_over(hidden.logits(), x_t).softmax(-1)
        torch.testing.assert_close(carried.logits().softmax(-1), expected)
        assert (expected[..., mask_id : mask_id + 1] == 0).all()
        law = process.posterior(x_t, hidden, 0.8, 0.3)
        torch.testing.assert_close(law, process.posterior(x_t, hidden.logits(), 0.8, 0.3))


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden states"])
def test_rare_tokens_are_drawn_as_often_as_they_should(hidden):
    """The teacher's step at S = 50,258, where one token leads all others by 20 nats: these have 1e-4 between them.

    A race in float32 as published, argmax p / (1e-10 - log(u + 1e-10)), never lets one of them win: the largest ratio
    of two of its arrivals is below e^20. Ours draws them in proportion, for every step of training and of sampling.
    """
    S, gap, n = 50258, 20.0, 400_000
    u = torch.tensor([0.0, 1 - 2.0**-24], dtype=torch.float32)
    slowest, fastest = 1e-10 - torch.log(u + 1e-10)
    assert math.log(slowest / fastest) < gap
    weight = torch.full((S, 1), -gap)
    weight[7] = 0.0
    logits = Hidden(torch.ones(1, 1, 1), weight)
    process, keys = AbsorbingProcess(S), random.keys(0, 1)
    x_t = process.prior((1, 1), keys)
    x_s = process.step(x_t, logits if hidden else logits.logits(), 1.0, 0.0, keys, draws=n).flatten()
    p = (S - 1) * math.exp(-gap) / (1 + (S - 1) * math.exp(-gap))
    rare = x_s[x_s != 7]
    assert abs(len(rare) - n * p) < 4 * math.sqrt(n * p) and len(rare) > 20
    assert len(rare.unique()) == len(rare)  # any of 50,257
    assert abs((rare < S // 2).double().mean().item() - 0.5) < 2 / math.sqrt(len(rare))
