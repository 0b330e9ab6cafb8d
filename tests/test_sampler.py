"""The ancestral sampler: its law by enumeration, its keys, and what it does for the caller."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import ExactTeacher, TableStudent, chi_square_z, counts, finite_latents, product_law, sequences, transition
from torch import nn

from di4c_ext import random
from di4c_ext.ops.truncation import nucleus
from di4c_ext.process import SCHEDULES, AbsorbingProcess, ConfidenceProcess
from di4c_ext.sampler import analytic_times, sample_analytic, sample_ancestral, times

S, D = 2, 2
LAW = torch.tensor([0.45, 0.05, 0.1, 0.4], dtype=torch.float64)


def masked_law() -> torch.Tensor:
    """All mass on the state of masks, the last of (S+1)^D."""
    law = torch.zeros((S + 1) ** D, dtype=torch.float64)
    law[-1] = 1
    return law


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_teacher_has_the_enumerated_law_of_k_steps(schedule, num_steps):
    process, teacher = AbsorbingProcess(S, schedule), ExactTeacher(LAW, S, D)
    grid = times(num_steps)
    law = masked_law()
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        law = law @ transition(process, teacher, D, t, s)
    keys = random.keys(num_steps, 40_000)
    x = sample_ancestral(teacher, process, process.prior((len(keys), D), keys), grid, keys)
    assert (x < S).all()  # no mask is left
    assert abs(chi_square_z(counts(x, S + 1), law)) < 4
    if num_steps == 1:  # T = 1 is the product of the marginals
        assert torch.allclose(law[[0, 1, 3, 4]], product_law(torch.tensor([[0.5, 0.5], [0.55, 0.45]]).double()))


def test_student_has_the_law_of_its_mixture_with_a_fresh_latent_at_every_step():
    generator = torch.Generator().manual_seed(0)
    table = 2 * torch.randn(2, (S + 1) ** D, D, S, generator=generator)
    process, student, grid = AbsorbingProcess(S), TableStudent(table), times(3)
    law = masked_law()
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        given = [
            transition(process, lambda x, t, which=which: student(x, t, torch.full((len(x), 1), which)), D, t, s)
            for which in (0.0, 1.0)
        ]
        law = law @ ((given[0] + given[1]) / 2)
    keys, draw = random.keys(0, 60_000), finite_latents(2)
    x = sample_ancestral(
        student, process, process.prior((len(keys), D), keys), grid, keys, latents=lambda keys: draw(keys, 1)[:, 0]
    )
    assert abs(chi_square_z(counts(x, S + 1), law.detach())) < 4


def test_a_batch_is_its_samples():
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(4, 4**5, 5, 3, generator=generator)
    process, student, draw = AbsorbingProcess(3, "arccos"), TableStudent(table), finite_latents(4)
    keys = random.keys(2, 64)

    def run(keys):
        x = process.prior((len(keys), 5), keys)
        return sample_ancestral(student, process, x, times(4), keys, latents=lambda keys: draw(keys, 1)[:, 0])

    whole = run(keys)
    assert torch.equal(torch.cat([run(key[None]) for key in keys]), whole)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(run(keys[order]), whole[order])
    assert not torch.equal(run(random.keys(3, 64)), whole)


def test_a_thousand_steps_unmask_as_many_each():
    """The linear schedule in 1024 steps: every position falls at a step of its own, any of them as likely."""
    process, steps, keys = AbsorbingProcess(S), 1024, random.keys(4, 256)
    masked = []
    x = sample_ancestral(
        lambda x, t: torch.zeros(256, 32, S),
        process,
        process.prior((256, 32), keys),
        times(steps),
        keys,
        callback=lambda step: masked.append(int((step["x_s"] == process.mask_id).sum())),
    )
    falls = -torch.tensor([x.numel(), *masked]).diff()
    assert falls.sum() == x.numel() and len(falls) == steps
    assert abs(chi_square_z(falls, torch.full((steps,), 1 / steps, dtype=torch.float64))) < 4


def test_infilling_keeps_what_is_given_and_conditions_on_it():
    process, teacher = AbsorbingProcess(S), ExactTeacher(LAW, S, D)
    keys = random.keys(0, 20_000)
    x = process.prior((len(keys), D), keys)
    x[:, 0] = 1
    x_0 = sample_ancestral(teacher, process, x, times(4), keys)
    assert (x_0[:, 0] == 1).all() and (x[:, 1] == process.mask_id).all()
    assert abs(chi_square_z(counts(x_0[:, 1:], S), LAW[2:] / LAW[2:].sum())) < 4


def test_a_grid_may_be_cut_in_two():
    """Stopping above 0 leaves x at that time: a student may take the first steps and its teacher the rest."""
    process, teacher, grid = AbsorbingProcess(S), ExactTeacher(LAW, S, D), times(4)
    keys = random.keys(1, 40_000)
    x = sample_ancestral(teacher, process, process.prior((len(keys), D), keys), grid[:3], keys)
    assert ((x == process.mask_id).double().mean() - 0.5).abs() < 0.01
    x = sample_ancestral(teacher, process, x, grid[2:], random.fold_in(keys, 1))
    law = masked_law()
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        law = law @ transition(process, teacher, D, t, s)
    assert abs(chi_square_z(counts(x, S + 1), law)) < 4


def test_callback_sees_every_step():
    process, teacher, keys, seen = AbsorbingProcess(S), ExactTeacher(LAW, S, D), random.keys(0, 7), []
    x = process.prior((7, D), keys)
    x_0 = sample_ancestral(teacher, process, x, [1.0, 0.6, 0.1, 0.0], keys, callback=seen.append)
    assert [(step["i"], step["t"], step["s"]) for step in seen] == [(0, 1.0, 0.6), (1, 0.6, 0.1), (2, 0.1, 0.0)]
    assert torch.equal(seen[0]["x_t"], x) and torch.equal(seen[-1]["x_s"], x_0)
    assert all(torch.equal(a["x_s"], b["x_t"]) for a, b in pairwise(seen))
    assert seen[0]["logits"].shape == (7, D, S)
    assert (process.prior((7, D), keys) == x).all()  # the start is not written to


def test_temperature_zero_takes_the_likeliest():
    process, keys = AbsorbingProcess(S), random.keys(0, 50)
    logits = torch.tensor([[0.1, 0.0], [0.0, 0.1]]).expand(50, D, S)
    x = sample_ancestral(lambda x, t: logits, process, process.prior((50, D), keys), times(2), keys, temperature=0.0)
    assert (x == torch.tensor([0, 1])).all()


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.drop = nn.Parameter(torch.ones(())), nn.Sequential(nn.Dropout(0.9), nn.Dropout(0.9))
        self.drop[1].eval()

    def forward(self, x_t, t):
        assert not torch.is_grad_enabled() and t.shape == x_t.shape[:1]
        logits = self.scale * torch.arange(3.0).expand(*x_t.shape, 3)
        assert torch.equal(self.drop(logits), logits)
        return logits


def test_the_network_is_in_evaluation_mode_and_put_back():
    process, keys, network = AbsorbingProcess(3), random.keys(0, 4), Dropping()
    sample_ancestral(network, process, process.prior((4, 2), keys), times(2), keys)
    assert network.training and network.drop[0].training and not network.drop[1].training
    with pytest.raises(RuntimeError, match="mine"):
        sample_ancestral(
            network, process, process.prior((4, 2), keys), times(2), keys, callback=lambda step: raising("mine")
        )
    assert network.training and network.drop[0].training


def raising(message):
    raise RuntimeError(message)


def test_times():
    assert times(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert times(1).tolist() == [1, 0]
    for num_steps in (0, -3):
        with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
            times(num_steps)


@pytest.mark.parametrize("grid", [[1.0], [], [0.5, 0.5, 0.0], [0.0, 1.0], [1.5, 0.0], [1.0, float("nan"), 0.0]])
def test_bad_grids(grid):
    process, keys = AbsorbingProcess(S), random.keys(0, 2)
    with pytest.raises(ValueError, match="times must fall strictly"):
        sample_ancestral(ExactTeacher(LAW, S, D), process, process.prior((2, D), keys), grid, keys)


def test_logits_without_a_distribution_are_told():
    process, keys = AbsorbingProcess(S), random.keys(0, 5)

    def broken(x, t):
        logits = torch.zeros(5, D, S)
        logits[3, 1] = torch.nan
        return logits

    with pytest.raises(ValueError, match=r"NaN or all -inf\) at t = 1, first at sample 3, position 1"):
        sample_ancestral(broken, process, process.prior((5, D), keys), times(1), keys)


def test_an_empty_batch():
    process, keys = AbsorbingProcess(S), random.keys(0, 0)
    x = sample_ancestral(ExactTeacher(LAW, S, D), process, process.prior((0, D), keys), times(2), keys)
    assert x.shape == (0, D)


def test_enumeration_itself():
    """The tests' own tools: sequences and laws agree in order."""
    assert sequences(2, 2).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert product_law(torch.tensor([[0.9, 0.1], [0.3, 0.7]])).tolist() == pytest.approx([0.27, 0.63, 0.03, 0.07])


