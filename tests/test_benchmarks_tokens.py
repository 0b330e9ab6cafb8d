"""The peers of the image-token benchmarks compute what ours compute, so that times and memory may be compared."""

from __future__ import annotations

import pytest
import torch
from programs import benchmark
from torch.profiler import ProfilerActivity, profile

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import TokenConfig, TokenDenoiser
from di4c_ext.process import ConfidenceProcess
from di4c_ext.sampler import reveal_counts, sample_confidence

SMALL = {
    **{"num_codes": 6, "num_classes": 3, "grid": [2, 4], "hidden_size": 8, "num_layers": 2, "num_heads": 2},
    **{"mlp_size": 16, "dropout": 0.0, "attention_dropout": 0.0, "latent_embed_dim": 4, "latent_hidden_size": 8},
}
bench = benchmark("bench_tokens")
B, L, D, S, MASK = 3, 4, 8, 7, 6


@pytest.fixture(scope="module")
def networks():
    """Teacher and student in float64, whose latent says something."""
    torch.manual_seed(0)
    teacher = TokenDenoiser(TokenConfig(**SMALL, embedding_std=0.5))
    with torch.no_grad():
        teacher.net.bias.normal_(std=0.5)
    student = TokenDenoiser.from_teacher(teacher)
    return teacher.double().eval(), student.double()


def test_the_published_network_is_ours(networks):
    x = torch.randint(S, (5, D), generator=torch.Generator().manual_seed(1))
    labels, z = torch.tensor([0, 1, 2, 3, 1]), torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    known = labels.clamp(max=2)
    for model, latents in ((networks[0], None), (networks[1], z)):
        theirs = bench.published.Network(model, False)(x, labels, latents)
        value = model(x, None, latents, labels=known, drop_label=labels == 3)
        assert theirs.shape == (5, D, S)
        torch.testing.assert_close(theirs, value, rtol=1e-9, atol=1e-9)
    bench.published.Network(networks[0], True)(x, labels)
    assert networks[0].training and not networks[0].eval().training


