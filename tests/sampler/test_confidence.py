"""The confidence sampler: published counts, its law by enumeration, what it keeps, whom it asks, what it refuses."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from levels import Table, latents_of
from tiny import chi_square_z, counts, sequences

from di4c_ext import random
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess, GaussianProcess
from di4c_ext.sampler import confidence, reveal_counts, sample_confidence

S, D, MASK = 2, 3, 2
N = 20_000
PUBLISHED = {  # of 256 positions, by the number of steps
    "arccos": {
        2: [85, 171],
        4: [41, 44, 53, 118],
        8: [20, 21, 22, 22, 25, 28, 36, 82],
        16: [10, 10, 11, 10, 11, 11, 11, 11, 12, 13, 14, 14, 17, 19, 24, 58],
    },
    "cosine": {2: [75, 181], 4: [19, 56, 83, 98], 8: [5, 14, 24, 32, 39, 44, 48, 50]},
    "linear": {2: [128, 128], 4: [64] * 4, 8: [32] * 8},
    "square": {2: [64, 192], 4: [16, 48, 80, 112], 8: [4, 12, 20, 28, 36, 44, 52, 60]},
    "root": {2: [181, 75], 4: [128, 53, 41, 34], 8: [91, 37, 29, 24, 21, 20, 17, 17]},
}


def table(components: int, seed: int) -> Table:
    """A denoiser with a row of logits for each of the (S + 1)^D states, masks among them."""
    generator = torch.Generator().manual_seed(seed)
    return Table(1.5 * torch.randn(components, (S + 1) ** D, D, S, generator=generator), S + 1)


def masks(n: int = N, seed: int = 0):
    return torch.full((n, D), MASK), random.keys(seed, n)


def step_law(logits: torch.Tensor, count: int, noise: float, at_random: bool) -> torch.Tensor:
    """((S + 1)^D, (S + 1)^D): every token and every order of positions, one after the other."""
    states = [tuple(x) for x in sequences(S + 1, D).tolist()]
    law = torch.zeros(len(states), len(states), dtype=torch.float64)
    for i, x in enumerate(states):
        p = logits[i].double().softmax(-1)
        masked = [d for d in range(D) if x[d] == MASK]
        for tokens in itertools.product(range(S), repeat=len(masked)):
            drawn = dict(zip(masked, tokens, strict=True))
            chance = torch.stack([torch.ones(()).double(), *(p[d, k] for d, k in drawn.items())]).prod()
            power = 0.0 if at_random else 1 / noise if noise else None
            for order in itertools.permutations(masked, min(count, len(masked))):
                share = torch.ones((), dtype=torch.float64)
                left = list(masked)
                for d in order:
                    if power is None:
                        share = share * (d == max(left, key=lambda e: p[e, drawn[e]].item()))
                    else:
                        share = share * p[d, drawn[d]] ** power / sum(p[e, drawn[e]] ** power for e in left)
                    left.remove(d)
                y = tuple(drawn[d] if d in order else x[d] for d in range(D))
                law[i, states.index(y)] += chance * share
    return law


def final_law(steps, num: list[int], randomize: str = "linear", gumbel: float = 4.5) -> torch.Tensor:
    """(S^D,) from masks alone; steps: the mixture of logits (n, states, D, S) that each step draws from."""
    law = torch.zeros((S + 1) ** D, dtype=torch.float64)
    law[-1] = 1
    for i, (mixture, count) in enumerate(zip(steps, num, strict=True)):
        rho = i / (len(num) - 1) if len(num) > 1 else 1.0
        at_random = randomize == "random" or (randomize == "warm_up" and i < 2)
        noise = gumbel * (1 - rho) if randomize == "linear" else 0.0
        law = law @ torch.stack([step_law(logits, count, noise, at_random) for logits in mixture]).mean(0)
    clean = (sequences(S + 1, D) != MASK).all(1)
    assert law[~clean].sum() < 1e-12
    return law[clean]


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_published_counts(schedule):
    for num_steps, expected in PUBLISHED[schedule].items():
        assert reveal_counts(256, num_steps, schedule).tolist() == expected
        both = reveal_counts(torch.tensor([256, 0, 256]), num_steps, schedule)
        assert both.tolist() == [expected, [0] * num_steps, expected]
    assert reveal_counts(256, 1, schedule).tolist() == [256]


def test_counts_add_up():
    """No step reveals nothing while there is something left, and none more than there is."""
    number = torch.arange(40)
    for schedule, num_steps in itertools.product((*PUBLISHED, "log_linear"), (1, 2, 5, 17, 64)):
        revealed = reveal_counts(number, num_steps, schedule)
        assert revealed.shape == (40, num_steps) and torch.equal(revealed.sum(1), number) and (revealed >= 0).all()
        left = number[:, None] - revealed.cumsum(1) + revealed
        assert ((revealed > 0) | (left == 0)).all()


@pytest.mark.parametrize("randomize", ["linear", "warm_up", "random", "none"])
def test_law(randomize):
    """A mixture of three latents, drawn anew at each of three steps."""
    denoiser, (x, keys) = table(3, 1), masks()
    x_0 = sample_confidence(
        denoiser, AbsorbingProcess(S), x, 3, keys, latents=latents_of(3), randomize=randomize, gumbel=1.5
    )
    law = final_law([denoiser.table] * 3, [1, 1, 1], randomize, 1.5)
    assert abs(chi_square_z(counts(x_0, S), law)) < 4
    first, second = denoiser.seen[:2]
    assert 0.6 < (first != second).float().mean() < 0.73  # fresh ones, a third of them alike by chance
    assert [t for _, t in denoiser.calls] == pytest.approx([1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("hybrid", [False, True])
def test_law_under_guidance(hybrid):
    """The second of two steps has the full weight; hybrid, the other logits come from a teacher without latents."""
    student, other, (x, keys) = table(3, 2), table(1 if hybrid else 3, 3), masks()
    x_0 = sample_confidence(
        student, (S, MASK), x, 2, keys, latents=latents_of(3), unconditional=other, guidance=1.5, hybrid=hybrid
    )
    guided = 2.5 * student.table - 1.5 * other.table
    law = final_law([student.table, guided], reveal_counts(D, 2).tolist())
    assert abs(chi_square_z(counts(x_0, S), law)) < 4
    assert len(student.calls) == 2 and len(other.calls) == 1  # the first step needs no other
    assert (other.seen[0] is None) == hybrid and (hybrid or torch.equal(other.seen[0], student.seen[1]))


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_one_step(guidance):
    """All positions at once, from the logits of full guidance."""
    denoiser, other, (x, keys) = table(2, 4), table(2, 5), masks()
    x_0 = sample_confidence(
        denoiser, (S, MASK), x, 1, keys, latents=latents_of(2), unconditional=other, guidance=guidance
    )
    law = final_law([(1 + guidance) * denoiser.table - guidance * other.table], [D])
    assert abs(chi_square_z(counts(x_0, S), law)) < 4


def test_temperature_divides():
    denoiser, (x, keys) = table(1, 6), masks()
    x_0 = sample_confidence(denoiser, (S, MASK), x, 2, keys, temperature=2.0, gumbel=1.0)
    assert (
        abs(chi_square_z(counts(x_0, S), final_law([denoiser.table / 2] * 2, reveal_counts(D, 2).tolist(), gumbel=1.0)))
        < 4
    )


def test_no_guidance_is_unguided():
    denoiser, other, (x, keys) = table(1, 7), table(1, 8), masks(500)
    plain = sample_confidence(denoiser, (S, MASK), x, 3, keys)
    assert torch.equal(sample_confidence(denoiser, (S, MASK), x, 3, keys, unconditional=other), plain)
    assert not other.calls
    assert not torch.equal(sample_confidence(denoiser, (S, MASK), x, 3, keys, unconditional=other, guidance=3.0), plain)


def picture(x, t, latents=None, *, label=0.0):
    """Logits (B, D, 11) of 10 codes and their mask, which would always be drawn, by what is seen and the label."""
    codes = torch.arange(11.0)
    seen = (torch.where(x == 10, 0, x + 1).sum(1, keepdim=True) % 7)[..., None]
    shift = 0.0 if latents is None else latents[:, :1, None]
    where = torch.arange(x.shape[1])[:, None]
    return torch.sin(codes * (1 + where) + seen + label + shift) + 100.0 * (codes == 10)


def inpainted(n: int, length: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(10, (n, length), generator=generator)
    return x.masked_fill(torch.rand(n, length, generator=generator) < 0.6, 10), random.keys(seed, n)


@pytest.mark.parametrize("process", [AbsorbingProcess(10), ConfidenceProcess(11, mask_id=10), (10, 10), (11, 10)])
def test_what_is_given_is_kept_and_masks_are_never_drawn(process):
    x, keys = inpainted(50, 30)
    before = x.clone()
    x_0 = sample_confidence(picture, process, x, 4, keys)
    given = before != 10
    assert torch.equal(x, before) and torch.equal(x_0[given], x[given]) and (x_0 != 10).all()
    assert x_0[~given].unique().numel() == 10


def test_every_sample_has_the_counts_of_its_own_masks():
    x, keys = inpainted(20, 30)
    x[0], x[1] = 3, 10  # nothing to do; everything
    states = []
    sample_confidence(picture, (10, 10), x, 5, keys, schedule="cosine", callback=states.append)
    left = torch.stack([(state["x_t"] == 10).sum(1) for state in states] + [(states[-1]["x_s"] == 10).sum(1)], 1)
    assert torch.equal(-left.diff(dim=1), reveal_counts((x == 10).sum(1), 5, "cosine"))
    assert all(torch.equal(s["count"], c) for s, c in zip(states, -left.diff(dim=1).T, strict=True))
    for state in states:
        new = state["x_s"] != state["x_t"]
        assert torch.equal(state["x_s"][new], state["tokens"][new]) and state["logits"].shape == (20, 30, 10)
    assert [state["i"] for state in states] == [0, 1, 2, 3, 4] and states[-1]["s"] == 0
    counted = []
    sample_confidence(picture, (10, 10), x, 3, keys, schedule=[2, 1, 7], callback=lambda s: counted.append(s["x_s"]))
    assert ((counted[1] == 10).sum(1) == ((x == 10).sum(1) - 3).clamp(min=0)).all() and (counted[2] != 10).all()
    assert ConfidenceProcess(10).schedule == "arccos"
    named = sample_confidence(picture, ConfidenceProcess(10, "cosine"), x, 5, keys)
    assert torch.equal(named, sample_confidence(picture, (10, 10), x, 5, keys, schedule="cosine"))


@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_is_its_samples(guided):
    x, keys = inpainted(8, 30)
    options = {"latents": lambda key: random.uniform(key, 1).float(), "randomize": "linear"}
    options |= {"unconditional": partial(picture, label=2.0), "guidance": 3.0} if guided else {}
    whole = sample_confidence(picture, (10, 10), x, 4, keys, **options)
    for b in range(8):
        one = slice(b, b + 1)
        assert torch.equal(sample_confidence(picture, (10, 10), x[one], 4, keys[one], **options), whole[one])
    assert torch.equal(sample_confidence(picture, (10, 10), x, 4, keys, logits_bytes=1, **options), whole)
    assert sample_confidence(picture, (10, 10), x[:0], 4, keys[:0], **options).shape == (0, 30)


@pytest.mark.parametrize("guided", [False, True])
def test_the_device_is_never_waited_for(guided, monkeypatch):
    """On the meta device whoever looks at a value fails."""
    monkeypatch.setattr(confidence, "inference", lambda *_: torch.no_grad())  # autocast knows no such device
    x, keys = torch.full((4, 6), 10, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")

    def denoiser(x, t, latents=None):
        return torch.zeros(*x.shape, 10, device="meta")

    options = {"unconditional": denoiser, "guidance": 1.0} if guided else {}
    assert sample_confidence(denoiser, (10, 10), x, 3, keys, check=False, **options).shape == (4, 6)


def test_logits_without_a_distribution():
    x, keys = inpainted(5, 30)
    x[2] = 10

    def broken(x, t):
        logits = picture(x, t)
        logits[2, 17] = torch.nan
        return logits

    good = sample_confidence(picture, (10, 10), x, 3, keys)
    with pytest.raises(ValueError, match=r"sample_confidence: .* no distribution .* sample 2, position 17"):
        sample_confidence(broken, (10, 10), x, 3, keys)
    left = sample_confidence(broken, (10, 10), x, 3, keys, check=False)
    assert (left == -1).nonzero().tolist() == [[2, 17]]
    assert torch.equal(left[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"num_steps": 2.0}, "num_steps must be an integer of at least 1, got 2.0"),
        ({"schedule": "sqrt"}, "unknown schedule 'sqrt'; known are .*root"),
        ({"schedule": [1, 2]}, r"num_steps = 3 counts >= 0, got \[1, 2\]"),
        ({"schedule": [1, -1, 2]}, r"num_steps = 3 counts >= 0, got \[1, -1, 2\]"),
        ({"guidance": 1.0}, "guidance 1.0 wants `unconditional`"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"gumbel": "hot"}, "gumbel must be a finite number, got 'hot'"),
        ({"randomize": "cold"}, "randomize must be one of .* got 'cold'"),
        ({"temperature": -1.0}, "temperature must be finite and >= 0"),
        ({"process": GaussianProcess(8)}, "process must have masks .* see sample_analytic"),
        ({"process": (10, 11)}, r"mask_id in 0..num_states, got \(10, 11\)"),
        ({"process": (12, 10)}, r"logits \(B, D, S\) = \(4, 6, 12\), got \(4, 6, 11\)"),
        ({"x": torch.full((4, 6), 11)}, "x must hold codes 0..9 and the mask 10, got 11"),
        ({"x": torch.full((4, 6), -1)}, "x must hold codes 0..9 and the mask 10, got -1"),
        ({"x": torch.zeros(4, 6)}, r"x must be int64 \(B, D\), got torch.float32 \(4, 6\)"),
        ({"keys": random.keys(0, 3)}, r"keys must be \(4,\), one a sample of x, got \(3,\)"),
    ],
)
def test_bad_input(change, message):
    arguments = {"process": (10, 10), "x": torch.full((4, 6), 10), "num_steps": 3, "keys": random.keys(0, 4)}
    with pytest.raises((ValueError, TypeError), match=message):
        sample_confidence(picture, **arguments | change)
