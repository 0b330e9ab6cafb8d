"""The pixel systems' samplers: their laws by enumeration, their evaluations counted, their keys, what they refuse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from levels import Chain, Table, dense, enumerated, last_law, latents_of, start, step_law, table
from tiny import chi_square_z, counts, index, product_law, sequences, total_variation
from torch import nn

from di4c_ext import random
from di4c_ext.models import UNetConfig, UNetDenoiser, draw_latents
from di4c_ext.ops import Logistic
from di4c_ext.process import AbsorbingProcess, GaussianProcess, UniformProcess
from di4c_ext.sampler import (
    GuidedDenoiser,
    analytic_times,
    sample_analytic,
    sample_hybrid,
    sample_tau_leaping,
)

S, D = 3, 2


def test_times():
    assert torch.allclose(analytic_times(4), torch.tensor([1, 0.67, 0.34, 0.01], dtype=torch.float64))
    assert analytic_times(1).tolist() == [1.0]
    assert analytic_times(2, last=0.1).tolist() == [1.0, 0.1]
    for arguments, message in (
        ((0,), "num_evaluations must be at least 1, got 0"),
        ((3, 0.0), r"last must lie in \(0"),
    ):
        with pytest.raises(ValueError, match=message):
            analytic_times(*arguments)


@pytest.mark.parametrize("marginal", [False, True])
@pytest.mark.parametrize("final", ["argmax", "draw"])
@pytest.mark.parametrize("num_evaluations", [1, 2, 4])
def test_teacher_has_the_enumerated_law(num_evaluations, final, marginal):
    process, teacher, grid = Chain(S), table(1, S, D, 0), analytic_times(num_evaluations)
    x, keys = start(process, num_evaluations)
    x_0 = sample_analytic(teacher, process, x, grid, keys, final=final, marginal=marginal)
    law = enumerated(process, [teacher.table] * num_evaluations, grid.tolist(), final)
    assert abs(chi_square_z(counts(x_0, S), law)) < 4
    assert [t for _, t in teacher.calls] == pytest.approx(grid.tolist())  # n evaluations
    assert process.calls == list(pairwise(grid.tolist()))  # n - 1 steps


@pytest.mark.parametrize("name", ["gaussian", "marginal", "uniform"])
def test_the_package_s_processes_have_the_enumerated_law(name):
    """Three evaluations from the process's own prior, with the process's own posterior written down."""
    process: Any = UniformProcess(S)
    if name != "uniform":
        process = GaussianProcess(S, rate_sigma=1.0, q_sigma=2.0, time_exponential=10.0, time_base=0.5)
    teacher, grid, keys = table(1, S, D, 20), analytic_times(3).tolist(), random.keys(20, 10_000)
    x = process.prior((10_000, D), keys)
    x_0 = sample_analytic(teacher, process, x, grid, keys, marginal=name == "marginal", final="draw")
    alone = process.stationary if name != "uniform" else torch.full((S,), 1 / S, dtype=torch.float64)
    law = product_law(alone.expand(D, S))
    for t, s in pairwise(grid):
        law = law @ torch.stack([product_law(p) for p in process.posterior(sequences(S, D), teacher.table[0], t, s)])
    assert abs(chi_square_z(counts(x_0, S), law @ last_law(teacher.table[0], "draw"))) < 4


def test_u_net_through_every_sampler():
    config = UNetConfig(num_states=8, num_channels=1, image_size=4, base_channels=8, ch_mult=[1, 2], time_embed_dim=8)
    torch.manual_seed(0)
    teacher = UNetDenoiser(config)
    student = UNetDenoiser.from_teacher(teacher)
    process, keys = GaussianProcess(8, rate_sigma=2.0, q_sigma=16.0, time_base=1.0), random.keys(21, 3)
    x, grid = process.prior((3, 16), keys), analytic_times(3)

    def latents(keys):
        return draw_latents(keys, 1, 1, law="uniform")[:, 0]

    guided = GuidedDenoiser(student, teacher, 1.5)
    images = [
        sample_analytic(teacher, process, x, grid, keys),
        sample_analytic(student, process, x, grid, keys, latents=latents),
        sample_analytic(student, process, x, analytic_times(1), keys, latents=latents, last_latents=3),
        sample_hybrid(student, teacher, process, x, grid, keys, latents=latents, teacher_evaluations=1),
        sample_analytic(guided, process, x, grid, keys, latents=latents, marginal=True),
        sample_tau_leaping(teacher, process, x, grid, keys),
    ]
    assert all(each.shape == x.shape and each.min() >= 0 and each.max() < 8 for each in images)
    assert torch.equal(images[0], images[1])  # an untrained student is its teacher
    assert torch.equal(images[0], images[3])


def test_final_takes_the_likeliest_state_of_the_last_time():
    process, teacher, seen = Chain(S), table(1, S, D, 1), []
    x, keys = start(process, 0, 100)
    x_0 = sample_analytic(teacher, process, x, analytic_times(3), keys, callback=seen.append)
    assert [step["i"] for step in seen] == [0, 1, 2]
    assert [step["t"] for step in seen] == [1.0, 0.505, 0.01] and [step["s"] for step in seen] == [0.505, 0.01, 0.0]
    assert torch.equal(seen[0]["x_t"], x) and torch.equal(seen[-1]["x_s"], x_0)
    assert torch.equal(x_0, teacher.table[0, index(seen[-1]["x_t"], S)].argmax(-1))
    assert torch.equal(seen[-1]["logits"].argmax(-1), x_0)


@pytest.mark.parametrize("logistic", [False, True])
def test_student_mixes_anew_at_every_evaluation(logistic):
    process, student, grid = Chain(S), table(2, S, D, 2, logistic), analytic_times(3)
    logits = dense(Logistic(*student.table.unbind(-1), S)) if logistic else student.table
    x, keys = start(process, 3)
    x_0 = sample_analytic(student, process, x, grid, keys, latents=latents_of(2), final="draw")
    fresh = enumerated(process, [logits] * 3, grid.tolist(), "draw")
    assert abs(chi_square_z(counts(x_0, S), fresh)) < 4
    fixed = latents_of(2)(random.fold_in(keys, 99))
    x_0 = sample_analytic(student, process, x, grid, keys, latents=fixed, final="draw")
    held = sum(enumerated(process, [logits[[k]]] * 3, grid.tolist(), "draw") for k in range(2)) / 2
    assert abs(chi_square_z(counts(x_0, S), held)) < 4
    assert total_variation(fresh, held) > 0.02  # or the test could not tell
    assert all(torch.equal(latents, fixed) for latents in student.seen[3:])
    assert not torch.equal(student.seen[0], student.seen[1])


@pytest.mark.parametrize("teacher_evaluations", [0, 1, 2, 3])
def test_hybrid(teacher_evaluations):
    process, student, teacher, grid = Chain(S), table(2, S, D, 4), table(1, S, D, 5), analytic_times(3)
    x, keys = start(process, 4)
    latents, k = latents_of(2), teacher_evaluations
    x_0 = sample_hybrid(student, teacher, process, x, grid, keys, latents=latents, teacher_evaluations=k, final="draw")
    law = enumerated(process, [student.table] * (3 - k) + [teacher.table] * k, grid.tolist(), "draw")
    assert abs(chi_square_z(counts(x_0, S), law)) < 4
    assert [t for _, t in student.calls + teacher.calls] == pytest.approx(grid.tolist())
    assert (len(student.calls), len(teacher.calls)) == (3 - k, k) and set(map(type, teacher.seen)) <= {type(None)}
    if k == 0:
        assert torch.equal(x_0, sample_analytic(student, process, x, grid, keys, latents=latents, final="draw"))
    if k == 3:
        assert torch.equal(x_0, sample_analytic(teacher, process, x, grid, keys, final="draw"))


def test_last_latents_keep_the_surest_image():
    """K latents at the last evaluation: the law of the best of K draws, by going through all of them."""
    components, tries = 3, 2
    process, student, grid = Chain(S), table(components, S, D, 10), analytic_times(2)
    x, keys = start(process, 8)
    seen: list[dict] = []
    x_0 = sample_analytic(
        student, process, x, grid, keys, latents=latents_of(components), last_latents=tries, callback=seen.append
    )
    assert len(student.calls) == 1 + tries
    score = student.table.double().log_softmax(-1).amax(-1).sum(-1)  # (components, S^D)
    images = index(student.table.argmax(-1), S)
    law = torch.zeros(S**D, dtype=torch.float64)
    laws = [step_law(process, logits, *grid.tolist()) for logits in student.table]
    before = torch.full((S**D,), 1 / S**D).double() @ torch.stack(laws).mean(0)
    for state, weight in enumerate(before.tolist()):
        for first in range(components):
            for second in range(components):
                best = first if score[first, state] >= score[second, state] else second
                law[images[best, state]] += weight / components**2
    assert abs(chi_square_z(counts(x_0, S), law)) < 4
    last = seen[-1]
    assert "logits" not in last and set(last["chosen"].unique().tolist()) == {0, 1}
    tried = torch.stack([latents[:, 0].long() for latents in student.seen[1:]])  # (K, N)
    taken = tried.gather(0, last["chosen"][None])[0]
    assert torch.allclose(last["score"].double(), score[taken, index(last["x_t"], S)], atol=1e-5)
    assert torch.equal(x_0, student.table[taken, index(last["x_t"], S)].argmax(-1))
    # More latents are the same ones and some besides: the score cannot fall.
    sample_analytic(
        student, process, x, grid, keys, latents=latents_of(components), last_latents=5, callback=seen.append
    )
    assert (seen[-1]["score"] >= last["score"]).all() and torch.equal(seen[-1]["x_t"], last["x_t"])


def test_last_latents_of_a_logistic_are_those_of_its_logits():
    process, student = Chain(S), table(4, S, D, 11, True)
    x, keys = start(process, 9, 500)

    class Made:
        def __call__(self, x_t, t, latents):
            return student(x_t, t, latents).logits()

    options = {"latents": latents_of(4), "last_latents": 3}
    found = sample_analytic(student, process, x, analytic_times(1), keys, **options)
    assert torch.equal(found, sample_analytic(Made(), process, x, analytic_times(1), keys, **options))


def samplers(student: Table, teacher: Table):
    latents = latents_of(4)
    guided = GuidedDenoiser(student, teacher, 1.7)
    return {
        "analytic": lambda p, x, keys: sample_analytic(student, p, x, analytic_times(3), keys, latents=latents),
        "best": lambda p, x, keys: sample_analytic(
            student, p, x, analytic_times(3), keys, latents=latents, last_latents=3, final="draw"
        ),
        "guided": lambda p, x, keys: sample_analytic(guided, p, x, analytic_times(3), keys, latents=latents),
        "hybrid": lambda p, x, keys: sample_hybrid(
            student, teacher, p, x, analytic_times(4), keys, latents=latents, teacher_evaluations=2
        ),
        "tau_leaping": lambda p, x, keys: sample_tau_leaping(teacher, p, x, analytic_times(4), keys),
    }


@pytest.mark.parametrize("name", ["analytic", "best", "guided", "hybrid", "tau_leaping"])
@pytest.mark.parametrize("logistic", [False, True])
def test_a_batch_is_its_samples(name, logistic):
    process = Chain(4)
    run = samplers(table(4, 4, 3, 12, logistic), table(1, 4, 3, 13, logistic))[name]
    x, keys = start(process, 10, 24, length=3)
    whole = run(process, x, keys)
    assert torch.equal(torch.cat([run(process, x[[i]], keys[[i]]) for i in range(24)]), whole)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(process, x[order], keys[order]), whole[order])
    assert not torch.equal(run(process, x, random.keys(11, 24)), whole)
    assert run(process, x[:0], keys[:0]).shape == (0, 3)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_t, t, latents=None):
        assert not self.training and not torch.is_grad_enabled()
        return self.scale * torch.arange(float(S)).expand(*x_t.shape, S)


def test_networks_are_in_evaluation_mode_and_put_back():
    process, student, teacher = Chain(S), Moody(), Moody()
    x, keys = start(process, 12, 4)
    grid, latents = analytic_times(2), latents_of(2)
    sample_hybrid(student, teacher, process, x, grid, keys, latents=latents, teacher_evaluations=1)
    sample_analytic(GuidedDenoiser(student, teacher, 2.0), process, x, grid, keys, latents=latents)
    sample_tau_leaping(teacher, process, x, grid, keys)
    assert student.training and teacher.training
    with pytest.raises(ZeroDivisionError):
        sample_analytic(student, process, x, grid, keys, callback=lambda step: 1 / 0)
    assert student.training


def test_refusals():
    process, teacher = Chain(S), table(1, S, D, 15)
    x, keys = start(process, 15, 5)
    run = {"denoiser": teacher, "process": process, "x": x, "times": analytic_times(2), "keys": keys}
    for changed, error, message in (
        ({"times": [0.5, 0.5]}, ValueError, "times must fall strictly from at most 1 and end above 0"),
        ({"times": [1.0, 0.0]}, ValueError, "end above 0, one of them or more, got"),
        ({"times": []}, ValueError, r"got \[\]"),
        ({"times": [float("nan")]}, ValueError, "nan"),
        ({"final": "mode"}, ValueError, "final must be 'argmax' or 'draw', got 'mode'"),
        ({"last_latents": 0}, ValueError, "last_latents must be an integer of at least 1, got 0"),
        ({"last_latents": 2}, ValueError, "needs latents to choose from.* got none"),
        ({"last_latents": 2, "latents": torch.zeros(5, 1)}, ValueError, "got fixed ones"),
        ({"x": x.float()}, ValueError, r"x must be int64 \(B, D\), got torch.float32"),
        ({"keys": keys[:4]}, ValueError, r"keys must be \(5,\), one a sample of x, got \(4,\)"),
        (
            {"process": AbsorbingProcess(S), "last_latents": 2, "latents": lambda keys: torch.zeros(5, 1)},
            ValueError,
            "last_latents 2 is for processes without masks",
        ),
        ({"process": UniformProcess(S), "marginal": True}, ValueError, "has no step_marginal"),
        ({"process": Chain(S + 1)}, ValueError, r"must give logits \(B, D, S\) = \(5, 2, 4\), got \(5, 2, 3\)"),
    ):
        with pytest.raises(error, match=f"sample_analytic: .*{message}"):
            sample_analytic(**{**run, **changed})
    for k, error in ((3, ValueError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="sample_hybrid: teacher_evaluations must"):
            sample_hybrid(teacher, teacher, process, x, [1.0, 0.1], keys, latents=None, teacher_evaluations=k)
    with pytest.raises(ValueError, match="sample_tau_leaping: times must begin above 0"):
        sample_tau_leaping(teacher, process, x, [0.0], keys)
    with pytest.raises(TypeError, match="scale must be a number, got '2'"):
        GuidedDenoiser(teacher, teacher, "2")
    with pytest.raises(ValueError, match="scale must be finite"):
        GuidedDenoiser(teacher, teacher, float("inf"))
    with pytest.raises(ValueError, match=r"one shape.*\(5, 2, 3\) and \(5, 2, 4\)"):
        GuidedDenoiser(lambda x, t: torch.zeros(5, 2, 4), teacher, 2.0)(x, torch.ones(5))


@pytest.mark.parametrize("at", [1.0, 0.1])
@pytest.mark.parametrize("name", ["analytic", "best", "guided", "hybrid", "tau_leaping"])
def test_logits_without_a_distribution_are_told(name, at):
    def broken(x, t, latents=None):
        logits = torch.zeros(*x.shape, S)
        if t[0] == torch.tensor(at):
            logits[3, 1] = torch.nan
        return logits

    process, grid, latents = Chain(S), [1.0, 0.1], latents_of(2)
    x, keys = start(process, 16, 5)
    with pytest.raises(ValueError, match=rf"hold no distribution.* at t = {at:.4g}, first at sample 3, position 1"):
        if name == "tau_leaping":
            sample_tau_leaping(broken, process, x, grid, keys)
        elif name == "hybrid":
            sample_hybrid(broken, broken, process, x, grid, keys, latents=latents, teacher_evaluations=1)
        else:
            denoiser = GuidedDenoiser(broken, broken, 2.0) if name == "guided" else broken
            more = {"last_latents": 2} if name == "best" else {}
            sample_analytic(denoiser, process, x, grid, keys, latents=latents, **more)
