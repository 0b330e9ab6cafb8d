"""The definitions themselves: exact identities, autograd against finite differences, the written-out gradients."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import DEFINITIONS, OPS, make, value_and_grad
from torch.autograd import gradcheck

from di4c_ext.ops import reference
from di4c_ext.ops.reference.philox import exceeds, multiply_high
from di4c_ext.ops.reference.sampling import first_above


def _float64(states: int, **options):
    return make(states, batch=2, components=3, length=3, **options).to(dtype=torch.float64)


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_gradients(name):
    """gradcheck of the definition (autograd) and of the op on float64 (the written-out gradient)."""
    for weighted in (True, False):
        i = _float64(4, weighted=weighted)
        x = i.logits.requires_grad_()
        for calls in (DEFINITIONS, OPS):
            assert gradcheck(lambda x, call=calls[name], i=i: call(replace(i, logits=x)), (x,))


def test_joint_is_a_distribution():
    """Over all S^D sequences the probabilities sum to 1, and to the mean of the components' products."""
    logits = _float64(3).logits
    tokens = torch.tensor(list(itertools.product(range(3), repeat=3)))
    joint, correlation = reference.mixture_log_prob(logits, tokens.expand(2, -1, -1), None)
    torch.testing.assert_close(joint.exp().sum(1), torch.ones(2, dtype=torch.float64))
    p = torch.softmax(logits, -1)
    direct = torch.stack([math.prod(p[:, :, d, t[d]] for d in range(3)).mean(1) for t in tokens], dim=1)
    torch.testing.assert_close(joint.exp(), direct)
    marginals = torch.stack([math.prod(p.mean(1)[:, d, t[d]] for d in range(3)) for t in tokens], dim=1)
    torch.testing.assert_close(correlation, direct.log() - marginals.log())
    # Its mean under the mixture is the total correlation, a divergence: never negative.
    assert ((direct * correlation).sum(1) > 0).all()


def test_divergences_by_their_formulas():
    i = _float64(6, weighted=False)
    t, p = torch.softmax(i.target, -1)[:, None], torch.softmax(i.logits, -1)
    m = (t + p) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum((-1, -2))

    expected = [kl(t, p), kl(p, t), (kl(t, m) + kl(p, m)) / 2, 0.5 * (t - p).abs().sum((-1, -2))]
    for kind, value in enumerate(expected):
        torch.testing.assert_close(reference.row_loss(kind, i.target, None, i.logits, None), value)
    tokens = i.tokens[:, 0]
    picked = p.gather(-1, tokens[:, None, :, None].expand(-1, 3, -1, -1))[..., 0]
    torch.testing.assert_close(reference.row_loss(4, None, tokens, i.logits, None), -picked.log().sum(-1))
    tbar = torch.softmax(i.targets, -1).mean(1)
    torch.testing.assert_close(reference.mixture_kl(i.targets, i.logits, None), kl(tbar, p.mean(1)))


def test_objective_by_its_formulas():
    """Sample 0 inside, sample 1 outside."""
    i = _float64(6)
    w, t, p = i.weight, torch.softmax(i.target, -1), torch.softmax(i.logits, -1)
    gbar, pbar = torch.softmax(i.targets, -1).mean(1), p.mean(1)
    inside = torch.tensor([True, False])

    def kl(a, b, b_th):
        return (w[b_th] * (a * (a / b).log()).sum(-1)).sum()

    def log_prob(x, b_th):
        a = p[b_th].gather(-1, x[None, :, None].expand(3, -1, -1))[..., 0].log()
        centred = a - a.exp().mean(0).log()
        return [(w[b_th] * v).sum(-1).exp().mean().log() for v in (a, centred)]

    got = reference.mixture_objective(
        i.logits,
        teacher=i.target,
        data=i.tokens[:, 1],
        samples=i.tokens,
        target=i.targets,
        weight=w,
        inside=inside,
        information=True,
    )
    for b in range(2):
        expected = {
            "distillation": sum(kl(t[b], p[b, n], b) for n in range(3)) / 3 if b == 0 else torch.zeros(()),
            "marginal_teacher": kl(t[b], pbar[b], b),
            "marginal_target": kl(gbar[b], pbar[b], b) if b == 1 else torch.zeros(()),
            "joint_data": log_prob(i.tokens[b, 1], b)[0],
            "correlation_data": log_prob(i.tokens[b, 1], b)[1],
            "joint_samples": torch.stack([log_prob(x, b)[0] for x in i.tokens[b]]),
            "correlation_samples": torch.stack([log_prob(x, b)[1] for x in i.tokens[b]]),
            "information": kl(p[b, 0], pbar[b], b),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(got, name)[b], value.double(), msg=lambda m, name=name: f"{name}: {m}")


