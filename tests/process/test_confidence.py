"""Steps by confidence: how many positions they reveal and which, the ramp, guidance, the mask as a class."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import chi_square_z, counts, sequences

from di4c_ext import ops, random
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess

S, D = 3, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_absorbing():
    process, plain, keys = ConfidenceProcess(S), AbsorbingProcess(S, "arccos"), random.keys(0, 100)
    x_0 = torch.randint(S, (100, D), generator=torch.Generator().manual_seed(0))
    assert torch.equal(process.corrupt(x_0, 0.4, keys), plain.corrupt(x_0, 0.4, keys))
    assert (process.schedule, process.mask_id, process.gumbel, process.ramp_steps) == ("arccos", S, 4.5, 8)
    assert "clamp_ramp=False, guidance=0.0" in repr(process)
    with pytest.raises(NotImplementedError, match=r"ConfidenceProcess\.posterior"):
        process.posterior(x_0, normal(100, D, S), 0.5, 0.2)


@pytest.mark.parametrize("schedule", ["arccos", "linear", "square"])
def test_how_many_are_revealed(schedule):
    """k = clip(trunc((1 - m(s)) D - (D - n)), 0, n), the same in every draw of a sample."""
    process, length, batch = ConfidenceProcess(10, schedule), 64, 200
    keys = random.keys(1, batch)
    t = torch.linspace(0.02, 1, batch, dtype=torch.float64)
    s = (t - 0.05).clamp(min=0)
    x_t = process.corrupt(torch.randint(10, (batch, length), generator=torch.Generator().manual_seed(1)), t, keys)
    x_s = process.step(x_t, normal(batch, length, 10), t, s, random.fold_in(keys, 1), draws=3)
    masked = (x_t == 10).sum(1)
    wanted = ((1 - process.mask_prob(s)) * length - (length - masked)).trunc().long()
    wanted = torch.minimum(wanted.clamp(min=0), masked)
    revealed = masked[:, None] - (x_s == 10).sum(2)
    assert torch.equal(revealed, wanted[:, None].expand(batch, 3))
    assert (wanted == 0).any() and (x_s[s == 0] != 10).all() and (s == 0).sum() > 3
    clean = (x_t != 10)[:, None].expand_as(x_s)
    assert torch.equal(x_s[clean], x_t[:, None].expand_as(x_s)[clean])
    assert (x_s[:, 0] != x_s[:, 1]).any(1).float().mean() > 0.5
    for b in (0, 57, 199):
        one = slice(b, b + 1)
        part = process.step(
            x_t[one], normal(batch, length, 10)[one], t[one], s[one], random.fold_in(keys, 1)[one], draws=3
        )
        assert torch.equal(part, x_s[one])


@pytest.mark.parametrize("t", [0.9, 0.6])
def test_law(t):
    """One of two masked positions, drawn against the noise of the step's time."""
    process, n = ConfidenceProcess(2, "linear", gumbel=2.0), 40_000
    logits = normal(2, 2, seed=5)
    x_t, keys = torch.tensor([[2, 0, 2]]).expand(n, 3), random.keys(2, n)
    rows = torch.stack([logits[0], torch.zeros(2), logits[1]]).expand(n, 3, 2)
    x_s = process.step(x_t, rows, t, 0.3, keys)  # 3 - 0.9 positions are to be clean: 2
    law = _pair_law(logits.double().softmax(-1), 2.0 * (1 - (1 - t) * 8 / 7))
    assert abs(chi_square_z(counts(x_s[:, [0, 2]], 3), law)) < 4


def _pair_law(p, noise):
    """Of the two positions' states (9,): the first to be revealed by weights p^(1 / noise)."""
    law = torch.zeros(9, dtype=torch.float64)
    for a, b in itertools.product(range(2), repeat=2):
        chance, weights = p[0, a] * p[1, b], torch.stack([p[0, a], p[1, b]]) ** (1 / noise)
        law[3 * a + 2] += chance * weights[0] / weights.sum()
        law[3 * 2 + b] += chance * weights[1] / weights.sum()
    return law


