"""The first-hitting sampler: its law against the continuous-time limit, its cost, and whom a sample hangs on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ExactTeacher, TableStudent, chi_square_z, counts, finite_latents, index, sequences
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.process import SCHEDULES, AbsorbingProcess, GaussianProcess
from di4c_ext.sampler import GuidedDenoiser, sample_ancestral, sample_first_hitting, times

S, D = 2, 3


class Timed:
    """A denoiser with a free table that grows surer as time passes: logits (0.2 + 3 (1 - t)) table[x]."""

    def __init__(self, seed: int, components: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(components, (S + 1) ** D, D, S, generator=generator)
        self.calls: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, latents: Tensor | None = None) -> Tensor:
        self.calls.append(len(x_t))
        which = torch.zeros(len(x_t)).long() if latents is None else latents[:, 0].long()
        return (0.2 + 3 * (1 - t.float()))[:, None, None] * self.table[which, index(x_t, S + 1)]


def limit(process: AbsorbingProcess, denoiser: Timed, components: int = 1, end: float = 16.0, n: int = 150) -> Tensor:
    """The law of infinitely many steps: in tau = -log m(t) a masked position is unmasked at rate 1; Runge and Kutta."""
    states = sequences(S + 1, D)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1

    def flow(law: Tensor, rates: Tensor) -> Tensor:
        change = torch.zeros_like(law)
        for d in range(D):
            masked = states[:, d] == S
            change[masked] -= law[masked]
            for v in range(S):
                to = states[masked].clone()
                to[:, d] = v
                change.index_add_(0, index(to, S + 1), law[masked] * rates[masked, d, v])
        return change

    def rates(tau: float) -> Tensor:
        t = process.time_of(torch.tensor(tau, dtype=torch.float64).neg().exp()).expand(len(states))
        each = [
            denoiser(states, t, torch.full((len(states), 1), float(c))).double().softmax(-1) for c in range(components)
        ]
        return torch.stack(each).mean(0)

    start = -process.mask_prob(1.0).log().item()
    h = (end - start) / n
    for i in range(n):
        a, b, c = (rates(start + (i + part) * h) for part in (0.0, 0.5, 1.0))
        k1 = flow(law, a)
        k2 = flow(law + h / 2 * k1, b)
        k3 = flow(law + h / 2 * k2, b)
        law = law + h / 6 * (k1 + 2 * k2 + 2 * k3 + flow(law + h * k3, c))
    return law


def drawn(process: AbsorbingProcess, denoiser: Any, seed: int, n: int, **options: Any) -> Tensor:
    keys = random.keys(seed, n)
    return sample_first_hitting(denoiser, process, process.prior((n, D), keys), keys, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_law_is_the_continuous_limit(schedule: str) -> None:
    process, denoiser = AbsorbingProcess(S, schedule), Timed(0)
    law = limit(process, denoiser)
    assert law.sum().item() == pytest.approx(1, abs=1e-6)
    clean = (sequences(S + 1, D) < S).all(1)
    law = torch.where(clean, law, 0.0) / law[clean].sum()
    x = drawn(process, denoiser, 1, 20_000)
    assert abs(chi_square_z(counts(x, S + 1), law)) < 4
    # The measure tells: two ancestral steps of the same denoiser have another law.
    keys = random.keys(2, 20_000)
    other = sample_ancestral(denoiser, process, process.prior((20_000, D), keys), times(2), keys)
    assert chi_square_z(counts(other, S + 1), law) > 8


def test_an_exact_teacher_gives_the_data() -> None:
    law = torch.tensor([0.3, 0.02, 0.08, 0.1, 0.05, 0.15, 0.25, 0.05], dtype=torch.float64)
    x = drawn(AbsorbingProcess(S), ExactTeacher(law, S, D), 3, 40_000)
    assert abs(chi_square_z(counts(x, S), law)) < 4


def test_a_student_draws_a_latent_for_every_token() -> None:
    process, student = AbsorbingProcess(S, "cosine"), Timed(4, components=2)
    law = limit(process, student, components=2)
    clean = (sequences(S + 1, D) < S).all(1)
    law = torch.where(clean, law, 0.0) / law[clean].sum()
    draw = finite_latents(2)
    x = drawn(process, student, 5, 40_000, latents=lambda keys: draw(keys, 1)[:, 0])
    assert abs(chi_square_z(counts(x, S + 1), law)) < 4


def test_times_of_the_unmaskings() -> None:
    """The k-th of D has m(t) as the k-th largest of D uniform numbers, and its position is any of those left."""
    process, n, seen = AbsorbingProcess(S, "arccos"), 20_000, []
    drawn(process, Timed(6), 7, n, callback=seen.append)
    assert len(seen) == D and all(torch.equal(step["rows"], torch.arange(n)) for step in seen)
    levels = torch.stack([process.mask_prob(step["t"]) for step in seen])
    assert (levels.diff(dim=0) <= 0).all()
    for k, level in enumerate(levels):
        mean = (D - k) / (D + 1)
        assert abs(level.mean().item() - mean) < 5 * 0.3 / n**0.5
        assert (seen[k]["x_s"] == S).sum(1).unique().tolist() == [D - 1 - k]
        assert torch.equal(seen[k]["x_s"].gather(1, seen[k]["position"][:, None]) < S, torch.ones(n, 1).bool())
    order = torch.stack([step["position"] for step in seen], 1)
    for place in order.T:
        assert abs(chi_square_z(place.bincount(minlength=D), torch.full((D,), 1 / D).double())) < 4


def test_as_many_evaluations_as_masks() -> None:
    """A sample is seen once for each of its masks and is not seen again; what was clean stays."""
    process, denoiser = AbsorbingProcess(S), Timed(8)
    keys = random.keys(9, 6)
    x = process.prior((6, D), keys)
    x[1], x[2, 0], x[4, :2] = 1, 0, 1
    x_0 = sample_first_hitting(denoiser, process, x, keys)
    assert denoiser.calls == [5, 4, 3] and (x_0 < S).all()
    assert ((x == S) | (x == x_0)).all()
    denoiser.calls.clear()
    assert torch.equal(sample_first_hitting(denoiser, process, x_0, keys), x_0) and denoiser.calls == []
    assert sample_first_hitting(denoiser, process, x[:0], keys[:0]).shape == (0, D)


def test_a_batch_is_its_samples() -> None:
    """In any order, whatever the others' masks, with latents and conditions of their own."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(4, 4**5, 5, 3, generator=generator)
    process, student, draw = AbsorbingProcess(3, "square"), TableStudent(table), finite_latents(4)
    keys = random.keys(2, 16)
    x = torch.where(torch.rand(16, 5, generator=generator) < 0.6, 3, 1)
    shift = torch.randn(16, 3, generator=generator)

    def told(x_t: Tensor, t: Tensor, latents: Tensor, shift: Tensor) -> Tensor:
        return student(x_t, t, latents) + shift[:, None]

    def run(rows: Tensor) -> Tensor:
        settings: dict[str, Any] = {"latents": lambda keys: draw(keys, 1)[:, 0], "conditions": {"shift": shift[rows]}}
        return sample_first_hitting(told, process, x[rows], keys[rows], temperature=0.8, **settings)

    whole = run(torch.arange(16))
    assert torch.equal(torch.cat([run(row[None]) for row in torch.arange(16)]), whole)
    order = torch.randperm(16, generator=generator)
    assert torch.equal(run(order), whole[order])


