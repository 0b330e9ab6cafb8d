"""Self-distillation through time: the law of its targets by enumeration, its divergences by their definitions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tiny import ExactTeacher, TableStudent, finite_latents, index, sequences, transition
from torch import Tensor

from di4c_ext import random, sdtt
from di4c_ext.ops import Hidden
from di4c_ext.process import AbsorbingProcess, GaussianProcess
from di4c_ext.sdtt import SDTTObjective, divergence, multi_step_targets

S, D = 3, 3
KINDS = ("reverse_kl", "kl", "tv", "mse")


def law(seed: int = 0) -> Tensor:
    made = torch.rand(S**D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    return made / made.sum()


def restless(x_t: Tensor, t: Tensor) -> Tensor:
    """A teacher that changes its mind with all it is shown: its steps do not keep its marginals, as exact ones nearly
    do."""
    table = 2 * torch.randn((S + 1) ** D, D, S, generator=torch.Generator().manual_seed(1))
    return table[index(x_t, S + 1)]


# --- the targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "arccos"])
@pytest.mark.parametrize(("x_t", "t", "s"), [((S, S, S), 1.0, 0.0), ((S, 1, S), 0.7, 0.0), ((S, S, S), 0.9, 0.3)])
def test_law_of_the_targets_is_the_teachers(x_t: tuple[int, ...], t: float, s: float, schedule: str) -> None:
    """Where K steps reveal a position, its targets average to the law that K enumerated steps give its token."""
    n, num_steps = 40_000, 3
    process = AbsorbingProcess(S, schedule)
    start = torch.tensor(x_t)
    composed = torch.eye((S + 1) ** D, dtype=torch.float64)[index(start, S + 1)]
    for k in range(num_steps):
        now, then = (t + (s - t) * i / num_steps for i in (k, k + 1))
        composed = composed @ transition(process, restless, D, now, then)

    times = (torch.full((n,), time, dtype=torch.float64) for time in (t, s))
    found = multi_step_targets(restless, process, start.expand(n, -1), *times, random.keys(3, n), num_steps)
    assert not found.broken.any() and (s > 0 or (found.x_s < S).all())
    p = found.logits.double().softmax(-1)
    for d in (start == S).nonzero().flatten().tolist():
        ends = torch.stack([composed[sequences(S + 1, D)[:, d] == v].sum() for v in range(S)])
        given = p[:, d] * (found.x_s[:, d] < S)[:, None]
        error = given.std(0) / n**0.5
        assert (error > 0).all() and ((given.mean(0) - ends).abs() <= 4 * error).all(), (given.mean(0), ends)
    if s == 0:
        one_step = restless(start[None], torch.ones(1))[0].softmax(-1)
        assert (p.mean(0) - one_step)[start == S].abs().max() > 0.1  # it takes the K steps


def test_a_position_keeps_what_was_said_when_it_was_revealed() -> None:
    """A teacher sure of token k in its k-th step: revealed tokens are their targets, the others have the last one's."""
    calls: list[tuple[float, float]] = []

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append((t.min().item(), t.max().item()))
        return 50.0 * torch.nn.functional.one_hot(torch.full_like(x_t, len(calls) - 1), 4).float()

    process, n = AbsorbingProcess(4), 500
    x_t = torch.full((n, 6), 4)
    x_t[:, 2] = 1
    t, s = torch.full((n,), 0.8, dtype=torch.float64), torch.full((n,), 0.2, dtype=torch.float64)
    found = multi_step_targets(teacher, process, x_t, t, s, random.keys(0, n), 3)
    assert [low for low, _ in calls] == pytest.approx([0.8, 0.6, 0.4]) == [high for _, high in calls]
    said, is_open = found.logits.argmax(-1), x_t == 4
    revealed = is_open & (found.x_s != 4)
    assert torch.equal(said[revealed], found.x_s[revealed])
    assert (said[is_open & (found.x_s == 4)] == 2).all() and (found.x_s[:, 2] == 1).all()
    share = [(said[revealed] == k).double().mean().item() for k in range(3)]
    assert share == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=4 * (2 / 9 / revealed.sum().item()) ** 0.5)


