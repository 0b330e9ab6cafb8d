"""The published pixel loss, term by term: from its own draws, and from formula-defined networks against its definition.

The published head loses digits where a state is improbable (its floor of 1e-6 is rounded as a number near 1), which
shows in the correlation at the data: through it our terms are the published ones, beside it they are what the
definition gives in float64.
"""

import math

import pytest
import torch
import unets
from torch.nn.functional import logsigmoid

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.loss_terms import Rows
from di4c_ext.models import UNetConfig, UNetDenoiser
from di4c_ext.process import GaussianProcess

B, L, D, S = 3, 4, 192, 32
SMALL = {"num_latents": L, "distillation_rows": L}
INDEPENDENT = {  # parts whose published form loses no digits, and their names there
    "distillation": "distil_loss",
    "marginal_data": "data_loss_indep",
    "marginal_consistency": "consis_loss_indep",
}


@pytest.fixture(scope="module")
def published():
    return torch.load(unets.shared("fixtures/pixels.pt"), weights_only=True)


@pytest.fixture(scope="module")
def networks(published):
    """Teacher and student with the published weights, dropout off."""
    models = []
    for role, is_student in (("teacher", False), ("student", True)):
        sizes = {"num_states": S, "image_size": 8, "base_channels": 16, "time_embed_dim": 16}
        model = UNetDenoiser(UNetConfig(**sizes, dropout=0.0, is_student=is_student))
        model.load_state_dict(published[f"{role}_state"])
        models.append(model.eval())
    return models


def published_head(x):
    """Logits of a Logistic in float32, in the published order of operations."""
    if not isinstance(x, ops.Logistic):
        return x
    centres = torch.linspace(-1 + 1 / S, 1 - 1 / S, S)
    scale = torch.exp(-(x.log_scale - 2))[..., None]
    left, right = ((centres + side / S - x.mean[..., None]) * scale for side in (-1, 1))
    return logsigmoid(right) + torch.log1p(-torch.exp(logsigmoid(left) - logsigmoid(right)) + 1e-6)


def outputs(published, teacher, student, head=lambda x: x):
    """What `Di4CObjective.parts` takes, from the networks at the published draws."""
    d = published["draws_and_terms"]
    rows = {name: d[name].view(B, L, -1) for name in ("x_u", "lams", "lams_u")}
    with torch.no_grad():
        at_x_t, at_rows = head(teacher(d["x_t"], d["ts"])), head(teacher(d["x_mint"], d["mints"]))
        target = head(student(rows["x_u"], d["us"], latents=rows["lams_u"]))
    return {
        "logits": head(student(d["x_t"], d["ts"], latents=rows["lams"])),
        "teacher": at_x_t,
        "data": d["minibatch"].long(),
        "target": target,
        "samples": d["x_0"],
        "t": d["ts"],
        "rows": Rows(head(student(d["x_mint"], d["mints"], latents=d["mlams"])), at_rows, None),
    }


def assert_published(parts, published, correlation=2e-3):
    d, found = published["draws_and_terms"], parts.per_sample
    for name, theirs in INDEPENDENT.items():
        torch.testing.assert_close(found[name], d[theirs], rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    data = d["time_coeff"] * d["data_loss_cor"]
    for name, theirs in (("correlation_data", data), ("correlation_consistency", d["consis_loss_cor"])):
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=correlation, msg=lambda m, n=name: f"{n}: {m}")
    assert parts["loss"].item() == pytest.approx(float(published["loss"]), rel=1e-5 + correlation / 250)


@pytest.mark.parametrize("fused", [True, False])
def test_terms_from_the_published_probabilities(published, fused):
    d = published["draws_and_terms"]
    parts = Di4CObjective.preset("pixels", **SMALL, fused=fused).parts(
        d["log_p0t_student_lam"].view(B, L, D, S),
        teacher=d["p0t_teacher"].log(),
        data=d["minibatch"].long(),
        target=d["p0u_student_lam"].log().view(B, L, D, S),
        samples=d["x_0"],
        t=d["ts"],
        rows=Rows(d["log_p0mint_student_lam"], d["p0mint_teacher"].log(), None),
    )
    assert_published(parts, published)


def test_terms_and_gradient_through_networks_and_the_published_head(published, networks):
    teacher, student = networks
    student.zero_grad()
    parts = Di4CObjective.preset("pixels", **SMALL).parts(**outputs(published, teacher, student, published_head))
    assert_published(parts, published)
    parts["loss"].backward()
    assert_gradient(student, published, 2e-3)


def assert_gradient(student, published, tolerance):
    theirs = published["grad_norms"]
    largest = max(theirs.values())
    assert set(theirs) == {name for name, _ in student.named_parameters()}
    for name, weight in student.named_parameters():
        # What is smaller is rounding: keys of an attention whose biases no softmax sees, say.
        assert weight.grad.norm().item() == pytest.approx(theirs[name], rel=tolerance, abs=1e-8 * largest), name


@pytest.mark.parametrize("fused", [True, False])
def test_terms_and_gradient_of_logistics(published, networks, fused):
    """Without states ever made: the published numbers, but for the digits that the published head loses."""
    teacher, student = networks
    student.zero_grad()
    given = outputs(published, teacher, student)
    objective = Di4CObjective.preset("pixels", **SMALL, fused=fused)
    parts = objective.parts(**given)
    assert_published(parts, published, correlation=1e-2)
    parts["loss"].backward()
    assert_gradient(student, published, 2e-2)

    exact = published_terms(objective, **{name: doubled(value) for name, value in given.items()})
    for name, value in exact.items():
        torch.testing.assert_close(parts.per_sample[name].double(), value, rtol=2e-5, atol=5e-5)


