"""The method itself, on spaces small enough to enumerate: S states, D positions, laws written down in float64."""

import itertools
import re
import runpy
from pathlib import Path

import pytest
import torch
from tiny import (
    ExactTeacher,
    TableStudent,
    finite_latents,
    index,
    product_law,
    sequences,
    total_variation,
    transition,
)
from torch import nn

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.process import SCHEDULES, AbsorbingProcess

S, D = 2, 2
MASK = S
LAW = torch.tensor([0.4, 0.05, 0.15, 0.4], dtype=torch.float64)
EQUAL = torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=torch.float64)  # both positions alike: the hardest law for a product


# --- the objective's expectation is its definition ---------------------------------------------------------------


def correlation(p, x, open_):
    """A(x) = LME_l sum_d log p_l^d(x^d) - sum_d log pbar^d(x^d), p (L, D, S), over the open positions."""
    picked = torch.stack([p[:, d, x[d]] for d in open_], 1)
    return picked.prod(1).mean().log() - picked.mean(0).log().sum()


def kl(p, q):
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


def expected_parts(process, teacher, table, t, u, a):
    """Every part of the objective in expectation over x_0, x_t, latents, teacher steps and samples; L = 2 latents."""
    clean, noised = sequences(S, D), sequences(S + 1, D)
    m, latents = process.mask_prob(t).item(), range(table.shape[0])
    probs = table.double().softmax(-1)
    parts = dict.fromkeys(
        ("distillation", "correlation_data", "marginal_data", "correlation_consistency", "marginal_consistency"), 0.0
    )
    step = transition(process, teacher, D, t, u)
    for at, x_t in enumerate(noised):
        open_ = [d for d in range(D) if x_t[d] == MASK]
        fits = ((x_t == clean) | (x_t == MASK)).all(1)
        chance = LAW * fits * m ** len(open_) * (1 - m) ** (D - len(open_))  # P(x_0, x_t)
        psi = teacher.table[at].softmax(-1)

        def single(x_u, which, x_t=x_t):
            """g^d for one target: certain where x_u is clean."""
            g = probs[which, index(x_u, S + 1)].clone()
            for d in range(D):
                if x_u[d] != MASK:
                    g[d] = torch.eye(S)[x_u[d]]
            return g

        targets = [
            (step[at, i] / len(latents), single(noised[i], which))
            for i in step[at].nonzero().flatten().tolist()
            for which in latents
        ]
        for pair in itertools.product(latents, repeat=2):
            p = probs[list(pair), at]
            pbar, weight = p.mean(0), chance.sum() / len(latents) ** 2
            gain = torch.stack([correlation(p, x, open_) for x in clean]) if open_ else torch.zeros(len(clean))
            parts["distillation"] += weight * sum(kl(psi[d], p[l, d]) for l in (0, 1) for d in open_) / 2  # noqa: E741
            parts["correlation_data"] -= a * (chance * gain).sum() / len(latents) ** 2
            parts["marginal_data"] += weight * sum(kl(psi[d], pbar[d]) for d in open_)
            for chance_1, g_1 in targets:
                parts["correlation_consistency"] -= weight * chance_1 * (product_law(g_1) * gain).sum()
                for chance_2, g_2 in targets:
                    both = weight * chance_1 * chance_2
                    parts["marginal_consistency"] += both * sum(kl((g_1[d] + g_2[d]) / 2, pbar[d]) for d in open_)
    return {name: float(value) for name, value in parts.items()}


