"""The few-step likelihood: its steps, its terms by what they say, and a chain that learns what no product can."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from dits import SMALL
from tiny import chi_square_z
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.few_step import FewStepObjective
from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.models.latent import draw_latents
from di4c_ext.process import AbsorbingProcess

S, D = 4, 5
PROCESS = AbsorbingProcess(S)


def pair(length: int = D) -> tuple[DiTDenoiser, DiTDenoiser]:
    """A teacher with weights by chance, and a student of it."""
    torch.manual_seed(0)
    teacher = DiTDenoiser(DiTConfig(**SMALL | {"length": length, "vocab_size": S + 1, "dropout": 0.0}))
    for weight in teacher.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    student: Any = DiTDenoiser.from_teacher(teacher, latent_form="chain", latent_states=3, latent_hidden_size=12)
    for weight in student.backbone.latent_chain.parameters():
        torch.nn.init.normal_(weight, std=0.8)
    return teacher.eval(), student


def uniform(keys: Tensor, number: int, length: int = D) -> Tensor:
    return draw_latents(keys, number, length, law="uniform")


def data(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows * D).view(rows, D) * 7 % S, random.keys(3, rows)


def test_times_are_steps_of_every_k_alike() -> None:
    k, t, s = FewStepObjective((1, 2, 5, 5)).draw_times(random.keys(0, 40_000))
    assert torch.equal(t - s, 1 / k) or bool(((t - s) * k - 1).abs().max() < 1e-12)
    assert bool((s >= 0).all()) and bool((t <= 1).all())
    place = torch.where(k == 5, 3 + (s * 5).round(), torch.where(k == 2, 1 + (s * 2).round(), 0.0)).long()
    law = torch.tensor([1 / 4, 1 / 8, 1 / 8, *[1 / 10] * 5], dtype=torch.float64)
    assert chi_square_z(torch.bincount(place, minlength=8), law) < 4


def test_loss_at_data_is_k_times_the_likelihood_of_a_step() -> None:
    teacher, student = pair()
    x_0, keys = data(64)
    seen: dict[str, Tensor] = {}

    def watched(x_t: Tensor, t: Tensor, *, x_s: Tensor) -> Tensor:
        seen.update(x_t=x_t, t=t, x_s=x_s)
        return student(x_t, t, x_s=x_s)

    objective = FewStepObjective((1, 2, 4))
    parts = objective(watched, teacher, PROCESS, x_0, keys, latents=uniform)
    key = random.fold_in(keys, 1)  # the times' own
    k, t, s = objective.draw_times(key)
    assert torch.equal(seen["t"], t.float())
    masked, left = seen["x_t"] == S, seen["x_s"] == S
    assert bool((left <= masked).all()) and torch.equal(seen["x_s"][~left], x_0[~left])
    assert bool((left.any(1) <= (s > 0)).all()) and bool((masked.all(1) >= (t == 1)).all())
    wanted = -k * student(seen["x_t"], t.float(), x_s=seen["x_s"])
    torch.testing.assert_close(parts.per_sample["few_step_data"], wanted.detach())
    assert parts["loss"].item() == pytest.approx(wanted.mean().item())
    assert parts["few_step_consistency"] == 0 and parts["distillation"] == 0
    assert torch.equal(parts.per_sample["revealed"], (masked & ~left).sum(1).double())


def test_share_of_positions_a_step_reveals() -> None:
    teacher, student = pair()
    x_0, keys = data(3000)
    with torch.no_grad():
        parts = FewStepObjective((4,))(student, teacher, PROCESS, x_0, keys, latents=uniform)
    revealed = parts.per_sample["revealed"]
    assert abs(revealed.mean() - D / 4) <= 4 * revealed.std() / 3000**0.5


def test_goal_of_consistency_is_half_a_step_of_each() -> None:
    """From all masked in one step: the law of x_s enumerated, the teacher's half first, then the student's."""
    teacher, student = pair(length=2)
    n = 30_000
    seen: dict[str, Tensor] = {}

    def watched(x_t: Tensor, t: Tensor, latents: Tensor | None = None, x_s: Tensor | None = None) -> Any:
        if x_s is not None:
            seen.update(x_t=x_t, x_s=x_s)
        return student(x_t, t, latents, x_s=x_s)

    objective = FewStepObjective((1,), consistency_share=1.0)
    with torch.no_grad():
        parts = objective(
            watched, teacher, PROCESS, torch.zeros(n, 2, dtype=torch.int64), random.keys(1, n),
            latents=partial(uniform, length=2),
        )  # fmt: skip
        assert bool((seen["x_t"] == S).all()) and bool((seen["x_s"] < S).all())
        one = torch.ones(1)
        first = teacher(torch.full((1, 2), S), one)[0].double().softmax(-1)  # (2, S)
        law = torch.zeros(S, S, dtype=torch.float64)
        both = torch.cartesian_prod(torch.arange(S), torch.arange(S))
        start = torch.full((S * S, 2), S)
        law += 0.25 * student(start, torch.full((S * S,), 0.5), x_s=both).double().exp().view(S, S)
        law += 0.25 * first[0][:, None] * first[1]
        for place in (0, 1):
            known = start.clone()
            known[:, place] = both[:, place]
            then = student(known, torch.full((S * S,), 0.5), x_s=both).double().exp().view(S, S)
            law += 0.25 * (first[0][:, None] if place == 0 else first[1]) * then
    assert law.sum().item() == pytest.approx(1.0, abs=1e-5)
    count = torch.bincount(seen["x_s"][:, 0] * S + seen["x_s"][:, 1], minlength=S * S)
    assert chi_square_z(count, law.flatten() / law.sum()) < 4
    assert parts["few_step_data"] == 0 and parts["few_step_consistency"] > 0


def test_distillation_is_the_divergence_from_the_teacher_near_data() -> None:
    teacher, student = pair()
    x_0, keys = data(256)
    objective = FewStepObjective((4,), window=0.6, window_share=1.0, distillation=2.0)
    with torch.no_grad():
        parts = objective(student, teacher, PROCESS, x_0, keys, latents=uniform)
    # Nothing is revealed: the chain's laws alone, which add up to 1.
    assert abs(parts["few_step_data"]) < 1e-5 and parts["revealed"] == 0
    key = random.fold_in(keys, torch.arange(8)[:, None])
    t = 0.6 * (1 - random.uniform(key[1], 1, stream=1)[:, 0])
    x_t = PROCESS.corrupt(x_0, t, key[2])
    with torch.no_grad():
        logits = student(x_t, t.float(), uniform(key[5], 1)[:, 0])
        known = teacher(x_t, t.float())
    wanted = 2 * ops.masked_kl(known, logits, PROCESS.weight(x_t))
    torch.testing.assert_close(parts.per_sample["distillation"], wanted.double(), rtol=1e-4, atol=1e-5)


def test_samples_are_their_own_whatever_the_batch() -> None:
    teacher, student = pair()
    objective = FewStepObjective((1, 4), consistency_share=0.4, window_share=0.3, window=0.5)
    x_0, keys = data(48)
    whole = objective(student, teacher, PROCESS, x_0, keys, latents=uniform)
    assert all(bool((whole.per_sample[name] != 0).any()) for name in whole.parts)
    for rows in torch.arange(48).split(11):
        part = objective(student, teacher, PROCESS, x_0[rows], keys[rows], latents=uniform)
        for name in whole.per_sample:
            torch.testing.assert_close(part.per_sample[name], whole.per_sample[name][rows], rtol=1e-4, atol=1e-4)


def test_second_round_takes_a_teacher_that_is_a_mixture() -> None:
    _, student = pair()
    objective = FewStepObjective((2,), consistency_share=0.5, window_share=0.5, window=0.5)
    x_0, keys = data(64)
    with torch.no_grad():
        parts = objective(student, student, PROCESS, x_0, keys, latents=uniform, teacher_latents=uniform)
    assert parts["distillation"] > 0 and parts["few_step_consistency"] > 0
    with pytest.raises(ValueError, match="needs latents"):
        objective(student, student, PROCESS, x_0, keys, latents=uniform)


def test_a_draw_that_fails_is_its_samples_alone() -> None:
    teacher, student = pair()
    x_0, keys = data(16)

    def broken(x_t: Tensor, t: Tensor) -> Tensor:
        logits = teacher(x_t, t)
        logits[3] = torch.nan
        return logits

    with torch.no_grad():
        objective = FewStepObjective((1,), consistency_share=1.0)
        parts = objective(student, broken, PROCESS, x_0, keys, latents=uniform)
    bad = parts.per_sample["few_step_consistency"].isnan()
    assert bad.nonzero().flatten().tolist() == [3] and parts.non_finite() == ["few_step_consistency"]


def test_chain_learns_what_no_product_can() -> None:
    """Both tokens equal, each value as likely: the best product is at total variation 1/2, the chain comes near 0."""
    torch.manual_seed(0)
    small = {"length": 2, "vocab_size": 3, "num_layers": 1, "dropout": 0.0}
    teacher = DiTDenoiser(DiTConfig(**SMALL | small))
    torch.nn.init.normal_(teacher.backbone.output_layer.linear.weight)  # a teacher that says nothing says so for long
    student = DiTDenoiser.from_teacher(teacher, latent_form="chain", latent_states=4, latent_hidden_size=16)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    objective = FewStepObjective((1,))
    for step in range(120):
        keys = random.keys(step, 32)
        x_0 = (random.uniform(keys, 1, stream=5) * 2).long().expand(-1, 2)
        told = (AbsorbingProcess(2), x_0, keys)
        loss = objective(student, teacher, *told, latents=partial(uniform, length=2))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    both = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    with torch.no_grad():
        law = student(torch.full((4, 2), 2), torch.ones(4), x_s=both).exp().view(2, 2)
    assert 0.5 * (law - torch.eye(2) / 2).abs().sum() < 0.1


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_steps": ()}, "num_steps"),
        ({"num_steps": (0,)}, r"\(0,\)"),
        ({"num_steps": (1.5,)}, "1.5"),
        ({"consistency_share": 0.7, "window_share": 0.4}, "0.7 and 0.4"),
        ({"window": 1.0}, "window"),
        ({"distillation": -1.0}, "-1.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FewStepObjective(**settings)


def test_what_it_has_no_use_for_is_refused() -> None:
    teacher, student = pair()
    x_0, keys = data(4)
    call = partial(FewStepObjective((2,)), student, teacher, PROCESS, latents=uniform)
    with pytest.raises(ValueError, match="conditions"):
        call(x_0, keys, conditions={"labels": torch.zeros(4)})
    with pytest.raises(ValueError, match="latent_processes 1"):
        call(x_0, keys, group=object())
    with pytest.raises(ValueError, match="x_0 must be"):
        call(x_0[0], keys)
    with pytest.raises(ValueError, match="latent_form 'chain'"):
        FewStepObjective((2,))(teacher, teacher, PROCESS, x_0, keys, latents=uniform)