def doubled(x):
    """Logits, from a Logistic computed, in float64; what is no logits as it is."""
    if isinstance(x, Rows):
        return Rows(doubled(x.student), doubled(x.teacher), None)
    if isinstance(x, ops.Logistic):
        x = ops.Logistic(x.mean.detach().double(), x.log_scale.detach().double(), x.num_states).logits()
    return x.double() if x.is_floating_point() else x


def published_terms(objective, logits, teacher, data, target, samples, t, rows):
    """Section 5.1's loss as published, of float64 logits: one image, one target, one latent after the other."""
    terms = {name: [] for name in (*INDEPENDENT, "correlation_data", "correlation_consistency")}

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum()

    for b in range(len(data)):
        log_p = logits[b].log_softmax(-1)
        number = len(log_p)
        log_mean = log_p.logsumexp(0) - math.log(number)

        def gain(x, log_p=log_p, log_mean=log_mean, number=number):
            of = [sum(log_p[i, d, x[d]] for d in range(len(x))) for i in range(number)]
            product = sum(log_mean[d, x[d]] for d in range(len(x)))
            return torch.stack(of).logsumexp(0) - math.log(number) - product

        log_g = target[b].log_softmax(-1)
        n = len(rows.teacher) // len(data)
        each = [(rows.teacher[b * n + i].log_softmax(-1), rows.student[b * n + i].log_softmax(-1)) for i in range(n)]
        terms["distillation"].append(sum(kl(*pair) for pair in each) / n)
        terms["correlation_data"].append(-torch.sigmoid(20 * (t[b].double() - 0.5)) * gain(data[b]))
        terms["marginal_data"].append(kl(teacher[b].log_softmax(-1), log_mean))
        terms["correlation_consistency"].append(-sum(gain(x) for x in samples[b]) / len(samples[b]))
        terms["marginal_consistency"].append(kl(log_g.logsumexp(0) - math.log(len(log_g)), log_mean))
    return {name: torch.stack(values) for name, values in terms.items()}


class Scripted:
    """A process, and latents, that come out as somebody else drew them."""

    num_states = S

    def __init__(self, draws):
        self.draws, self.calls = draws, []

    def corrupt(self, x_0, t, keys):
        self.calls.append((x_0, t))
        return self.draws["x_t"] if len(x_0) == B else self.draws["x_mint"]

    def step(self, x_t, logits, t, s, keys, draws):
        assert torch.equal(x_t, self.draws["x_t"]) and logits.shape == (B, D, S) and draws == L
        return self.draws["x_u"].view(B, L, D)

    def weight(self, x_t):
        return torch.ones(x_t.shape)

    def carry_over(self, logits, x):
        return logits

    def latents(self):
        """In the order in which the objective asks for them."""
        order = iter(("lams_u", "lams", "mlams"))
        return lambda keys, n: self.draws[next(order)].view(B, n, 1)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_whole_objective_from_the_published_draws(published, networks, monkeypatch, micro_batch):
    """Called as in training: which network sees what, at which time, with which latents and which gradient."""
    (teacher, student), d = networks, published["draws_and_terms"]
    process = Scripted(d)
    monkeypatch.setattr(ops, "sample_categorical", lambda logits, keys, **_: d["x_0"])
    monkeypatch.setattr(Di4CObjective, "draw_row_times", lambda self, keys: d["mints"].double().view(B, L))
    student.zero_grad()
    parts = Di4CObjective.preset("pixels", **SMALL, latent_micro_batch=micro_batch)(
        student,
        teacher,
        process,
        d["minibatch"].long(),
        random.keys(0, B),
        latents=process.latents(),
        times=(d["ts"].double(), d["us"].double()),
    )
    assert_published(parts, published, correlation=1e-2)
    parts["loss"].backward()
    assert_gradient(student, published, 2e-2)
    (_, t), (x_0, tau) = process.calls
    assert torch.equal(t.float(), d["ts"]) and torch.equal(tau.float(), d["mints"])
    assert torch.equal(x_0, d["minibatch"].long().repeat_interleave(L, 0))


def test_formula_networks_against_the_definition():
    """No fixture needed: small U-Nets with weights by formula, every draw our own, the definition in float64."""
    teacher, student = unets.by_formula(), unets.by_formula(is_student=True)
    config = teacher.config
    process = GaussianProcess(config.num_states, rate_sigma=1.0, q_sigma=32.0, time_base=1.0)
    keys = random.keys(5, 2)
    x_0 = unets.noised(2, config)
    objective = Di4CObjective.preset("pixels", num_latents=3, distillation_rows=2)
    seen = {}

    def keep(logits, **given):
        seen.update(given, logits=logits)
        return type(objective).parts(objective, logits, **given)

    object.__setattr__(objective, "parts", keep)
    latents = lambda keys, n: random.uniform(keys, n).float()[..., None]  # noqa: E731
    parts = objective(student, teacher, process, x_0, keys, latents=latents)
    names = ("logits", "teacher", "data", "target", "samples", "t", "rows")
    exact = published_terms(objective, **{name: doubled(seen[name]) for name in names})
    for name, value in exact.items():
        torch.testing.assert_close(parts.per_sample[name].double(), value, rtol=2e-5, atol=5e-5)
    assert seen["rows"].student.shape == (4, config.length, config.num_states)