def test_the_ramp():
    t = torch.tensor([1.0, 0.5, 0.125, 0.0], dtype=torch.float64)
    assert ConfidenceProcess(S).ramp(t).tolist() == pytest.approx([0, 4 / 7, 1, 8 / 7])
    assert ConfidenceProcess(S, clamp_ramp=True, ramp_steps=4).ramp(t).tolist() == pytest.approx([0, 2 / 3, 1, 1])


@pytest.mark.parametrize("clamp", [True, False])
def test_noise_of_a_step_near_the_data(clamp, monkeypatch):
    """Beyond the ramp's end the published noise is mirrored; clamped there is none."""
    seen = {}
    real = ops.reveal

    def watch(*arguments, **options):
        seen.update(options)
        return real(*arguments, **options)

    monkeypatch.setattr(ops, "reveal", watch)
    process = ConfidenceProcess(S, clamp_ramp=clamp)
    t = torch.tensor([1.0, 0.125, 0.02], dtype=torch.float64)
    process.step(torch.full((3, D), S), normal(3, D, S), t, t / 2, random.keys(0, 3))
    assert seen["noise"].tolist() == pytest.approx([4.5, 0, 0 if clamp else 4.5 * (1 - 0.98 * 8 / 7)], abs=1e-12)


def test_the_mask_as_a_class():
    """Published: it has a logit, may be drawn, and what drew it stays open. Else it has none."""
    logits = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(2000, D, 4)
    x_t, keys = torch.full((2000, D), 3), random.keys(3, 2000)
    x_s = ConfidenceProcess(4, mask_id=3).step(x_t, logits, 1.0, 0.0, keys)
    share = logits[0, 0].softmax(-1)[3].item()
    assert (x_s == 3).float().mean() == pytest.approx(share, abs=0.02)
    assert (ConfidenceProcess(3).step(x_t, logits[..., :3], 1.0, 0.0, keys) != 3).all()


def test_guidance():
    process = ConfidenceProcess(S, guidance=3.0)
    with_class, without = normal(2, D, S), normal(2, D, S, seed=1)
    with_class[0, 0, 0] = -torch.inf
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    guided = process.guide(with_class, without, t)
    w = 3 * 4 / 7
    torch.testing.assert_close(guided[1], (1 + w) * with_class[1] - w * without[1])
    torch.testing.assert_close(guided[0], with_class[0])
    assert guided[0, 0, 0] == -torch.inf
    torch.testing.assert_close(ConfidenceProcess(S).guide(with_class, without, t), with_class)
    with pytest.raises(ValueError, match=r"guide: logits and unconditional must be alike"):
        process.guide(with_class, without[:, :2], t)


def test_a_row_without_a_distribution():
    logits = normal(3, D, S)
    logits[1, 2] = torch.nan
    x_t = torch.full((3, D), S)
    x_s = ConfidenceProcess(S).step(x_t, logits, 1.0, 0.5, random.keys(0, 3))
    assert (x_s == -1).nonzero().tolist() == [[1, 2]]


def test_sampling_by_its_own_steps():
    """Down any grid of times no mask is left, whatever the number of positions."""
    process, states = ConfidenceProcess(2, "cosine"), sequences(3, 3)
    x, keys = states, random.keys(1, len(states))
    for i, (t, s) in enumerate(itertools.pairwise([1.0, 0.7, 0.3, 0.0])):
        x = process.step(x, normal(len(states), 3, 2, seed=i), t, s, random.fold_in(keys, i))
    assert (x < 2).all() and torch.equal(x[states != 2], states[states != 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gumbel": -1.0}, "gumbel must be finite and >= 0, got -1.0"),
        ({"guidance": float("inf")}, "guidance must be finite and >= 0, got inf"),
        ({"ramp_steps": 1}, "ramp_steps must be an integer of at least 2, got 1"),
        ({"schedule": "root"}, "unknown schedule 'root'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"Process: {message}"):
        ConfidenceProcess(S, **settings)
