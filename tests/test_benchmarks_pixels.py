"""The peers of the pixel benchmarks compute what ours compute, so that times and memory may be compared."""

from __future__ import annotations

import copy

import pytest
import torch
from programs import benchmark
from torch.profiler import ProfilerActivity, profile

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.process import GaussianProcess

bench = benchmark("bench_pixels")
B, L, D, S = 2, 3, 48, 32
PROCESS = GaussianProcess(S, rate_sigma=3.0, q_sigma=64.0, time_base=1.0)


@pytest.fixture
def recorded(monkeypatch):
    """One step of ours: its setting, its parts, and what it drew, in the order in which the published way asks."""
    s = bench.setting(B, L, torch.device("cpu"), D, PROCESS)
    drawn, seen = [], {"student": [], "teacher": []}
    sample = ops.sample_categorical

    def sampling(*args, **more):
        drawn.append(sample(*args, **more))
        return drawn[-1]

    def watched(name):
        network = getattr(s, name)

        def call(x, t, latents=None):
            seen[name].append((x, t, latents))
            return network(x, t, latents)

        return call

    monkeypatch.setattr(ops, "sample_categorical", sampling)
    objective = Di4CObjective.preset("pixels", num_latents=L, distillation_rows=L)
    times = objective.draw_times(random.keys(3, B))
    taus = objective.draw_row_times(random.keys(4, B)).flatten()
    monkeypatch.setattr(Di4CObjective, "draw_row_times", lambda self, keys: taus.view(B, L))
    parts = objective(
        watched("student"), watched("teacher"), s.process, s.x_0, random.keys(5, B), latents=bench.latents, times=times
    )
    (x_u, _, at_u), (x_t, _, at_t), (x_tau, _, at_tau) = seen["student"]
    x_0, targets = drawn
    chances = bench.published.Chances(*times, taus, at_t.flatten(0, 1), at_u.flatten(0, 1), at_tau)
    return s, parts, chances, [x_t, x_tau, x_0.flatten(0, 1), x_u.flatten(0, 1), targets]


def test_the_published_step_gives_our_loss_from_our_draws(recorded):
    """In float64, for the published head loses digits where a state is improbable (1e-2 of a sample's 60 nats here)."""
    s, parts, chances, draws = recorded
    given = iter(draws)
    student, teacher = (copy.deepcopy(network).double() for network in (s.student, s.teacher))
    terms = bench.published.terms(student, teacher, s.transitions, s.x_0, chances, lambda weights: next(given))
    assert next(given, None) is None
    found = parts.per_sample
    expected = {
        "distillation": found["distillation"],
        "data": found["correlation_data"] + found["marginal_data"],
        "consistency": found["correlation_consistency"] + found["marginal_consistency"],
    }
    for name, value in expected.items():
        theirs = getattr(terms, name).detach().float()
        torch.testing.assert_close(theirs, value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    theirs = torch.autograd.grad(sum(terms).mean(), list(student.parameters()))
    values = torch.autograd.grad(parts["loss"], list(s.student.parameters()))
    for their, value in zip(theirs, values, strict=True):
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(their.float(), value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_the_published_laws_are_the_process():
    """Of the noised state and of the step back, position by position."""
    x_0, x_t = torch.arange(2 * S).view(2, S) % S, torch.full((2, S), S // 3)
    t, s = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([0.25, 0.6], dtype=torch.float64)
    transitions = bench.published.Transitions(PROCESS.rate, PROCESS.interval, torch.device("cpu"))
    sample = torch.arange(2)[:, None]
    torch.testing.assert_close(
        transitions.corrupted(x_0, t).double(), PROCESS.transition(t)[sample, x_0], rtol=0, atol=1e-6
    )
    law = PROCESS.transition(t, s).mT[sample, x_t] * PROCESS.transition(s)[sample, x_0]
    law = law / law.sum(-1, keepdim=True)
    torch.testing.assert_close(transitions.posterior(x_t, x_0, t, s).double(), law, rtol=0, atol=2e-5)
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 0.0, 3.0]).expand(2, 20_000, 3)
    drawn = bench.published.draw(weights)
    assert (
        drawn.shape == (2, 20_000)
        and (drawn != 1).all()
        and (drawn == 2).double().mean() == pytest.approx(0.75, abs=0.01)
    )


def largest(call):
    """Bytes of the largest piece of memory that torch is asked for, within the ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    return max(e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]")


def test_no_tensor_of_all_states_at_the_published_size():
    """Forward and backward of one image: not even one byte to each of its (L, D, S) numbers; the published way has
    four to each, though of fewer latents."""
    device = torch.device("cpu")
    found = {}
    for way, num_latents in ((bench.ours, 16), (bench.published_way, 2)):
        s = bench.setting(1, num_latents, device)
        found[way] = largest(lambda way=way, s=s: way(s).backward()) / (num_latents * bench.LENGTH * bench.STATES)
    assert found[bench.ours] < 1 and found[bench.published_way] >= 4
