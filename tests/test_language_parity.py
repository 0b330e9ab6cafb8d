"""The published language loss, term by term, in its six cases: two kinds of teacher at three times."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from dits import by_formula, noised
from unets import shared

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.loss_terms import marginal
from di4c_ext.models import draw_latents
from di4c_ext.process import AbsorbingProcess

CASES = pytest.mark.parametrize("case", range(6))
L = 4


@pytest.fixture(scope="module")
def cases():
    return torch.load(shared("fixtures/language.pt"), weights_only=True)["loss"]


def given(case, num_states):
    """What `Di4CObjective.parts` takes, from a case's own log-probabilities of `num_states` states."""
    teacher = case["teacher_logp"][..., :num_states]
    x_0 = case["x0"]
    samples = x_0[:, None].expand(1, L, -1) if case["sampled_x0"] is None else case["sampled_x0"][None]
    return {
        "logits": case["student_logp_at_xt"][None, ..., :num_states].clone().requires_grad_(),
        "teacher": teacher[None] if case["teacher_is_mixture"] else teacher,
        "data": x_0,
        "target": case["target_logp_at_xs"][None, ..., :num_states],
        "samples": samples,
        "t": torch.tensor([case["t"]]),
        "weight": (case["x_t"] == 100).float(),
    }


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("num_states", [100, 101], ids=["without the mask", "with its column"])
@CASES
def test_published_terms(cases, case, num_states, fused):
    case = cases[case]
    objective = Di4CObjective.preset("language", num_latents=L, fused=fused)
    assert case["t"] * objective.time_grid % 1 == 0
    found = {name: value.item() for name, value in objective.parts(**given(case, num_states)).items()}
    terms = case["terms"]
    is_inside = case["t"] < 0.02
    a = 0.1 / (1 + math.exp(-20 * (case["t"] - 0.5)))
    assert found["distillation"] == pytest.approx(terms["distil"], rel=1e-5)
    assert found["marginal_data"] == pytest.approx(terms["data"] - a * terms["data_cor"], rel=1e-5)
    assert -found["gain_data"] == pytest.approx(terms["data_cor"], abs=2e-3)
    assert found["correlation_data"] == pytest.approx(a * terms["data_cor"], abs=2e-3 * a)
    assert found["correlation_consistency"] == pytest.approx(terms["consis_cor"], abs=2e-3)
    # Theirs, and so what is left of it without the correlation, is the difference of large numbers.
    marginal_consistency = terms["consis"] - terms["consis_cor"]
    assert found["marginal_consistency"] == pytest.approx(marginal_consistency, rel=1e-5, abs=2e-3)
    assert found["loss"] == pytest.approx(case["total"].item(), rel=1e-5, abs=2e-3)
    assert (found["distillation"] > 0) == is_inside and (found["marginal_consistency"] != 0) == (not is_inside)


@pytest.mark.parametrize("case", [0, 1, 3, 4])  # at t = 0.9375 every position happens to be masked
def test_what_x_t_tells_costs_nothing(cases, case):
    told = given(cases[case], 100)
    parts = Di4CObjective.preset("language", num_latents=L).parts(**told)
    parts["loss"].backward()
    clean = told["weight"][0] == 0
    gradient = told["logits"].grad[0]
    assert clean.any() and (gradient[:, clean] == 0).all() and (gradient[:, ~clean] != 0).any()


def test_times_lie_on_the_published_grid():
    objective = Di4CObjective.preset("language")
    t, u = objective.draw_times(random.keys(0, 20_000))
    assert torch.equal(t * 1024, (t * 1024).round()) and t.min() == 1 / 1024 and t.max() == 1
    step = torch.minimum(torch.tensor(1 / 1024, dtype=torch.float64), t / 2)
    torch.testing.assert_close(t - u, step, rtol=0, atol=1e-15)
    # Their branch test on the grid: 20 of the 20.48 steps below the window.
    share = (t <= objective.window).double().mean().item()
    assert share == pytest.approx(0.3 * 20 / 20.48, abs=4 * (0.3 * 0.7 / 20_000) ** 0.5)


def test_the_marginals_of_a_mixture():
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0, :, 0, :3] = -torch.inf  # states no component gives
    wanted = x.softmax(-1).mean(1).log()
    torch.testing.assert_close(marginal(x), wanted)
    head = ops.Hidden(x[..., :4].nan_to_num(neginf=0.0), x[0, 0, :2, 3:].repeat(3, 1).nan_to_num(neginf=0.0))
    torch.testing.assert_close(marginal(head), head.logits().softmax(-1).mean(1).log())
    with pytest.raises(ValueError, match="at least one component"):
        marginal(x[:, :0])


def test_a_second_round():
    """The teacher is a mixture: each target steps from a component of its own, divergences are to their mean."""
    teacher, student = by_formula(is_student=True), by_formula(is_student=True, latent_form="added")
    process = AbsorbingProcess(20, "log_linear", 20)
    keys = random.keys(4, 2)
    x_0 = noised(2, student.config).clamp(max=19)
    seen = []

    def watched(x_t, t, latents=None):
        logits = teacher(x_t, t, latents)
        seen.append((x_t, latents, logits))
        return logits

    stepped = []

    class Watched(AbsorbingProcess):
        def step(self, x_t, logits, *args, **kwargs):
            stepped.append(logits)
            return super().step(x_t, logits, *args, **kwargs)

    own = partial(draw_latents, latent_dim=1, law="uniform", independent=True)
    objective = Di4CObjective.preset("language", num_latents=3, num_targets=2)
    t = torch.tensor([0.75, 0.5], dtype=torch.float64)
    times = (t, t - 0.25)
    parts = objective(
        student, watched, Watched(20, "log_linear", 20), x_0, keys, latents=own, teacher_latents=own, times=times
    )
    ((x_t, latents, logits),) = seen
    assert latents.shape == (2, 2, 1) and len(stepped) == 2
    for k in range(2):
        assert torch.equal(stepped[k], logits[:, k])
    single = marginal(logits)
    weight = process.weight(x_t)
    assert weight.sum() > 0
    again = objective(student, lambda x, t: single, Watched(20, "log_linear", 20), x_0, keys, latents=own, times=times)
    torch.testing.assert_close(parts.per_sample["marginal_data"], again.per_sample["marginal_data"])
    assert parts["loss"].isfinite()
    with pytest.raises(ValueError, match="a teacher with latents goes neither with unconditional"):
        objective(student, watched, process, x_0, keys, latents=own, teacher_latents=own, unconditional=teacher)
