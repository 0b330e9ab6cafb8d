"""The published loss of image tokens, term by term, and the options that depart from it."""

import math
from dataclasses import replace

import pytest
import torch
import unets
from scipy.stats import kstest
from tiny import ExactTeacher, TableStudent, finite_latents
from torch import nn

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.loss_presets import PRESETS
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess

B, L, D, S = 6, 5, 16, 1025  # of the fixture
TERMS = {"distillation": "distil_loss", "marginal_data": "data_loss_indep"}
FIXTURE = {"num_latents": L, "window": 0.5, "window_share": 0.5, "distillation": 2.0, "step_min": 0.5, "step_max": 0.5}


@pytest.fixture(scope="module")
def published():
    return torch.load(unets.shared("fixtures/tokens.pt"), weights_only=True)


def assert_published(parts, published):
    f, found = published, parts.per_sample
    for name, theirs in TERMS.items():
        torch.testing.assert_close(found[name], f[theirs], rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    outside = f["r_weight"] == 0
    independent = torch.where(outside, f["consis_loss_indep"], 0.0)
    torch.testing.assert_close(found["marginal_consistency"], independent, rtol=1e-5, atol=0)
    for name, theirs in (
        ("correlation_data", f["time_coeff"] * f["data_loss_cor"]),
        ("correlation_consistency", torch.where(outside, f["consis_loss_cor"], 0.0)),
    ):
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert parts["loss"].item() == pytest.approx(float(f["loss"]), rel=1e-5)
    assert outside.sum() == 3  # both regimes


@pytest.mark.parametrize("fused", [True, False])
def test_terms_from_the_published_logits(published, fused):
    f = published
    parts = Di4CObjective.preset("tokens", **FIXTURE, fused=fused).parts(
        f["logits_student"].view(B, L, D, S),
        teacher=f["logits_teacher"],
        data=f["code"].view(B, D),
        target=f["logits_student_teacher"].view(B, L, D, S),
        samples=f["x_0"],
        t=1 - f["r"],
    )
    assert_published(parts, published)


class Scripted(ConfidenceProcess):
    """The published process, its draws as published: what is masked at t, and where the teacher steps."""

    def __init__(self, f):
        super().__init__(S, mask_id=1024)
        self.f = f

    def corrupt(self, x_0, t, keys, *, stream=0):
        return self.f["masked_code"].view(B, D)

    def step(self, x_t, logits, t, s, keys, *, draws=None, temperature=1.0, stream=0):
        assert torch.equal(x_t, self.f["masked_code"].view(B, D)) and torch.equal(logits, self.f["logits_teacher"])
        return self.f["code_"].view(B, L, D)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_whole_objective_from_the_published_draws(published, monkeypatch, micro_batch):
    """Who is asked of what: one teacher row an image, targets at x_u without dropout, all told of the same class."""
    f, asked = published, []
    at_x_u, at_x_t = (f[name].view(B, L, D, S) for name in ("logits_student_teacher", "logits_student"))
    labels = torch.where(f["drop_label"], 1000, f["y"])

    class Network(nn.Module):
        def forward(self, x, t, latents=None, *, labels):
            asked.append((tuple(x.shape), self.training, torch.is_grad_enabled(), labels))
            if latents is None:
                return f["logits_teacher"]
            which = latents[0, :, 0].long()  # their numbers
            if x.ndim == 3:
                assert torch.equal(x, f["code_"].view(B, L, D)[:, which])
            return (at_x_u if x.ndim == 3 else at_x_t)[:, which]

    monkeypatch.setattr(ops, "sample_categorical", lambda logits, keys, **_: f["x_0"])
    process = Scripted(f)
    parts = Di4CObjective.preset("tokens", **FIXTURE, latent_micro_batch=micro_batch)(
        Network(),
        Network(),
        process,
        f["code"].view(B, D),
        random.keys(0, B),
        latents=lambda keys, n: torch.arange(n).view(1, n, 1).expand(len(keys), n, 1).float(),
        times=(1 - f["r"].double(), (1 - f["r"].double() - 0.5).clamp(min=0)),
        conditions={"labels": labels},
    )
    assert_published(parts, published)
    pieces = 1 if micro_batch is None else 3
    assert [len(shape) for shape, *_ in asked[: 1 + pieces]] == [2, *[3] * pieces]
    assert [a[1:3] for a in asked[: 1 + pieces]] == [(False, False)] * (1 + pieces)
    assert all(a[1] for a in asked[1 + pieces :]) and all(a[3] is labels for a in asked)


def test_the_preset():
    tokens = Di4CObjective.preset("tokens")
    assert tokens == Di4CObjective(**PRESETS["tokens"])
    assert (tokens.num_latents, tokens.num_targets, tokens.target_dropout) == (32, None, False)
    assert tokens.clean_positions and not Di4CObjective().clean_positions
    assert tokens.distillation * tokens.window == pytest.approx(1) and tokens.data_marginal == tokens.consistency == 1
    assert tokens.data_weight(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([4.54e-6, 0.05, 0.1], rel=1e-3)


def test_times_of_the_preset():
    """t uniform, u = max(t - 0.05, 0): no longer steps, and no shorter."""
    t, u = Di4CObjective.preset("tokens").draw_times(random.keys(0, 50_000))
    assert kstest(t.numpy(), "uniform").pvalue > 1e-3 and t.min() > 0 and t.max() <= 1
    torch.testing.assert_close(u, (t - 0.05).clamp(min=0), rtol=0, atol=1e-15)
    halved = Di4CObjective(step_min=0.05, step_max=0.05, window_share=0.05).draw_times(random.keys(0, 50_000))
    assert torch.equal(halved[0], t) and (halved[1] >= t / 2).all()
    with pytest.raises(ValueError, match=r"step_share must lie in \(0, 1\], got 0"):
        Di4CObjective(step_share=0)


# --- small networks, every number by its definition -------------------------------------------------------------------

CODES, LENGTH, BATCH = 3, 4, 16


def setting(batch=BATCH, extra=False, seed=0):
    """A student of six latents and a teacher over 3 codes; `extra`: with a logit for the mask, the fourth."""
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand(CODES**LENGTH, generator=generator) + 0.05
    teacher = ExactTeacher(law / law.sum(), CODES, LENGTH)
    # As label smoothing leaves it: less than all probability on what is visible.
    teacher.table = (0.9 * teacher.table.softmax(-1) + 0.1 / CODES).log()
    student = TableStudent(torch.randn(6, (CODES + 1) ** LENGTH, LENGTH, CODES, generator=generator))
    if extra:
        student.table = nn.Parameter(nn.functional.pad(student.table.detach(), (0, 1), value=3.0))
        student.num_states = CODES
        teacher.table = nn.functional.pad(teacher.table, (0, 1), value=2.0)
    x_0 = torch.randint(CODES, (batch, LENGTH), generator=generator)
    return student, teacher, x_0, random.keys(seed, batch), finite_latents(6)


def evaluate(objective, process, student, teacher, x_0, keys, latents, **more):
    return objective(student, teacher, process, x_0, keys, latents=latents, **more)


TIMES = torch.linspace(0.05, 1, BATCH, dtype=torch.float64), torch.linspace(0, 0.9, BATCH, dtype=torch.float64)
SMALL = Di4CObjective.preset("tokens", num_latents=4, window=0.3)


def spied(objective, *arguments, **more):
    """The parts, and what they were made of."""
    seen, copy = {}, replace(objective)

    def keep(logits, **given):
        seen.update(given, logits=logits)
        return type(objective).parts(copy, logits, **given)

    object.__setattr__(copy, "parts", keep)
    return evaluate(copy, *arguments, **more), seen


@pytest.mark.parametrize("clean", [True, False])
def test_every_term_by_its_definition(clean):
    """Position by position in float64: all of them as published, or those alone that are open."""
    objective = replace(SMALL, clean_positions=clean)
    parts, seen = spied(objective, ConfidenceProcess(CODES), *setting(), times=TIMES)
    weight = torch.ones(BATCH, LENGTH) if clean else seen["weight"]
    assert (seen["weight"] is None) == clean and 0 < weight.mean() <= 1
    for b in range(BATCH):
        open_ = [d for d in range(LENGTH) if weight[b, d]]
        p = seen["logits"][b].detach().double().softmax(-1)
        g, teacher = (seen[name][b].double().softmax(-1) for name in ("target", "teacher"))

        def gain(x, p=p, open_=open_):
            joint = sum(math.prod(p[i, d, x[d]].item() for d in open_) for i in range(4)) / 4
            return math.log(joint) - sum(math.log(p[:, d, x[d]].mean().item()) for d in open_)

        def kl(a, b):
            return sum(u * math.log(u / v) for u, v in zip(a.tolist(), b.tolist(), strict=True) if u)

        t, inside = TIMES[0][b].item(), TIMES[0][b].item() <= 0.3
        wanted = {
            "distillation": 20 * inside * sum(kl(teacher[d], p[i, d]) for i in range(4) for d in open_) / 4,
            "correlation_data": -0.1 / (1 + math.exp(-20 * (t - 0.5))) * gain(seen["data"][b]),
            "marginal_data": sum(kl(teacher[d], p[:, d].mean(0)) for d in open_),
            "correlation_consistency": -(not inside) * sum(gain(x) for x in seen["samples"][b]) / 4,
            "marginal_consistency": (not inside) * sum(kl(g[:, d].mean(0), p[:, d].mean(0)) for d in open_),
        }
        for name, value in wanted.items():
            assert parts.per_sample[name][b].item() == pytest.approx(float(value), rel=1e-4, abs=2e-5), (b, name)


def test_clean_positions_of_the_targets():
    """Counted, their laws and samples at visible positions are the student's own; else what x_u tells is certain."""
    times = tuple(torch.full_like(x, v) for x, v in zip(TIMES, (0.9, 0.02), strict=True))
    for clean in (True, False):
        _, seen = spied(replace(SMALL, clean_positions=clean), ConfidenceProcess(CODES), *setting(), times=times)
        certain = seen["target"].softmax(-1).amax(-1) == 1
        assert (certain.float().mean() > 0.5) if not clean else not certain.any()


def test_the_mask_symbol_excluded():
    """A denoiser that gives the mask's logit is told apart by the process alone: without it, the loss of one that does
    not, and no gradient for that logit; with it, another."""
    plain, extra = setting(), setting(extra=True)
    losses = []
    for process, given in ((ConfidenceProcess(CODES), plain), (ConfidenceProcess(CODES), extra)):
        parts = evaluate(SMALL, process, *given, times=TIMES)
        parts["loss"].backward()
        losses.append(parts.per_sample)
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value, rtol=1e-5, atol=1e-6)
    assert (extra[0].table.grad[..., CODES] == 0).all()
    torch.testing.assert_close(extra[0].table.grad[..., :CODES], plain[0].table.grad)
    kept = evaluate(SMALL, ConfidenceProcess(CODES + 1, mask_id=CODES), *extra, times=TIMES).per_sample
    assert not torch.allclose(kept["marginal_data"], losses[0]["marginal_data"])
    with pytest.raises(ValueError, match=r"ConfidenceProcess.step: logits must be \(16, 4, 1\)"):
        evaluate(SMALL, ConfidenceProcess(CODES - 2), *plain, times=TIMES)


def test_guidance_inside_the_teachers_step():
    """The step alone sees it, at the weight of its time; the divergences to the teacher stay as they were."""
    seen = []

    class Watched(ConfidenceProcess):
        def step(self, x_t, logits, t, s, keys, **options):
            seen.append(logits)
            return super().step(x_t, logits, t, s, keys, **options)

    given, process = setting(), Watched(CODES, guidance=3.0)
    other = torch.randn(CODES, generator=torch.Generator().manual_seed(1))
    plain, made = spied(SMALL, process, *given, times=TIMES)
    guided, again = spied(SMALL, process, *given, times=TIMES, unconditional=lambda x, t: other.expand(*x.shape, CODES))
    assert torch.equal(seen[0], made["teacher"]) and torch.equal(again["teacher"], made["teacher"])
    weight = 3 * (1 - TIMES[0]) * 8 / 7
    wanted = made["teacher"] + weight.float()[:, None, None] * (made["teacher"] - other)
    torch.testing.assert_close(seen[1], wanted)
    for name in ("distillation", "marginal_data", "correlation_data"):
        torch.testing.assert_close(guided.per_sample[name], plain.per_sample[name])
    assert not torch.equal(guided.per_sample["marginal_consistency"], plain.per_sample["marginal_consistency"])
    with pytest.raises(ValueError, match="unconditional is for a process that guides its steps, ConfidenceProcess"):
        evaluate(SMALL, AbsorbingProcess(CODES), *given, times=TIMES, unconditional=lambda x, t: x)


def test_accumulation_is_exact():
    """The gradients of micro-batches, however uneven, times their share of the samples, are the batch's gradient."""
    student, teacher, x_0, keys, latents = setting()
    process = ConfidenceProcess(CODES)
    evaluate(SMALL, process, student, teacher, x_0, keys, latents)["loss"].backward()
    whole, student.table.grad = student.table.grad, None
    for part in (slice(0, 3), slice(3, 4), slice(4, BATCH)):
        loss = evaluate(SMALL, process, student, teacher, x_0[part], keys[part], latents)["loss"]
        (loss * len(keys[part]) / BATCH).backward()
    torch.testing.assert_close(student.table.grad, whole, rtol=1e-5, atol=1e-7)
    assert whole.abs().max() > 1e-3