@pytest.mark.parametrize(("t", "u", "schedule"), [(0.8, 0.4, "linear"), (0.3, 0.1, "arccos")])
def test_expectation_of_the_objective_is_its_definition(t, u, schedule):
    """200,000 keys against the enumeration: every part within 4 standard errors, these within 2 % of the part."""
    process, teacher = AbsorbingProcess(S, schedule), ExactTeacher(LAW, S, D)
    table = 0.5 * torch.randn(2, (S + 1) ** D, D, S, generator=torch.Generator().manual_seed(3))
    table[0, -1, :, 0] += 1.5  # from all masks one latent likes 0, 0 and the other 1, 1: correlation to speak of
    table[1, -1, :, 1] += 1.5
    objective = Di4CObjective(num_latents=2, data=0.5, data_law="linear", window=0.5, diagnostics=False)
    exact = expected_parts(process, teacher, table, t, u, a=0.5 * t)
    inside = t <= objective.window
    for name in list(exact):
        if name.endswith("consistency" if inside else "distillation"):
            exact[name] = 0.0

    n = 200_000
    keys = random.keys(11, n)
    x_0 = sequences(S, D)[ops.sample_categorical(LAW.log().expand(n, -1).float(), random.fold_in(keys, 99))]
    times = torch.full((n,), t, dtype=torch.float64), torch.full((n,), u, dtype=torch.float64)
    with torch.no_grad():
        parts = objective(
            TableStudent(table), teacher, process, x_0, keys, latents=finite_latents(2), times=times
        ).per_sample
    for name, expected in exact.items():
        value = parts[name].double()
        error = value.std().item() / n**0.5
        print(f"{name}: {value.mean():.5f} +- {error:.5f}, by enumeration {expected:.5f}")
        assert abs(value.mean().item() - expected) <= 4 * error + 1e-7, name
        assert error <= 0.02 * abs(expected), name


# --- the control variate -------------------------------------------------------------------------------------------


