"""The bound of a few steps on mixtures small enough to count every path."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.likelihood import mean_likelihood_bound
from di4c_ext.metrics.mixture_bound import FewSteps, few_step_bound, few_step_bounds
from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.ops import Hidden
from di4c_ext.process import AbsorbingProcess
from di4c_ext.systems import latents_of, process_of

S, D, L = 2, 3, 2
STATES = torch.cartesian_prod(*[torch.arange(S)] * D)
PROCESS = AbsorbingProcess(S)


def mixture(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
    """Logits (B, L, D, S) that hang on the context, the position and which of two latents it is."""
    seen = torch.where(x_t == S, 0.3, x_t.float() - 0.5)
    around = seen @ torch.tensor([[0.0, 1.1, -0.7], [0.4, 0.0, 0.9], [1.3, -0.2, 0.0]])
    sign = 2 * latents - 1  # (B, L, 1)
    lean = around[:, None] + sign * torch.tensor([1.5, 1.2, -0.8])
    return torch.stack([torch.zeros_like(lean), lean], -1)


def teacher(x_t: Tensor, t: Tensor) -> Tensor:
    return mixture(x_t, t, torch.full((len(x_t), 1, 1), 0.5))[:, 0]


def both(keys: Tensor, count: int) -> Tensor:
    return torch.arange(count).float()[None, :, None].expand(len(keys), count, 1)


def exact(num_steps: int) -> Tensor:
    """p_k of all STATES for the mixture of both latents, alike in weight, by counting every path of coins."""
    law: dict[tuple[int, ...], float] = {(S,) * D: 1.0}
    for i in range(num_steps):
        unmask = 1 / (num_steps - i)  # of the linear schedule
        following: dict[tuple[int, ...], float] = {}
        for state, mass in law.items():
            x_t = torch.tensor([state])
            p = mixture(x_t, torch.ones(1), both(torch.zeros(1), L)).double().softmax(-1)[0]  # (L, D, S)
            masked = [d for d in range(D) if state[d] == S]
            for choice in product(*[(*range(S), S) if d in masked else (state[d],) for d in range(D)]):
                opened = [d for d in masked if choice[d] != S]
                coins = unmask ** len(opened) * (1 - unmask) ** (len(masked) - len(opened))
                drawn = sum(math.prod(float(p[j, d, choice[d]]) for d in opened) for j in range(L)) / L
                if coins:
                    following[choice] = following.get(choice, 0.0) + mass * coins * drawn
        law = following
    return torch.tensor([law[tuple(state)] for state in STATES.tolist()], dtype=torch.float64)


def test_one_step_is_the_likelihood() -> None:
    found = few_step_bound(mixture, PROCESS, STATES, random.keys(0, len(STATES)), FewSteps(1, both, L))
    assert float(exact(1).sum()) == pytest.approx(1.0)
    assert torch.allclose(found, -exact(1).log(), atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 3])
def test_more_steps_are_bounded(num_steps: int) -> None:
    draws = 4000
    keys, x_0 = random.keys(1, draws * len(STATES)), STATES.repeat_interleave(draws, 0)
    found = few_step_bound(mixture, PROCESS, x_0, keys, FewSteps(num_steps, both, L))
    found = found.view(len(STATES), draws)
    law = exact(num_steps)
    assert float(law.sum()) == pytest.approx(1.0)
    margin = found.mean(1) + law.log()
    assert (margin > -4 * found.std(1) / draws**0.5).all() and float(margin.max()) < 0.2, margin


def test_fewer_latents_bound_from_further_above() -> None:
    """Latents drawn one by one: with 1 the mixture is a product of its mean latent in the logarithm."""

    def drawn(keys: Tensor, count: int) -> Tensor:
        return (random.uniform(keys, count) < 0.5).float()[..., None]

    keys, x_0 = random.keys(2, 4000 * len(STATES)), STATES.repeat_interleave(4000, 0)
    means = [float(few_step_bound(mixture, PROCESS, x_0, keys, FewSteps(1, drawn, n)).mean()) for n in (1, 4, 32)]
    true = float(-exact(1).log().mean())
    assert means[0] > means[1] > means[2] > true and means[2] - true < 0.05


def test_a_teacher_of_many_steps_meets_its_own_bound() -> None:
    """With steps too short to unmask two positions at once what is left is the bound of `metrics.likelihood`."""
    keys = random.keys(3, 64 * len(STATES))
    x_0 = STATES.repeat(64, 1)
    slow = float(few_step_bounds(teacher, PROCESS, x_0, keys, FewSteps(200), batch_size=1000).mean())
    assert slow == pytest.approx(mean_likelihood_bound(teacher, PROCESS, x_0, keys, draws=16), abs=0.05)
    one = float(few_step_bounds(teacher, PROCESS, x_0, keys, FewSteps(1)).mean())
    at_once = teacher(torch.full((1, D), S), torch.ones(1)).log_softmax(-1)[0].double()
    wanted = -at_once[torch.arange(D), STATES].sum(1).mean()
    assert one == pytest.approx(float(wanted), abs=1e-5)


def test_some_of_the_terms_stand_for_all() -> None:
    """One step in each of 3 runs of 8 steps: the same mean, at less than half the evaluations."""
    asked: list[Tensor] = []

    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return teacher(x_t, t)

    keys, x_0 = random.keys(5, 2000 * len(STATES)), STATES.repeat_interleave(2000, 0)
    whole = few_step_bound(teacher, PROCESS, x_0, keys, FewSteps(8))
    some = few_step_bound(counting, PROCESS, x_0, keys, FewSteps(8, num_terms=3))
    error = float((some - whole).std()) / len(keys) ** 0.5
    assert abs(float(some.mean() - whole.mean())) < 4 * error and error < 0.02 * float(whole.mean())
    assert [sorted({round(8 * float(time)) for time in times}) for times in asked] == [[7, 8], [4, 5, 6], [1, 2, 3]]


def test_a_mixture_that_tells_its_own_sum_needs_no_latents() -> None:
    def told(x_t: Tensor, t: Tensor, x_s: Tensor) -> Tensor:
        log_p = mixture(x_t, t, both(x_t, L)).log_softmax(-1)  # (B, L, D, S)
        known = log_p.gather(-1, x_s.clamp(max=S - 1)[:, None, :, None].expand(-1, L, -1, -1))[..., 0]
        return (known * ((x_t == S) & (x_s < S))[:, None]).sum(-1).logsumexp(1) - math.log(L)

    keys = random.keys(8, len(STATES))
    sampled, exactly = FewSteps(3, both, L), FewSteps(3, log_prob=told)
    found = [few_step_bound(mixture, PROCESS, STATES, keys, steps) for steps in (sampled, exactly)]
    assert torch.allclose(*found, atol=1e-5)


def test_a_chains_student_is_bounded_exactly() -> None:
    """What its own sum gives many drawn latents near from above, and few of them lie far above."""
    torch.manual_seed(0)
    config = DiTConfig(vocab_size=5, mask_id=4, length=6, hidden_size=8, num_layers=1, num_heads=2, cond_dim=4)
    chain = {"latent_form": "chain", "latent_states": 3, "latent_hidden_size": 16}
    model: Any = DiTDenoiser.from_teacher(DiTDenoiser(config).eval(), **chain).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    x_0, keys = torch.randint(4, (200, 6)), random.keys(9, 200)
    process = process_of(config)
    exactly = FewSteps.of(model, 2)
    assert exactly.latents is None and FewSteps.of(DiTDenoiser(config), 2) == FewSteps(2)
    drawn = [FewSteps(2, latents_of(model.config), n) for n in (1, 4, 400)]
    found = [float(few_step_bounds(model, process, x_0, keys, steps).mean()) for steps in (*drawn, exactly)]
    assert found[0] > found[1] > found[2] > found[3] - 0.02 and found[2] == pytest.approx(found[3], abs=0.1), found


def test_all_is_masked_at_first_whatever_the_schedule() -> None:
    """log_linear leaves some of the data at t = 1, which no sampler is given."""
    log_linear = AbsorbingProcess(S, "log_linear")
    keys = random.keys(6, 20_000)
    masked: list[float] = []

    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        masked.append(float((x_t == S).double().mean()))
        return teacher(x_t, t)

    few_step_bound(counting, log_linear, STATES[:1].expand(20_000, -1), keys, FewSteps(2))
    assert masked[0] == 1.0 and masked[1] == pytest.approx(0.5, abs=0.01)


def test_hidden_states_are_bounded_like_their_logits() -> None:
    g = torch.Generator().manual_seed(0)
    states, head = torch.randn(S + 1, 4, generator=g), torch.randn(S, 4, generator=g)
    keys = random.keys(7, len(STATES))

    def hidden(x_t: Tensor, t: Tensor, latents: Tensor | None = None) -> Hidden:
        told = states[x_t]
        return Hidden(told if latents is None else told[:, None] * (1 + latents[..., None]), head)

    for steps in (FewSteps(2), FewSteps(2, both, L)):
        plain = few_step_bound(lambda *x, **told: hidden(*x, **told).logits(), PROCESS, STATES, keys, steps)
        assert torch.allclose(few_step_bound(hidden, PROCESS, STATES, keys, steps), plain, atol=1e-5)


def test_depends_on_the_keys_alone() -> None:
    keys = random.keys(4, len(STATES))
    steps = FewSteps(3, both, L, num_terms=2)
    whole = few_step_bound(mixture, PROCESS, STATES, keys, steps)
    parts = [few_step_bound(mixture, PROCESS, STATES[i : i + 1], keys[i : i + 1], steps) for i in range(len(STATES))]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)
    each = few_step_bounds(mixture, PROCESS, STATES, keys, steps, draws=2, batch_size=3)
    drawn = [few_step_bound(mixture, PROCESS, STATES, random.fold_in(keys, draw), steps) for draw in range(2)]
    assert torch.allclose(each, sum(drawn) / 2, atol=1e-6)
    for told, message in (
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 1, "num_latents": 0}, "num_latents must be at least 1, got 0"),
        ({"num_steps": 1, "num_terms": 0}, "num_terms must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FewSteps(**told)
    with pytest.raises(ValueError, match="8 samples and 0 draws"):
        few_step_bounds(mixture, PROCESS, STATES, keys, steps, draws=0)
