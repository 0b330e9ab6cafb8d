"""The objective for pixels: its preset, distillation on rows of its own, and heads that never make their states."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.loss_presets import PRESETS
from di4c_ext.process import AbsorbingProcess, GaussianProcess

B, L, D, S = 2, 6, 48, 32
LONG = 1024  # D where memory is measured, so that tables of S x S are small beside it
PUBLISHED = Di4CObjective.preset("pixels", num_latents=L, distillation_rows=L)
PROCESS = GaussianProcess(S, rate_sigma=1.0, q_sigma=64.0, time_base=1.0)


class Levels(nn.Module):
    """A pixel network with nothing inside: a logistic about the level it sees, moved by the latent."""

    def __init__(self, is_student, seed=0, length=D):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shift = nn.Parameter(0.3 * torch.randn(length, generator=generator))
        self.pull = nn.Parameter(0.5 * torch.randn(length, generator=generator)) if is_student else None
        self.scale = nn.Parameter(0.1 * torch.randn(length, generator=generator))
        self.drop = nn.Dropout(0.5)
        self.calls = []

    def forward(self, x_t, t, latents=None):
        self.calls.append((tuple(x_t.shape), t, torch.is_grad_enabled(), self.training))
        x = x_t.float() * (2 / (S - 1)) - 1
        moved = self.shift * t.view(-1, *[1] * (x.ndim - 1))
        if latents is not None:
            if latents.ndim > x.ndim:
                x, moved = x[:, None], moved[:, None]
            moved = moved + self.pull * (latents - 0.5)
        mean = torch.tanh(x + moved)
        return ops.Logistic(mean, self.scale.expand_as(mean), S)


def latents(keys, n):
    return random.uniform(keys, n).float()[..., None]


def x_0(batch=B, length=D):
    return torch.arange(batch * length).view(batch, length).pow(2).mul(5) % S


def evaluate(objective, student=None, teacher=None, process=PROCESS, batch=B, length=D, **more):
    student = Levels(True, length=length) if student is None else student
    teacher = Levels(False, 1, length=length) if teacher is None else teacher
    return objective(student, teacher, process, x_0(batch, length), random.keys(0, batch), latents=latents, **more)


def test_the_preset_is_the_published_loss():
    published = Di4CObjective.preset("pixels")
    assert published == Di4CObjective(**PRESETS["pixels"])
    assert (published.num_latents, published.num_targets, published.distillation_rows) == (16, None, 16)
    assert published.distillation == published.data_marginal == published.consistency == 1
    assert published.data_weight(torch.tensor([0.5, 1.0])).tolist() == pytest.approx([0.5, 0.9999546])
    assert published.control_variate and published.target_dropout
    assert Di4CObjective.preset("pixels", num_latents=4, target_dropout=False).num_latents == 4
    with pytest.raises(ValueError, match="unknown preset 'pixel'; known are pixels"):
        Di4CObjective.preset("pixel")


def test_times_of_the_preset():
    keys = random.keys(0, 100_000)
    t, u = PUBLISHED.draw_times(keys)
    step = t - u
    assert u.min() >= 0.01 - 1e-12 and t.max() <= 1 and step.min() >= 0.001 - 1e-12 and step.max() <= 0.01 + 1e-12
    assert step.log10().mean() == pytest.approx(-2.5, abs=0.005)
    place = (u - 0.01) / (1 - 0.01 - step)  # uniform, whatever the step
    assert place.mean() == pytest.approx(0.5, abs=0.005) and place.var() == pytest.approx(1 / 12, rel=0.02)
    assert torch.corrcoef(torch.stack([place, step]))[0, 1].abs() < 0.02
    tau = PUBLISHED.draw_row_times(keys)
    assert tau.shape == (100_000, L) and (tau == 0.01).double().mean() == pytest.approx(0.5, abs=0.003)
    rest = (tau[tau > 0.01] - 0.01) / 0.01
    assert rest.max() < 1 and rest.mean() == pytest.approx(0.5, abs=0.005)
    assert torch.corrcoef(tau.T).fill_diagonal_(0).abs().max() < 0.02  # rows of a sample are drawn apart
    assert torch.equal(PUBLISHED.draw_row_times(keys[7:8]), tau[7:8])


def test_no_time_lies_below_the_least():
    t, u = Di4CObjective(time_min=0.2, window=0.5, window_share=0.5, step_max=0.2).draw_times(random.keys(0, 20_000))
    assert (u > 0.2).all() and ((t - 0.2) / 2 <= u - 0.2 + 1e-12).all()
    inside = t[t <= 0.5]
    assert inside.mean() == pytest.approx(0.35, abs=0.003) and len(inside) / 20_000 == pytest.approx(0.5, abs=0.02)


def test_who_is_called_where():
    """Rows apart are samples to the denoisers: a time, a noise and a latent each; the rest acts at every time."""
    student, teacher = Levels(True), Levels(False, 1)
    t = torch.tensor([0.015, 0.9], dtype=torch.float64)  # the first within the window
    parts = evaluate(PUBLISHED, student, teacher, times=(t, t - 0.004)).per_sample
    (at_u, u, *target), (at_t, _, *scored), (at_rows, tau, *rows) = student.calls
    assert at_u == (B, L, D) and at_t == (B, D) and at_rows == (B * L, D)
    assert target == [False, True] and scored == rows == [True, True]  # the published target has its dropout
    assert torch.equal(u, (t - 0.004).float()) and tau.shape == (B * L,) and tau.min() >= 0.01 and tau.max() <= 0.02
    (at, _, *first), (at_tau, tau_too, *second) = teacher.calls
    assert (at, at_tau) == ((B, D), (B * L, D)) and torch.equal(tau, tau_too) and first == second == [False, False]
    assert all((parts[name] != 0).all() for name in PUBLISHED_PARTS)
    student.calls.clear()
    evaluate(Di4CObjective.preset("pixels", num_latents=2, distillation_rows=3, target_dropout=False), student)
    assert [call[0] for call in student.calls] == [(B, 2, D), (B, D), (B * 3, D)]
    assert not student.calls[0][3] and student.training


PUBLISHED_PARTS = [
    "distillation",
    "correlation_data",
    "marginal_data",
    "correlation_consistency",
    "marginal_consistency",
]


def test_distillation_is_the_mean_over_its_rows():
    student, teacher, seen = Levels(True), Levels(False, 1), {}

    def watch(name, network):
        def call(x, t, latents=None):
            out = network(x, t) if latents is None else network(x, t, latents)
            if x.shape[0] == B * L:
                seen[name] = (x, t, out.logits().double().log_softmax(-1), latents)
            return out

        return call

    parts = evaluate(PUBLISHED, watch("student", student), watch("teacher", teacher))
    (x, t, log_p, drawn), (x_too, t_too, log_q, _) = seen["student"], seen["teacher"]
    assert torch.equal(x, x_too) and torch.equal(t, t_too) and len(drawn.unique()) == B * L
    assert len({tuple(row) for row in x.tolist()}) == B * L  # every row its own noise
    assert (x.view(B, L, D) - x_0()[:, None]).abs().double().mean() < 4  # of its own image: tau is near the data
    kl = (log_q.exp() * (log_q - log_p)).sum((1, 2)).view(B, L).mean(1)
    torch.testing.assert_close(parts.per_sample["distillation"].double(), kl.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("control_variate", [True, False])
def test_logistics_are_their_logits(control_variate):
    """Student, teacher and target as Logistic, as tensors, and mixed: one loss and one gradient; draws as well."""
    results = []
    as_tensor = lambda network: lambda *a, **k: network(*a, **k).logits()  # noqa: E731
    for wrap_student, wrap_teacher, fused in ((0, 0, True), (1, 1, True), (0, 1, True), (0, 0, False)):
        student, teacher = Levels(True), Levels(False, 1)
        objective = Di4CObjective.preset(
            "pixels", num_latents=L, distillation_rows=2, control_variate=control_variate, fused=fused
        )
        parts = evaluate(
            objective,
            as_tensor(student) if wrap_student else student,
            as_tensor(teacher) if wrap_teacher else teacher,
        )
        parts["loss"].backward()
        results.append((parts.per_sample, [p.grad for p in student.parameters()]))
    (parts, grads), *others = results
    for other, other_grads in others:
        for name, value in parts.items():
            torch.testing.assert_close(other[name], value, rtol=2e-5, atol=2e-5)
        for a, b in zip(other_grads, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all(grad.abs().max() > 1e-3 for grad in grads)


def test_a_batch_is_its_samples():
    keys = random.keys(0, 4)
    whole = evaluate(PUBLISHED, batch=4).per_sample
    for b in range(4):
        one = PUBLISHED(Levels(True), Levels(False, 1), PROCESS, x_0(4)[b : b + 1], keys[b : b + 1], latents=latents)
        for name, value in whole.items():
            torch.testing.assert_close(one.per_sample[name], value[b : b + 1], rtol=1e-6, atol=1e-6)


def test_rows_apart_suit_masks_as_well():
    """Positions that x_tau leaves clean cost nothing there either."""
    process = AbsorbingProcess(S)
    objective = Di4CObjective(
        num_latents=L, distillation_rows=3, time_min=1e-9, window=2e-9, step_max=1e-9, step_min=1e-9
    )

    class Table(Levels):
        def forward(self, x_t, t, latents=None):
            return super().forward(x_t.clamp(max=S - 1), t, latents).logits()

    t = torch.ones(B, dtype=torch.float64)
    parts = evaluate(objective, Table(True), Table(False, 1), process, times=(t, t / 2)).per_sample
    assert (parts["distillation"] == 0).all() and (parts["marginal_data"] > 0).all()


def largest_tensor(call):
    """Bytes of the largest piece of memory that a call asks for, within the ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    return max(e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]")


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_no_tensor_of_all_states_is_made(kernels, micro_batch):
    """A whole step, forward and backward: nothing of a third of (B, L, D, S); the definition does make it."""
    if kernels.name != "cpu":
        pytest.skip("the tensors are made alike")
    found = {}
    for fused in (True, False):
        objective = Di4CObjective.preset(
            "pixels", num_latents=L, distillation_rows=L, fused=fused, latent_micro_batch=micro_batch
        )
        found[fused] = largest_tensor(lambda objective=objective: evaluate(objective, length=LONG)["loss"].backward())
    states = 4 * B * L * LONG * S
    assert found[True] < states / 3 and found[False] >= states


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_rows": -1}, "distillation_rows must be at least 0, got -1"),
        ({"distillation_rows": 4}, "distillation_rows want 0 < time_min < 1 - step_max, .* got time_min 0.0"),
        ({"distillation_rows": 4, "time_min": 0.01, "step_max": 1.0}, "got time_min 0.01 and step_max 1.0"),
        ({"time_min": 0.05}, r"time_min must lie in \[0, window = 0.05\), got 0.05"),
        ({"time_min": -0.1}, r"time_min must lie in \[0, window = 0.05\), got -0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Di4CObjective(**settings)


def test_rows_go_with_their_setting():
    given = {"teacher": torch.zeros(1, 2, 3), "data": torch.zeros(1, 2, dtype=torch.int64)}
    given |= {"target": torch.zeros(1, 1, 2, 3), "samples": torch.zeros(1, 1, 2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="rows go with distillation_rows, got none and distillation_rows 6"):
        PUBLISHED.parts(torch.zeros(1, 2, 2, 3), t=torch.ones(1), **given)
    assert Di4CObjective().parts(torch.zeros(1, 2, 2, 3), t=torch.ones(1), **given)["loss"] == 0


def test_the_flags_of_the_commands_say_the_same(tmp_path):
    pytest.importorskip("transformers")
    from di4c_ext.config import DistillConfig

    flags = {"data": "data_weight", "distillation": "distillation_weight"}
    settings = {flags.get(name, name): value for name, value in PRESETS["pixels"].items()}
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, latent_micro_batch=4, **settings)
    assert config.objective() == Di4CObjective.preset("pixels", latent_micro_batch=4)