def both_estimators(scale, seed):
    """Values and gradients of L_consis, with the control variate and without, for every outcome of the samples.

    K = 2 targets g_j, L = 3 latents, one x_t with both positions open. Returns per form: values (N,), gradients
    (N, ...), over all N outcomes of (xhat_1, xhat_2), their chances (N,), and the entropy of gbar.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, 1, D, 3, generator=generator, dtype=torch.float64)
    goal = base + 0.3 * torch.randn(1, 2, D, 3, generator=generator, dtype=torch.float64)
    goal[0, 1, 1] = torch.tensor([-torch.inf, 0, -torch.inf])  # the teacher's step has shown this one
    logits = base + scale * torch.randn(1, 3, D, 3, generator=generator, dtype=torch.float64)
    every = sequences(3, D)
    law = [product_law(goal[0, j].softmax(-1)) for j in range(2)]
    chance = (law[0][:, None] * law[1]).flatten()
    forms = {"cv": ([], []), "plain": ([], [])}
    for x_1, x_2 in itertools.product(every, repeat=2):
        x = logits.clone().requires_grad_()
        joint, gain = ops.mixture_log_prob(x, torch.stack([x_1, x_2])[None], None)
        loss = {"cv": -gain.mean() + ops.mixture_kl(goal, x, None)[0], "plain": -joint.mean()}
        for name, (values, gradients) in forms.items():
            values.append(loss[name].detach())
            gradients.append(torch.autograd.grad(loss[name], x, retain_graph=True)[0].flatten())
    gbar = goal.softmax(-1).mean(1)[0]
    entropy = -torch.where(gbar > 0, gbar * gbar.log(), 0.0).sum()
    return {name: (torch.stack(v), torch.stack(g)) for name, (v, g) in forms.items()}, chance, entropy


@pytest.mark.parametrize(("scale", "seed"), [(0.05, 0), (0.3, 1), (1.0, 2)])
def test_control_variate_leaves_the_objective_unbiased_and_quieter(scale, seed):
    """Over all outcomes of xhat: equal mean gradients, means that differ by the constant H(gbar), less variance."""
    forms, chance, entropy = both_estimators(scale, seed)
    mean = {name: (chance @ values, chance @ gradients) for name, (values, gradients) in forms.items()}
    assert chance.sum() == pytest.approx(1, abs=1e-12)
    assert mean["cv"][0].item() == pytest.approx((mean["plain"][0] - entropy).item(), abs=1e-10)
    assert torch.allclose(mean["cv"][1], mean["plain"][1], atol=1e-10)
    assert mean["cv"][1].abs().max() > 1e-3  # there is something to be unbiased about
    noise = {
        name: (chance @ (values - mean[name][0]) ** 2, chance @ ((gradients - mean[name][1]) ** 2).sum(1))
        for name, (values, gradients) in forms.items()
    }
    ratio = [(noise["cv"][i] / noise["plain"][i]).item() for i in range(2)]
    print(f"latents apart by {scale}: variance of the value x {ratio[0]:.4f}, of the gradient x {ratio[1]:.4f}")
    assert max(ratio) < (0.05 if scale < 0.1 else 0.9)


def test_control_variate_through_the_objective():
    """The same, through the whole objective: gradients of both forms agree in the mean over keys."""
    process, teacher, n = AbsorbingProcess(S), ExactTeacher(LAW, S, D), 200_000
    table = torch.randn(2, (S + 1) ** D, D, S, generator=torch.Generator().manual_seed(5))
    keys = random.keys(2, n)
    x_0 = torch.zeros(n, D, dtype=torch.int64)
    times = torch.full((n,), 1.0, dtype=torch.float64), torch.full((n,), 0.5, dtype=torch.float64)
    gradient = {}
    for control_variate in (True, False):
        student = TableStudent(table.clone())
        objective = Di4CObjective(
            num_latents=2, data=0, data_marginal=0, control_variate=control_variate, diagnostics=False
        )
        objective(student, teacher, process, x_0, keys, latents=finite_latents(2), times=times)["loss"].backward()
        gradient[control_variate] = student.table.grad
    assert gradient[True].abs().max() > 0.02
    assert torch.allclose(gradient[True], gradient[False], atol=2e-3)  # standard error about 5e-4


# --- what the parts say ----------------------------------------------------------------------------------------------


def test_a_product_model_has_no_correlation_term():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 1, 5, 3, generator=generator).expand(8, 6, 5, 3)
    x = torch.randint(3, (8, 4, 5), generator=generator)
    joint, gain = ops.mixture_log_prob(logits, x, None)
    assert gain.abs().max() < 1e-6 and (joint < -1).all()

    table = torch.randn(1, (S + 1) ** D, D, S, generator=generator).repeat(4, 1, 1, 1)
    keys = random.keys(0, 64)
    student, x_0 = TableStudent(table), torch.zeros(64, D, dtype=torch.int64)
    parts = Di4CObjective(num_latents=4)(
        student, ExactTeacher(LAW, S, D), AbsorbingProcess(S), x_0, keys, latents=finite_latents(4)
    )
    for name in ("correlation_data", "correlation_consistency", "gain_data", "latent_information"):
        assert parts[name].abs() < 1e-6, name


def test_a_student_equal_to_its_teacher_feels_no_distillation():
    teacher, keys = ExactTeacher(LAW, S, D), random.keys(0, 256)
    student = TableStudent(teacher.table.float().repeat(3, 1, 1, 1))
    parts = Di4CObjective(num_latents=3, window=0.9, window_share=1.0, data=0)(
        student, teacher, AbsorbingProcess(S), torch.zeros(256, D, dtype=torch.int64), keys, latents=finite_latents(3)
    )
    parts["loss"].backward()
    assert parts["distillation"].abs() < 1e-6 and student.table.grad.abs().max() < 1e-7


def true_posterior(law, process, t, s):
    """p(x_s | x_t) with all its correlations: the coins fall independently, the states come from p(x_0 | x_t)."""
    noised, clean = sequences(S + 1, D), sequences(S, D)
    unmask = process.unmask_prob(t, s).item()
    table = torch.zeros(len(noised), len(noised), dtype=torch.float64)
    for i, x_t in enumerate(noised):
        fits = law * ((x_t == clean) | (x_t == MASK)).all(1)
        if fits.sum() == 0:
            table[i, i] = 1  # never visited
            continue
        for x_0, p in zip(clean, fits / fits.sum(), strict=True):
            for coins in itertools.product((0, 1), repeat=int((x_t == MASK).sum())):
                x_s, chance = x_t.clone(), p
                for d, coin in zip((x_t == MASK).nonzero().flatten(), coins, strict=True):
                    x_s[d] = x_0[d] if coin else MASK
                    chance = chance * (unmask if coin else 1 - unmask)
                table[i, index(x_s, S + 1)] += chance
    return table


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_composition(schedule):
    """p_{0|u} o p_{u|t} = p_{0|t} for the true posteriors; the teacher's composition approaches it as 1/N."""
    process, teacher = AbsorbingProcess(S, schedule), ExactTeacher(LAW, S, D)
    whole = true_posterior(LAW, process, 0.9, 0.0)
    composed = true_posterior(LAW, process, 0.9, 0.3) @ true_posterior(LAW, process, 0.3, 0.0)
    assert torch.allclose(composed, whole, atol=1e-12)

    start, distances = torch.eye(len(whole), dtype=torch.float64)[-1], []
    target = start @ true_posterior(LAW, process, 1.0, 0.0)
    for num_steps in (1, 32, 64, 128):
        grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
        law = start
        for t, s in itertools.pairwise(grid):
            law = law @ transition(process, teacher, D, t, s)
        distances.append(total_variation(law, target))
    assert distances[0] > 0.2
    assert distances[1] / distances[2] == pytest.approx(2, rel=0.1)
    assert distances[2] / distances[3] == pytest.approx(2, rel=0.1)