def test_fixed_latents_stay_with_their_samples() -> None:
    table = torch.full((2, 3**D, D, S), -40.0)
    table[0, ..., 0], table[1, ..., 1] = 0.0, 0.0
    process, latents = AbsorbingProcess(S), torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    keys = random.keys(0, 4)
    x = process.prior((4, D), keys)
    x[0, :2], x[3, 1] = 0, 0
    x_0 = sample_first_hitting(TableStudent(table), process, x, keys, latents=latents)
    assert torch.equal(x_0, latents.long().expand(4, D))


def test_logits_in_every_form() -> None:
    """Hidden states of which one row a sample is made, guided logits, and a nucleus of one."""
    process, keys = AbsorbingProcess(S), random.keys(0, 50)
    x = process.prior((50, D), keys)
    states, head = torch.eye(S).expand(50, D, S, S)[:, :, 0], torch.tensor([[0.3, 0.0], [0.0, 0.0]])
    plain = sample_first_hitting(lambda x, t: (states @ head.T)[: len(x)], process, x, keys)
    hidden = sample_first_hitting(lambda x, t: ops.Hidden(states[: len(x)], head), process, x, keys)
    assert torch.equal(plain, hidden)
    likeliest = sample_first_hitting(lambda x, t: (states @ head.T)[: len(x)], process, x, keys, top_p=0.5)
    assert (likeliest == 0).all() and (plain == 1).any()
    student = Timed(3)
    both = GuidedDenoiser(student, Timed(4), 1.0)
    assert torch.equal(sample_first_hitting(both, process, x, keys), sample_first_hitting(student, process, x, keys))


def test_refusals() -> None:
    keys = random.keys(0, 2)
    process = AbsorbingProcess(S)
    x = process.prior((2, D), keys)

    def broken(x_t: Tensor, t: Tensor) -> Tensor:
        logits = torch.zeros(len(x_t), D, S)
        logits[1:, 2] = torch.nan
        return logits

    with pytest.raises(ValueError, match=r"\(NaN or all -inf\) at t = .* sample 1, position 2"):
        sample_first_hitting(broken, process, x, keys)
    with pytest.raises(ValueError, match="has no masks to take away"):
        sample_first_hitting(Timed(0), GaussianProcess(4), x, keys)
    with pytest.raises(ValueError, match=r"must give logits \(B, D, S\) = \(2, 3, 2\), got \(2, 3, 5\)"):
        sample_first_hitting(lambda x, t: torch.zeros(2, 3, 5), process, x, keys)
    with pytest.raises(ValueError, match=r"keys must be \(2,\)"):
        sample_first_hitting(Timed(0), process, x, keys[:1])