@pytest.mark.parametrize("fresh", [True, False])
def test_idle_steps_are_skipped_and_change_nothing(fresh):
    """Only samples of which a step unmasks something are looked at: as many evaluations as masks at most."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(4, 4**5, 5, 3, generator=generator)
    student, draw, keys = TableStudent(table), finite_latents(4), random.keys(6, 12)
    process = AbsorbingProcess(3, "cosine")
    x = process.prior((12, 5), keys)
    x[3], x[7, 1:] = 2, 0
    latents = (lambda keys: draw(keys, 1)[:, 0]) if fresh else draw(keys, 1)[:, 0]
    shift, seen, steps = torch.randn(12, 3, generator=generator), [], []

    def told(x_t, t, latents, shift):
        seen.append(len(x_t))
        return student(x_t, t, latents) + shift[:, None]

    def run(**options):
        seen.clear()
        told_of = {"shift": shift}
        return sample_ancestral(told, process, x, times(64), keys, latents=latents, conditions=told_of, **options)

    plain = run()
    assert seen == [12] * 64
    assert torch.equal(run(skip_idle=True, callback=steps.append), plain)
    assert len(seen) < 64 and sum(seen) <= 10 * 5 + 1
    assert [len(step["rows"]) for step in steps if len(step["rows"])] == seen and len(steps) == 64
    assert all((step["logits"] is None) == (len(step["rows"]) == 0) for step in steps)


def test_skipping_wants_coins_that_do_not_look():
    process, keys = ConfidenceProcess(S), random.keys(0, 2)
    with pytest.raises(ValueError, match="skip_idle is for processes that say what a step unmasks"):
        x = process.prior((2, D), keys)
        sample_ancestral(ExactTeacher(LAW, S, D), process, x, times(2), keys, skip_idle=True)


def test_the_host_waits_once(monkeypatch):
    """Whether a draw failed is asked at the end, whatever the number of steps."""
    asked = []
    read = torch.Tensor.__bool__

    def watched(self):
        asked.append(sys._getframe(1).f_code.co_filename)
        return read(self)

    monkeypatch.setattr(torch.Tensor, "__bool__", watched)
    process, keys = AbsorbingProcess(S), random.keys(0, 3)
    sample_ancestral(ExactTeacher(LAW, S, D), process, process.prior((3, D), keys), times(9), keys)
    assert sum("sampler" in Path(file).parts for file in asked) == 1


def test_a_draw_that_fails_spoils_no_other():
    """The sample goes on with a mask there, and the first time is named in the end."""
    process, keys = AbsorbingProcess(S), random.keys(0, 4)

    def broken(x, t):
        assert ((x >= 0) & (x <= S)).all()
        logits = torch.zeros(4, D, S)
        logits[2, 0] = torch.nan if t[0] > 0.6 else 0.0
        return logits

    with pytest.raises(ValueError, match=r"at t = (1|0\.\d+), first at sample 2, position 0"):
        sample_ancestral(broken, process, process.prior((4, D), keys), [1.0, 0.7, 0.0001, 0.0], keys)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_a_nucleus_holds_every_token(num_steps):
    """With top_p each token is one of those that make it up, of the mixture's component a latent chose."""
    generator = torch.Generator().manual_seed(7)
    table = 2 * torch.randn(2, 4**3, 3, 3, generator=generator)
    process, student, draw, keys = AbsorbingProcess(3), TableStudent(table), finite_latents(2), random.keys(8, 500)
    steps = []
    sample_ancestral(
        student,
        process,
        process.prior((500, 3), keys),
        times(num_steps),
        keys,
        latents=lambda keys: draw(keys, 1)[:, 0],
        top_p=0.6,
        callback=steps.append,
    )
    for step in steps:
        inside = nucleus(step["logits"], 0.6) > -torch.inf
        new = (step["x_t"] == 3) & (step["x_s"] != 3)
        assert inside.gather(-1, step["x_s"].clamp(max=2)[..., None])[..., 0][new].all() and new.any()
        assert (~inside).any()