@pytest.mark.parametrize("near", [False, True])
def test_the_published_step_gives_our_loss_from_our_draws(networks, near, monkeypatch):
    teacher, student = networks
    x_0 = torch.randint(MASK, (B, D), generator=torch.Generator().manual_seed(2))
    labels, drawn = torch.tensor([2, 0, 1]), []
    sample = ops.sample_categorical
    monkeypatch.setattr(ops, "sample_categorical", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    seen = {}

    class Watched(ConfidenceProcess):
        def corrupt(self, *args, **more):
            seen["x_t"] = super().corrupt(*args, **more)
            return seen["x_t"]

        def step(self, *args, **more):
            seen["x_u"] = super().step(*args, **more)
            return seen["x_u"]

    asked = []

    def latents(keys, n):
        asked.append(bench.latents(keys, n).double())
        return asked[-1]

    t = torch.tensor([0.02, 0.04, 0.9] if near else [0.3, 0.6, 1.0], dtype=torch.float64)
    parts = Di4CObjective.preset("tokens", num_latents=L)(
        student, teacher, Watched(S, mask_id=MASK), x_0, random.keys(5, B),
        latents=latents, times=(t, (t - 0.05).clamp(min=0)), conditions={"labels": labels},
    )  # fmt: skip
    at_u, at_t = (z.flatten(0, 1) for z in asked)
    chances = bench.published.Chances(1 - t, at_t, at_u)
    draws = bench.published.Draws(
        corrupted=lambda *_: seen["x_t"],
        stepped=lambda *_: seen["x_u"].flatten(0, 1),
        targets=lambda p: drawn[-1].flatten(0, 1),
    )
    ask = bench.published.Network
    theirs = bench.published.terms(
        ask(student, True), ask(student, False), ask(teacher, False), x_0, labels, chances, MASK, draws
    )
    found = parts.per_sample
    expected = {
        "distillation": found["distillation"],
        "data": found["correlation_data"] + found["marginal_data"],
        "consistency": found["correlation_consistency"] + found["marginal_consistency"],
    }
    assert (expected["distillation"] > 0).tolist() == (t <= 0.05).tolist()
    for name, value in expected.items():
        their = getattr(theirs, name).detach().to(value.dtype)
        torch.testing.assert_close(their, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    weights = [p for p in student.parameters()]
    gradients = [torch.autograd.grad(x, weights) for x in (sum(theirs).mean(), parts["loss"])]
    assert max(float(g.abs().max()) for g in gradients[1]) > 1e-3
    for their, value in zip(*gradients, strict=True):
        torch.testing.assert_close(their, value, rtol=1e-4, atol=1e-5)


def test_the_published_step_reveals_what_ours_does(monkeypatch):
    """Of the same tokens, without noise: the same positions, as many."""
    published, process = bench.published, ConfidenceProcess(S, mask_id=MASK, gumbel=0.0)
    x_0 = torch.randint(MASK, (B, D), generator=torch.Generator().manual_seed(3))
    r = torch.tensor([0.0, 0.5, 0.97], dtype=torch.float64)
    monkeypatch.setattr(published, "STEP", 0.4)
    monkeypatch.setattr(published, "GUMBEL", 0.0)
    x_t = process.corrupt(x_0, 1 - r, random.keys(1, B))
    x_t[0] = MASK
    # A token is as good as certain, and how much so is its place's own.
    logits = torch.nn.functional.one_hot(x_0.flip(1), S) * torch.linspace(8, 13, D)[:, None]
    s = (1 - r - 0.4).clamp(min=0)
    torch.manual_seed(0)
    theirs = published.stepped(x_t, logits, r, 2, MASK).view(B, 2, D)
    value = process.step(x_t, logits, 1 - r, s, random.keys(2, B), draws=2)
    assert torch.equal(theirs, value) and 0 < int((value == MASK).sum()) < int((x_t == MASK).sum()) * 2
    share = (
        (published.corrupted(torch.zeros(1, 50_000, dtype=torch.int64), torch.tensor([0.3]), 5) == 5).double().mean()
    )
    assert share.item() == pytest.approx(process.mask_prob(torch.tensor(0.7)).item(), abs=0.01)


def test_the_published_sampler_is_ours():
    """Of a network that leaves next to no choice, guided: the same codes, and as many at every step."""
    torch.manual_seed(0)
    published, seen = bench.published, []
    assert published.counts_of(256, 8) == reveal_counts(256, 8).tolist()
    wanted, sureness = torch.arange(D) % MASK, torch.linspace(6, 9, D)

    def network(x, labels, z):
        seen.append(x)
        own = torch.nn.functional.one_hot(wanted, S) * sureness[:, None]
        return own.expand(len(x), D, S) * torch.where(labels == 3, 0.5, 1.0)[:, None, None]

    labels = torch.tensor([0, 2])
    made = published.sample(network, labels, D, 3, mask_id=MASK, no_class=3, guidance=2.0, gumbel=0.0)
    assert torch.equal(made, wanted.expand(2, D)) and all(x.shape == (4, D) for x in seen)
    states = []
    own = sample_confidence(
        lambda x, t, latents: network(x, labels, latents),
        ConfidenceProcess(S, mask_id=MASK), torch.full((2, D), MASK), 3, random.keys(0, 2),
        latents=lambda key: torch.zeros(2, 1), unconditional=lambda x, t, latents: network(x, labels * 0 + 3, latents),
        guidance=2.0, gumbel=0.0, callback=states.append,
    )  # fmt: skip
    assert torch.equal(own, made)
    masked = [int((x[0] == MASK).sum()) for x in seen[:3]]
    assert (
        masked
        == [int((state["x_t"][0] == MASK).sum()) for state in states]
        == [8, *(8 - reveal_counts(D, 3).cumsum(0)[:-1]).tolist()]
    )


def asked_for(call):
    """Bytes of the largest piece of memory that torch is asked for, and of all that is there at the worst moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    sizes = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    return max(sizes), peak


def test_all_but_the_network_stays_under_its_limit():
    """At the published size: B = 2, L = 32, D = 256, S = 1025, in bytes that torch asks for; the published way needs
    twice as many, here for an eighth of the latents."""
    device = torch.device("cpu")
    state_sized = 4 * 2 * 32 * 256 * 1025
    s = bench.standing_in(2, 32, device)
    largest, peak = asked_for(lambda: bench.ours(s).backward())
    assert largest <= state_sized and 3 * state_sized <= peak < bench.GROWTH_LIMIT
    few = bench.standing_in(2, 4, device)
    _, peak = asked_for(lambda: bench.published_way(few).backward())
    assert peak > 6 * state_sized / 8