def test_targets_of_hidden_states_stay_hidden() -> None:
    generator = torch.Generator().manual_seed(1)
    head, table = torch.randn(S, 5, generator=generator), torch.randn((S + 1) ** D, D, 5, generator=generator)

    def hidden(x_t: Tensor, t: Tensor) -> Hidden:
        return Hidden(table[index(x_t, S + 1)], head)

    def plain(x_t: Tensor, t: Tensor) -> Tensor:
        return hidden(x_t, t).logits()

    n = 64
    x_t = torch.randint(S + 1, (n, D), generator=generator)
    t, s = torch.full((n,), 0.9, dtype=torch.float64), torch.full((n,), 0.1, dtype=torch.float64)
    short, long = (
        multi_step_targets(each, AbsorbingProcess(S), x_t, t, s, random.keys(5, n), 4) for each in (hidden, plain)
    )
    assert isinstance(short.logits, Hidden) and short.logits.weight is head
    assert torch.equal(short.x_s, long.x_s)
    torch.testing.assert_close(short.logits.logits(), long.logits)


def test_a_mixture_as_teacher_takes_a_latent_in_every_step() -> None:
    teacher = TableStudent(torch.randn(7, (S + 1) ** D, D, S, generator=torch.Generator().manual_seed(2)))
    seen = []

    def watched(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        seen.append(latents)
        return teacher(x_t, t, latents)

    student, x_0 = TableStudent(teacher.table.detach()[:1].clone()), torch.zeros(40, D, dtype=torch.int64)
    objective = SDTTObjective(num_steps=3, step=0.1)
    one = partial(student, latents=torch.zeros(40, 1))
    parts = objective(one, watched, AbsorbingProcess(S), x_0, random.keys(0, 40), teacher_latents=finite_latents(7))
    assert parts["loss"].isfinite() and [latents.shape for latents in seen] == [(40, 1)] * 3
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# --- the loss --------------------------------------------------------------------------------------------------------


def by_hand(kind: str, target: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    log_t, log_p = target.log_softmax(-1), logits.log_softmax(-1)
    t, p = log_t.exp(), log_p.exp()
    rows = {
        "reverse_kl": (p * (log_p - log_t)).sum(-1),
        "kl": (t * (log_t - log_p)).sum(-1),
        "tv": (p - t).abs().sum(-1) / 2,
        "mse": ((log_p - log_t) ** 2).sum(-1) / logits.shape[-1],
    }[kind]
    return (weight * rows).sum(-1)


def case(states: int = 11, width: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(7)
    sizes = ((3, 5, width), (states, width), (states,))
    student, teacher = (Hidden(*(torch.randn(x, generator=generator, dtype=dtype) for x in sizes)) for _ in range(2))
    weight = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float32)
    return teacher, student, weight


@pytest.mark.parametrize("kind", KINDS)
def test_each_divergence_is_its_definition(kind: Any) -> None:
    teacher, student, weight = case()
    target, logits = teacher.logits(), student.logits().requires_grad_()
    value = divergence(kind, target, logits, weight, mask_id=11)
    torch.testing.assert_close(value, by_hand(kind, target, logits, weight).to(value.dtype), rtol=1e-9, atol=1e-12)
    assert value[1] == 0 and (value[[0, 2]] > 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    (wanted,) = torch.autograd.grad(by_hand(kind, target, logits, weight).sum(), logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)
    assert (gradient[weight == 0] == 0).all()
    assert torch.autograd.gradcheck(lambda x: divergence(kind, target, x, weight, 11), logits, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_rows_give_the_same_value_and_gradient(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdtt, "CHUNK_BYTES", 1)
    monkeypatch.setattr(sdtt, "_LEAST_ROWS", 3)  # of the 8 open ones at a time
    teacher, student, weight = case(dtype=torch.float32)
    results = []
    for form in ("hidden", "teacher's hidden", "tensors"):
        leaves = [part.detach().clone().requires_grad_() for part in student[:3]]
        mine: Any = Hidden(*leaves)
        value = divergence(
            kind,
            teacher.logits() if form == "tensors" else teacher,
            mine if form == "hidden" else mine.logits(),
            weight,
            mask_id=11,
        )
        results.append((value.detach(), *torch.autograd.grad((value * torch.tensor([1.0, 2.0, 3.0])).sum(), leaves)))
    for found in results[:2]:
        for one, other in zip(found, results[2], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_squared_error_leaves_out_what_cannot_be() -> None:
    target = torch.tensor([[[0.0, 1.0, -torch.inf, -1e6]]], dtype=torch.float64)
    logits = torch.tensor([[[0.5, 0.5, -2.0, 3.0]]], dtype=torch.float64)
    given = logits.clone().requires_grad_()
    value = divergence("mse", target, given, torch.ones(1, 1), mask_id=3)
    log_p, log_t = logits[0, 0, :3].log_softmax(-1), target[0, 0, :2].log_softmax(-1)
    assert value.item() == pytest.approx(((log_p[:2] - log_t) ** 2).sum().item() / 4)
    value.sum().backward()
    assert given.grad is not None and given.grad.isfinite().all() and given.grad[0, 0, 3] == 0
    nothing = divergence("mse", torch.full((1, 1, 4), torch.nan), torch.zeros(1, 1, 4), torch.zeros(1, 1), mask_id=4)
    assert nothing.item() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_exact_feels_nothing(kind: Any) -> None:
    """Independent positions: K steps of the teacher say what one says. And one step of any teacher is itself."""
    rows = torch.randn(D, S, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def independent(x_t: Tensor, t: Tensor) -> Tensor:
        return rows.expand(len(x_t), -1, -1)

    teacher = ExactTeacher(law().float(), S, D)
    x_0 = sequences(S, D)
    for teach, steps, table in (
        (independent, 4, rows.expand((S + 1) ** D, -1, -1)),
        (teacher, 1, teacher.table),
    ):
        student = TableStudent(table[None].clone().float())
        one = partial(student, latents=torch.zeros(len(x_0), 1))
        objective = SDTTObjective(num_steps=steps, step=0.2, divergence=kind)
        parts = objective(one, teach, AbsorbingProcess(S), x_0, random.keys(0, len(x_0)))
        assert list(parts) == ["loss", "divergence", "revealed"] and parts.parts == ("divergence",)
        assert parts["loss"].item() == pytest.approx(0, abs=1e-6) and parts["revealed"] > 0
        parts["loss"].backward()
        assert student.table.grad is not None and student.table.grad.abs().max() < 1e-5


def test_a_round_learns_in_one_step_what_the_teacher_does_in_two() -> None:
    """At full noise: the tables end up at the marginals of two steps, which are not those of one."""
    n, process = 512, AbsorbingProcess(S)
    student = TableStudent(restless(sequences(S + 1, D), torch.ones(1))[None])
    before = student.table.detach()[0, -1].double().softmax(-1)
    one = partial(student, latents=torch.zeros(n, 1))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 120)
    objective, x_0 = SDTTObjective(step=0.5, divergence="kl"), torch.zeros(n, D, dtype=torch.int64)
    times = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(120):
        keys = random.fold_in(random.keys(0, n), step)
        optimizer.zero_grad()
        objective(one, restless, process, x_0, keys, times=times)["loss"].backward()
        optimizer.step()
        schedule.step()
    two = transition(process, restless, D, 1.0, 0.5) @ transition(process, restless, D, 0.5, 0.0)
    clean = two[-1, index(sequences(S, D), S + 1)]
    marginals = torch.einsum("n,nds->ds", clean, torch.nn.functional.one_hot(sequences(S, D), S).double())
    learnt = student.table.detach()[0, -1].double().softmax(-1)
    assert (before - marginals).abs().max() > 0.1
    assert (learnt - marginals).abs().max() < 0.02


# --- draws -----------------------------------------------------------------------------------------------------------


def test_noise_hangs_on_the_sample() -> None:
    teacher = ExactTeacher(law().float(), S, D)
    student = TableStudent(torch.randn(1, (S + 1) ** D, D, S, generator=torch.Generator().manual_seed(4)))
    x_0, keys, objective = sequences(S, D)[:8], random.keys(9, 8), SDTTObjective(step=0.1)

    def values(rows: slice) -> Tensor:
        x = x_0[rows]
        one = partial(student, latents=torch.zeros(len(x), 1))
        return objective(one, teacher, AbsorbingProcess(S), x, keys[rows]).per_sample["divergence"]

    together = values(slice(8))
    assert together.unique().numel() > 3
    torch.testing.assert_close(together, torch.cat([values(slice(i, i + 1)) for i in range(8)]))


def test_times() -> None:
    t, s = SDTTObjective(time_grid=1024).round(3).draw_times(random.keys(0, 20_000))
    assert torch.equal(t * 1024, (t * 1024).round()) and t.min() == 1 / 1024 and t.max() == 1
    assert torch.equal(s, (t - 16 / 1024).clamp(min=0))  # two steps of 2^3 / 1024
    t, s = SDTTObjective(step=0.1, time_min=0.05).draw_times(random.keys(0, 20_000))
    assert 0.05 < t.min() < 0.051 and s.min() == 0.05 and (s < t).all()
    assert t.mean().item() == pytest.approx(0.525, abs=0.01)


def test_a_teacher_without_a_distribution_is_named() -> None:
    teacher = ExactTeacher(law().float(), S, D)
    one = partial(TableStudent(teacher.table[None].clone()), latents=torch.zeros(4, 1))

    def sick(x_t: Tensor, t: Tensor) -> Tensor:
        return torch.where((torch.arange(4) == 2)[:, None, None], torch.nan, teacher(x_t, t))

    x_0 = torch.zeros(4, D, dtype=torch.int64)
    times = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    parts = SDTTObjective(step=0.5)(one, sick, AbsorbingProcess(S), x_0, random.keys(0, 4), times=times)
    assert parts.non_finite() == ["divergence"]
    assert parts.per_sample["divergence"].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be an integer of at least 1, got 0"),
        ({"step": 0.0}, "longer than 0 and at most 1"),
        ({"step": 0.6}, "2 steps of 0.6 must together be longer than 0 and at most 1"),
        ({"divergence": "js"}, "divergence must be one of reverse_kl, kl, tv, mse, got 'js'"),
        ({"time_grid": 0}, "time_grid must be at least 1"),
        ({"time_min": 1.0}, r"time_min must lie in \[0, 1\)"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SDTTObjective(**settings)


def test_refuses_what_it_cannot_do() -> None:
    teacher, x_0, keys = ExactTeacher(law(), S, D), torch.zeros(2, D, dtype=torch.int64), random.keys(0, 2)
    objective = SDTTObjective()
    with pytest.raises(ValueError, match=r"2 steps of 0\.512"):
        SDTTObjective(step=0.001).round(9)
    with pytest.raises(ValueError, match="reveals none; it is for masked diffusion"):
        objective(teacher, teacher, GaussianProcess(S), x_0, keys)
    with pytest.raises(ValueError, match="has no use for target"):
        objective(teacher, teacher, AbsorbingProcess(S), x_0, keys, target=teacher)
    with pytest.raises(ValueError, match=r"keys \(B,\), one a sample"):
        objective(teacher, teacher, AbsorbingProcess(S), x_0, keys[:1])
    with pytest.raises(ValueError, match=r"must give logits \(B, D, S\) = \(2, 3, 3\), got \(2, 1, 3, 3\)"):
        objective(lambda x, t: teacher(x)[:, None], teacher, AbsorbingProcess(S), x_0, keys)