def test_weights_scale_positions():
    i = _float64(5)
    for name, call in DEFINITIONS.items():
        alone = [call(replace(i, weight=torch.eye(3, dtype=torch.float64)[d].expand(2, 3)))[0] for d in range(3)]
        whole = call(i)[0]
        if name != "mixture_log_prob":
            weight = i.weight.T.view(3, 2, *[1] * (whole.dim() - 1))
            torch.testing.assert_close((torch.stack(alone) * weight).sum(0), whole)
    one = replace(i, logits=i.logits[:, :1])  # with one component joint is linear in the weights too
    doubled = replace(one, weight=2 * one.weight)
    torch.testing.assert_close(DEFINITIONS["mixture_log_prob"](doubled)[0], 2 * DEFINITIONS["mixture_log_prob"](one)[0])


def test_exponential():
    """The float32 exponential of the kernels: 0.7 ulp over its range, 0 below, NaN kept."""
    x = torch.cat([torch.linspace(-86.99, 0, 200_001), -torch.logspace(-8, 1, 1000)])
    exact = torch.exp(x.double())
    assert ((reference.exp_nonpos(x).double() - exact) / exact).abs().max() < 8.5e-8
    edge = reference.exp_nonpos(torch.tensor([0.0, -87.1, -math.inf, math.nan]))
    assert edge[:3].tolist() == [1.0, 0.0, 0.0] and edge[3].isnan()


def test_high_product():
    """floor(a b / 2^64) of unsigned words, against Python's integers."""
    words = reference.random_bits(torch.tensor([1, 2]), 500, 0).reshape(2, -1)
    words = torch.cat([words, torch.tensor([[0, -1, -1, 1 << 62, -(1 << 63)], [-1, -1, 1, 3, -(1 << 63)]])], 1)
    a, b = (w.tolist() for w in words)
    unsigned = [(x % 2**64, y % 2**64) for x, y in zip(a, b, strict=True)]
    assert [v % 2**64 for v in multiply_high(*words).tolist()] == [x * y >> 64 for x, y in unsigned]
    assert exceeds(*words).tolist() == [x > y for x, y in unsigned]


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_classes_without_mass_are_as_if_they_were_not_there(name):
    """-inf on both sides: value and gradient are those of the rows without these classes."""
    i = _float64(9)
    keep = torch.tensor([0, 1, 4, 5, 8])
    spread = {
        field: torch.full((*getattr(i, field).shape[:-1], 9), -math.inf, dtype=torch.float64)
        for field in ("logits", "target", "targets")
    }
    for field, full in spread.items():
        full[..., keep] = getattr(i, field)[..., keep]
    index = i.tokens % 5
    for calls in (DEFINITIONS, OPS):
        few = replace(i, **{f: getattr(i, f)[..., keep] for f in spread}, tokens=index)
        (values, grad), (wide_values, wide_grad) = (
            value_and_grad(calls[name], x) for x in (few, replace(i, **spread, tokens=keep[index]))
        )
        torch.testing.assert_close(wide_values, values)
        torch.testing.assert_close(wide_grad[..., keep], grad)
        assert (wide_grad[..., [2, 3, 6, 7]] == 0).all()


def test_search():
    """The first inclusive prefix sum above the target: classes of mass 0 are passed over, also by a target of 0."""
    prefix = torch.tensor([0, 0, 5, 5, 9, 9, 9, -(1 << 63)])[None]  # the last is 2^63 unsigned
    target = torch.tensor([0, 4, 5, 8, 9, (1 << 63) - 1])[None]
    assert first_above(prefix, target, torch.zeros_like(target), 8).tolist() == [[2, 2, 4, 4, 7, 7]]
