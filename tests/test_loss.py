"""The objective as a piece of the library: names, keys, gradients, what costs nothing, what is told."""

import math
from functools import partial

import pytest
import torch
from tiny import ExactTeacher, TableStudent, finite_latents
from torch import nn

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.process import AbsorbingProcess

S, D, L, B = 3, 4, 5, 16
PARTS = ["distillation", "correlation_data", "marginal_data", "correlation_consistency", "marginal_consistency"]
DIAGNOSTICS = ["gain_data", "gain_consistency", "latent_information"]


def setting(batch=B, latents=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    law = torch.rand(S**D, generator=generator) + 0.05
    teacher = ExactTeacher(law / law.sum(), S, D)
    student = TableStudent(torch.randn(latents, (S + 1) ** D, D, S, generator=generator))
    x_0 = torch.randint(S, (batch, D), generator=generator)
    return student, teacher, AbsorbingProcess(S), x_0, random.keys(seed, batch), finite_latents(latents)


def evaluate(objective, student, teacher, process, x_0, keys, latents, **more):
    return objective(student, teacher, process, x_0, keys, latents=latents, **more)


def test_parts_add_up_to_the_loss():
    parts = evaluate(Di4CObjective(num_latents=L), *setting())
    assert list(parts) == ["loss", *PARTS, *DIAGNOSTICS] and list(parts.parts) == PARTS
    assert all(value.shape == () for value in parts.values())
    assert parts["loss"].item() == pytest.approx(sum(parts[name].item() for name in PARTS), rel=1e-5)
    assert all(parts.per_sample[name].shape == (B,) for name in [*PARTS, *DIAGNOSTICS])
    assert parts["loss"].requires_grad
    assert not any(parts[name].requires_grad for name in [*PARTS, *DIAGNOSTICS])
    assert parts.non_finite() == []
    assert all(parts[name] > 0 for name in ("marginal_data", "marginal_consistency", "latent_information"))


def test_without_the_control_variate_the_parts_are_plain_likelihoods():
    objective = Di4CObjective(num_latents=L, control_variate=False, diagnostics=False)
    parts = evaluate(objective, *setting())
    assert list(parts) == ["loss", "distillation", "joint_data", "joint_consistency", "gain_data", "gain_consistency"]
    assert (parts.per_sample["joint_consistency"] >= 0).all()


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("diagnostics", [True, False])
def test_fused_is_op_by_op_to_rounding(control_variate, diagnostics):
    """Values by name, and the gradient of the student's parameters."""
    student, teacher, process, x_0, keys, latents = setting(batch=64)
    t = torch.linspace(0.01, 1, 64, dtype=torch.float64)
    results = []
    for fused in (True, False):
        objective = Di4CObjective(
            num_latents=L,
            num_targets=3,
            window=0.4,
            control_variate=control_variate,
            diagnostics=diagnostics,
            fused=fused,
        )
        parts = evaluate(objective, student, teacher, process, x_0, keys, latents, times=(t, t / 2))
        student.zero_grad()
        parts["loss"].backward()
        results.append((parts.per_sample, student.table.grad))
    (fused, fused_grad), (one_by_one, grad) = results
    assert list(fused) == list(one_by_one) and Di4CObjective().fused
    for name, value in fused.items():
        torch.testing.assert_close(
            value, one_by_one[name], rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    torch.testing.assert_close(fused_grad, grad, rtol=1e-4, atol=1e-7)
    assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("fused", [True, False])
def test_one_op_serves_all_of_a_step(fused, monkeypatch):
    """Fused, nothing but mixture_objective sees the student's logits; else it is not called."""
    called = []

    def watch(name, op):
        def call(*arguments, **more):
            called.append(name)
            return op(*arguments, **more)

        monkeypatch.setattr(ops, name, call)

    for name in ("mixture_objective", "mixture_log_prob", "mixture_kl", "masked_kl"):
        watch(name, getattr(ops, name))
    evaluate(Di4CObjective(num_latents=L, fused=fused), *setting())
    assert called == (["mixture_objective"] if fused else ["mixture_log_prob", "masked_kl", *["mixture_kl"] * 3])


def test_a_batch_is_its_samples():
    student, teacher, process, x_0, keys, latents = setting()
    objective = Di4CObjective(num_latents=L)
    whole = evaluate(objective, student, teacher, process, x_0, keys, latents).per_sample
    for b in range(B):
        one = evaluate(objective, student, teacher, process, x_0[b : b + 1], keys[b : b + 1], latents).per_sample
        for name, value in whole.items():
            assert torch.equal(one[name], value[b : b + 1]), name


def test_weights_scale_their_parts_and_windows_split_them():
    student, teacher, process, x_0, keys, latents = setting()
    t = torch.linspace(0.01, 1, B, dtype=torch.float64)
    plain = Di4CObjective(num_latents=L, data_law="constant", window=0.5)
    base = evaluate(plain, student, teacher, process, x_0, keys, latents, times=(t, t / 2)).per_sample
    inside = t <= 0.5
    for name in ("correlation_consistency", "marginal_consistency"):
        assert (base[name][inside] == 0).all() and (base[name][~inside] != 0).any()
    assert (base["distillation"][~inside] == 0).all() and (base["distillation"][inside] > 0).any()
    assert torch.allclose(base["correlation_consistency"][~inside], -base["gain_consistency"][~inside])
    assert torch.allclose(base["correlation_data"], -0.1 * base["gain_data"])
    scaled = Di4CObjective(
        num_latents=L, data_law="constant", window=0.5, distillation=3, data=0.7, data_marginal=2, consistency=5
    )
    other = evaluate(scaled, student, teacher, process, x_0, keys, latents, times=(t, t / 2)).per_sample
    for name, factor in zip(PARTS, (3, 7, 2, 5, 5), strict=True):
        assert torch.allclose(other[name], factor * base[name], rtol=1e-5), name


def test_time_weights():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert Di4CObjective(data=0.1).data_weight(t).tolist() == pytest.approx([0.1 / (1 + math.exp(10)), 0.05, 0.1], 1e-3)
    assert Di4CObjective(data=2.0, data_law="linear").data_weight(t).tolist() == [0, 1, 2]
    assert Di4CObjective(data=2.0, data_law="constant").data_weight(t).tolist() == [2, 2, 2]


def test_time_draws():
    keys = random.keys(0, 100_000)
    objective = Di4CObjective(window=0.1, window_share=0.25, full_noise_share=0.2, step_min=0.02, step_max=0.08)
    t, u = objective.draw_times(keys)
    assert ((u > 0) & (u < t) & (t <= 1)).all() and (u >= t / 2).all()
    assert (t <= 0.1).double().mean() == pytest.approx(0.25, abs=0.006)
    assert (t == 1).double().mean() == pytest.approx(0.2, abs=0.006)
    middle = t[(t > 0.1) & (t < 1)]
    assert middle.mean() == pytest.approx(0.55, abs=0.005) and middle.var() == pytest.approx(0.81 / 12, rel=0.02)
    assert t[t <= 0.1].mean() == pytest.approx(0.05, abs=0.001)
    step = (t - u)[t > 0.2]
    assert step.min() >= 0.02 - 1e-12 and step.max() <= 0.08 + 1e-12 and step.mean() == pytest.approx(0.05, abs=1e-3)

    t, u = Di4CObjective(window_share=0, step_min=0.001, step_max=0.01, step_law="log_uniform").draw_times(keys)
    assert (t > 0.05).all() and (t < 1).all()
    assert (t - u).log10().mean() == pytest.approx(-2.5, abs=0.01)
    t, _ = Di4CObjective(window=0.02, window_share=1.0).draw_times(keys)
    assert ((t > 0) & (t <= 0.02)).all()
    t, _ = Di4CObjective(window_share=0.0, full_noise_share=1.0).draw_times(keys)
    assert (t == 1).all()


class Watched(nn.Module):
    """A student that keeps what it was called with and how."""

    def __init__(self, student):
        super().__init__()
        self.student, self.drop, self.calls = student, nn.Dropout(0.5), []

    def forward(self, x_t, t, latents):
        self.calls.append((x_t, t, latents, torch.is_grad_enabled(), self.training, self.drop.training))
        return self.student(x_t, t, latents)


def test_one_teacher_row_a_sample_and_one_forward_with_a_graph():
    student, teacher, process, x_0, keys, latents = setting()
    watched = Watched(student)
    evaluate(Di4CObjective(num_latents=L, num_targets=3), watched, teacher, process, x_0, keys, latents)
    assert teacher.calls == [(B, D)]
    (x_u, u, fresh, *at_u), (x_t, t, drawn, *at_t) = watched.calls
    assert x_u.shape == (B, 3, D) and fresh.shape == (B, 3, 1) and at_u == [False, False, False]
    assert x_t.shape == (B, D) and drawn.shape == (B, L, 1) and at_t == [True, True, True]
    assert t.shape == u.shape == (B,) and t.dtype == u.dtype == torch.float32 and (u < t).all()
    assert not torch.equal(fresh, drawn[:, :3])
    assert watched.training and watched.drop.training
    clean = (x_t != process.mask_id)[:, None].expand_as(x_u)
    assert torch.equal(x_u[clean], x_t[:, None].expand_as(x_u)[clean])  # the teacher's step keeps what is clean


def test_every_target_counts():
    """The mean over K targets is K times less noisy, or nearly so: only x_t and the latents are shared."""
    student, teacher, process, x_0, _, latents = setting()
    keys, x_0 = random.keys(0, 4000), x_0[:1].expand(4000, D)
    t = torch.full((4000,), 1.0, dtype=torch.float64)
    spread = {}
    for num_targets in (1, 8):
        objective = Di4CObjective(num_latents=L, num_targets=num_targets)
        parts = evaluate(objective, student, teacher, process, x_0, keys, latents, times=(t, t / 2)).per_sample
        spread[num_targets] = parts["correlation_consistency"].var().item()
        assert torch.allclose(parts["correlation_consistency"], -parts["gain_consistency"])
    assert spread[8] < 0.4 * spread[1]


def test_a_target_of_its_own_and_partials():
    student, teacher, process, x_0, keys, latents = setting()
    other, watched = Watched(setting(seed=4)[0]), Watched(student)
    evaluate(Di4CObjective(num_latents=L), watched, teacher, process, x_0, keys, latents, target=partial(other))
    assert [call[3:] for call in other.calls] == [(False, False, False)] and len(watched.calls) == 1
    assert other.training and other.drop.training


def test_gradient_reaches_the_student_alone_and_only_at_x_t():
    """The table's rows at x_t have a gradient; rows at other states, the targets' among them, have none."""
    student, teacher, process, x_0, keys, latents = setting(batch=1)
    teacher.table.requires_grad_()
    watched = Watched(student)
    t = torch.tensor([0.6], dtype=torch.float64)
    parts = evaluate(Di4CObjective(num_latents=L), watched, teacher, process, x_0, keys, latents, times=(t, t - 0.5))
    parts["loss"].backward()
    x_u, x_t = watched.calls[0][0], watched.calls[1][0]
    place = int((x_t * 4 ** torch.arange(3, -1, -1)).sum())
    touched = student.table.grad.abs().sum((0, 2, 3)).nonzero().flatten().tolist()
    assert touched == [place] and (x_u != x_t[:, None]).any()
    assert teacher.table.grad is None
    clean = (x_t != process.mask_id)[0]
    assert clean.any() and (student.table.grad[:, place, clean] == 0).all()


def test_clean_positions_cost_nothing():
    """What a denoiser says where x_t is clean is not read: not even NaN there matters."""
    student, teacher, process, x_0, keys, latents = setting()
    objective = Di4CObjective(num_latents=L)
    expected = evaluate(objective, student, teacher, process, x_0, keys, latents)

    def spoil(x, logits):
        clean = x != process.mask_id
        if logits.ndim > x.ndim + 1:
            clean = clean[:, None].expand(logits.shape[:-1])
        return logits.masked_fill(clean[..., None], torch.nan)

    spoiled = evaluate(
        objective,
        lambda x, t, latents: spoil(x, student(x, t, latents)),
        lambda x, t: spoil(x, teacher(x, t)),
        process,
        x_0,
        keys,
        latents,
    )
    assert all(torch.equal(expected[name], spoiled[name]) for name in expected)
    spoiled["loss"].backward()
    assert student.table.grad.isfinite().all() and student.table.grad.abs().sum() > 0


def test_a_sample_without_open_positions_is_zero():
    student, teacher, process, x_0, keys, latents = setting()
    t = torch.full((B,), 1e-12, dtype=torch.float64)
    parts = evaluate(Di4CObjective(num_latents=L), student, teacher, process, x_0, keys, latents, times=(t, t / 2))
    parts["loss"].backward()
    assert parts["loss"] == 0 and (student.table.grad == 0).all()


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("who", ["teacher", "target", "student"])
def test_what_is_not_finite_is_told_by_name_and_stays_with_its_sample(who, control_variate):
    student, teacher, process, x_0, keys, latents = setting()
    objective = Di4CObjective(num_latents=L, control_variate=control_variate)
    t = torch.full((B,), 0.9, dtype=torch.float64)
    good = evaluate(objective, student, teacher, process, x_0, keys, latents, times=(t, t / 2))

    def broken(name, denoiser):
        def call(x, *rest, **more):
            logits = denoiser(x, *rest, **more).clone()
            logits[3] = torch.nan
            return logits

        return call if name == who else denoiser

    parts = evaluate(
        objective,
        broken("student", student),
        broken("teacher", teacher),
        process,
        x_0,
        keys,
        latents,
        target=broken("target", student),
        times=(t, t / 2),
    )
    consistency = {name for name in parts.parts if name.endswith("consistency")}
    named = {"teacher": consistency, "target": consistency, "student": set(parts.parts) - {"distillation"}}[who]
    if who == "teacher" and control_variate:
        named = named | {"marginal_data"}
    assert set(parts.non_finite()) == named and parts["loss"].isnan()
    others = torch.arange(B) != 3
    for name in parts.parts:
        assert torch.equal(parts.per_sample[name][others], good.per_sample[name][others])


def test_autocast_keeps_the_gradient_of_every_weight():
    """Target and prediction share weights inside one autocast region; a cast kept from no_grad would lose them."""
    _, teacher, process, x_0, keys, _ = setting()

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.seen = nn.Linear(D + 1, 32), nn.Linear(32, D * S), []

        def forward(self, x_t, t, latents):
            if x_t.ndim == 2:
                x_t = x_t[:, None].expand(-1, latents.shape[1], -1)
            logits = self.last(torch.relu(self.first(torch.cat([x_t.float(), latents], -1)))).unflatten(-1, (D, S))
            self.seen.append((logits.dtype, torch.is_autocast_cache_enabled()))
            return logits

    torch.manual_seed(0)
    network = Linear()
    draw = lambda keys, n: random.normal(keys, n).float()[..., None]  # noqa: E731
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = evaluate(Di4CObjective(num_latents=L), network, teacher, process, x_0, keys, draw)
    parts["loss"].backward()
    assert network.seen == [(torch.bfloat16, False), (torch.bfloat16, True)]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert parts["loss"].isfinite() and parts["loss"].dtype == torch.float32


def test_a_step_of_training_lowers_the_loss():
    student, teacher, process, x_0, keys, latents = setting(batch=256)
    objective = Di4CObjective(num_latents=L)
    loss = evaluate(objective, student, teacher, process, x_0, keys, latents)["loss"]
    loss.backward()
    with torch.no_grad():
        student.table -= 1.0 * student.table.grad
    assert evaluate(objective, student, teacher, process, x_0, keys, latents)["loss"] < loss


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_latents": 0}, "num_latents must be at least 1, got 0"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"data": -1.0}, "data is a weight, finite and >= 0, got -1.0"),
        ({"consistency": math.nan}, "consistency is a weight"),
        ({"data_law": "quadratic"}, "data_law must be one of .*'sigmoid'.*got 'quadratic'"),
        ({"step_law": "fixed"}, "step_law must be one of"),
        ({"window": 0.0}, r"window must lie in \(0, 1\), got 0.0"),
        ({"window_share": 0.6, "full_noise_share": 0.5}, "together at most 1, got 0.6 and 0.5"),
        ({"step_min": 0.2, "step_max": 0.1}, "0 < step_min <= step_max <= 1 wanted, got 0.2 and 0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Di4CObjective(**settings)


def test_bad_calls():
    student, teacher, process, x_0, keys, latents = setting()
    with pytest.raises(ValueError, match=r"x_0 must be \(B, D\) and keys \(B,\)"):
        evaluate(Di4CObjective(), student, teacher, process, x_0, keys[:3], latents)
    with pytest.raises(ValueError, match=r"\(B, L, D, S\) = \(16, 5, 4, 3\) for its L latents, got \(16, 4, 3\)"):
        flat = lambda x, t, latents: teacher(x, t) if x.ndim == 2 else student(x, t, latents)  # noqa: E731
        evaluate(Di4CObjective(num_latents=L), flat, teacher, process, x_0, keys, latents)