# --- what it is for: one step that keeps the correlations -------------------------------------------------------------


class Network(nn.Module):
    """A small mixture student; with `latent_dim` 0 it has no use for its latents: a product."""

    def __init__(self, latent_dim):
        super().__init__()
        self.latent_dim = latent_dim
        self.net = nn.Sequential(nn.Linear((S + 1) * D + latent_dim, 64), nn.SiLU(), nn.Linear(64, D * S))

    def forward(self, x_t, t, latents):
        x = nn.functional.one_hot(x_t, S + 1).flatten(-2).float()
        if latents.ndim > x.ndim:
            x = x[:, None].expand(-1, latents.shape[1], -1)
        return self.net(torch.cat([x, latents[..., : self.latent_dim]], -1)).unflatten(-1, (D, S))


def one_step_law(student, n=20_000):
    """E over latents of the product law of one step from all masks."""
    with torch.no_grad():
        p = student(torch.full((n, D), MASK), torch.ones(n), random.normal(random.keys(77, n), 1).float())
    p = p.double().softmax(-1)
    return (p[:, 0, :, None] * p[:, 1, None, :]).flatten(1).mean(0)


def distilled(latent_dim, steps):
    torch.manual_seed(0)
    process, teacher, student = AbsorbingProcess(S), ExactTeacher(EQUAL, S, D), Network(latent_dim)
    objective = Di4CObjective(
        num_latents=16, num_targets=8, step_min=0.1, step_max=0.2, full_noise_share=0.2, diagnostics=False
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    keys = random.keys(0, 32)
    x_0 = torch.tensor([[0, 0], [1, 1]]).repeat(16, 1)
    draw = lambda keys, n: random.normal(keys, n).float()[..., None]  # noqa: E731
    for step in range(steps):
        loss = objective(student, teacher, process, x_0, random.fold_in(keys, step), latents=draw)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def test_a_mixture_represents_what_no_product_can():
    """Both tokens alike: the best product stays sqrt(2) - 1 away in total variation, the mixture comes close."""
    grid = torch.linspace(0, 1, 501, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    laws = torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)], -1)
    best = 0.5 * (laws - EQUAL).abs().sum(-1).min().item()
    assert best == pytest.approx(2**0.5 - 1, abs=1e-3)

    product = total_variation(one_step_law(distilled(0, steps=100)), EQUAL)
    mixture = total_variation(one_step_law(distilled(1, steps=600)), EQUAL)
    print(f"total variation in one step: best product {best:.3f}, product {product:.3f}, mixture {mixture:.3f}")
    assert product > best - 1e-3
    assert mixture < 0.25


def test_the_plain_loop_shows_it(capsys):
    """python/plain_loop.py, as a reader would run it: four states, two equal tokens, one step."""
    script = Path(__file__).parents[1] / "python" / "plain_loop.py"
    runpy.run_path(str(script), run_name="__main__")
    said = dict(re.findall(r"(teacher|student): both tokens equal in ([0-9.]+)", capsys.readouterr().out))
    assert float(said["teacher"]) < 0.3  # 1 in 4 by chance
    assert float(said["student"]) > 0.6