@pytest.mark.parametrize("num_steps", [1, 4])
def test_analytic_steps_are_ancestral_ones_and_a_denoising(num_steps):
    """Of masked diffusion; what is clean stays, and without a mask left the last evaluation is not made."""
    process, teacher, keys = AbsorbingProcess(S, "log_linear"), ExactTeacher(LAW, S, D), random.keys(9, 4000)
    x = process.prior((len(keys), D), keys)
    x[::2, 1] = 1
    steps = []
    grid = [*analytic_times(num_steps + 1, 0.3).tolist()]
    x_0 = sample_analytic(teacher, process, x, grid, keys, final="draw", callback=steps.append)
    assert torch.equal(x_0, sample_ancestral(teacher, process, x, [*grid, 0.0], keys))
    assert (x_0[::2, 1] == 1).all() and (x_0 < S).all() and len(steps) == num_steps + 1
    likeliest = sample_analytic(teacher, process, x, grid, keys)
    left = steps[-1]["x_t"] == S
    assert left.any() and torch.equal(likeliest[left], teacher(steps[-1]["x_t"], None).argmax(-1)[left])
    steps.clear()
    sample_analytic(teacher, process, x[:20], analytic_times(num_steps + 1, 1e-9), keys[:20], callback=steps.append)
    assert len(steps) == num_steps
