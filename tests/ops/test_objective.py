"""`mixture_objective`: the sum of its parts, which samples each part is for, and what may be left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEFINITIONS, DTYPES, OPS, assert_same, check, make, same_bits

from di4c_ext import ops
from di4c_ext.ops import Hidden, Logistic, MixtureObjective, reference

FIELDS = MixtureObjective._fields
FELT = [name for name in FIELDS if name != "information"]


def inside_of(i):
    """Every second sample, the first among them."""
    return torch.arange(i.logits.shape[0], device=i.logits.device) % 2 == 0


def given(i, **changes):
    """The arguments of a call with everything, the samples of `inside_of` inside."""
    all_given = {
        "teacher": i.target,
        "data": i.tokens[:, 0],
        "samples": i.tokens[:, 1:],
        "target": i.targets,
        "weight": i.weight,
        "inside": inside_of(i),
        "information": True,
    }
    return {**all_given, **changes}


def one_by_one(logits, teacher, data, samples, target, weight, inside, information):
    """The same by the ops of which it is made."""
    w = torch.ones(data.shape, device=data.device) if weight is None else weight
    within, without = (w, w) if inside is None else (w * inside[:, None], w * ~inside[:, None])
    joint_data, correlation_data = ops.mixture_log_prob(logits, data[:, None], weight)
    joint, correlation = ops.mixture_log_prob(logits, samples, weight)
    return MixtureObjective(
        distillation=ops.masked_kl(teacher, logits, within).mean(1),
        marginal_teacher=ops.mixture_kl(teacher, logits, weight),
        marginal_target=ops.mixture_kl(target, logits, without),
        joint_data=joint_data[:, 0],
        correlation_data=correlation_data[:, 0],
        joint_samples=joint,
        correlation_samples=correlation,
        information=ops.mixture_kl(logits[:, :1].detach(), logits.detach(), weight),
    )


def gradient(objective, logits, names=FELT):
    """Of a sum of the named parts in which no two have one weight."""
    total = sum((getattr(objective, name).sum() * (0.3 + n) for n, name in enumerate(names)), torch.zeros(()))
    return torch.autograd.grad(total, logits, retain_graph=True)[0]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_it_is_the_sum_of_its_parts(backend, dtype, split, weighted):
    i = make(43, dtype, batch=4, sequences=4, length=21, weighted=weighted).to(backend.device)
    if dtype == torch.float64:
        i = i.to(dtype=dtype)
    arguments = given(i, **({} if split else {"inside": None}))
    x = i.logits.requires_grad_()
    fused, parts = ops.mixture_objective(x, **arguments), one_by_one(x, **arguments)
    for name, value, expected in zip(FIELDS, fused, parts, strict=True):
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    tolerance = dict(rtol=1e-4, atol=6e-5) if dtype == torch.float32 else {}  # joint is a sum of 21 logs, times 6
    if dtype in (torch.bfloat16, torch.float16):  # one rounding against that of five gradients and their sums
        tolerance = dict(rtol=0, atol=16 * torch.finfo(dtype).eps)
    torch.testing.assert_close(gradient(fused, x), gradient(parts, x), **tolerance)


@pytest.mark.parametrize("states", [1, 2, 31, 257, 1025, 4099])
@pytest.mark.parametrize("scale", [0.1, 10.0, 60.0])
def test_against_the_definition_with_samples_inside_and_outside(backend, states, scale, monkeypatch):
    monkeypatch.setitem(OPS, "split", lambda i: ops.mixture_objective(i.logits, **given(i)))
    monkeypatch.setitem(DEFINITIONS, "split", lambda i: reference.mixture_objective(i.logits, **given(i)))
    for dtype in DTYPES:
        check("split", make(states, dtype, scale=scale, length=3, sequences=3), backend.device)


def test_which_sample_has_which_part(backend):
    i = make(19, batch=4, weighted=False).to(backend.device)
    inside = inside_of(i)
    x = i.logits.requires_grad_()
    objective = ops.mixture_objective(x, **given(i))
    every = ops.mixture_objective(x, **given(i, inside=None))
    for name in FIELDS:
        where = {"distillation": inside, "marginal_target": ~inside}.get(name, torch.ones_like(inside))
        value, whole = getattr(objective, name), getattr(every, name)
        assert (value[~where] == 0).all() and (whole != 0).all(), name
        torch.testing.assert_close(value[where], whole[where])
        if name != "information":
            grad = gradient(objective, x, [name])
            assert (grad[~where] == 0).all() and (grad[where] != 0).any(), name
    for dtype in (torch.uint8, torch.bool):
        again = ops.mixture_objective(x, **given(i, inside=inside.to(dtype)))
        assert all(same_bits(a, b) for a, b in zip(again, objective, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_inside_are_not_read(backend, dtype, monkeypatch):
    """Nor is anything at weight 0; not even NaN there changes a bit."""
    monkeypatch.setitem(OPS, "split", lambda i: ops.mixture_objective(i.logits, **given(i)))
    i = make(77, dtype, batch=5, length=20).to(backend.device)
    zero = i.weight == 0
    poisoned = replace(
        i,
        logits=i.logits.masked_fill(zero[:, None, :, None], torch.nan),
        target=i.target.masked_fill(zero[..., None], torch.nan),
        targets=i.targets.masked_fill(zero[:, None, :, None] | inside_of(i)[:, None, None, None], torch.nan),
    )
    assert_same("split", i, poisoned)
    inputs = poisoned.logits, poisoned.target, poisoned.targets, None, None, inside_of(i), i.weight
    lse_target = torch.ops.di4c.mixture(*inputs, None, False)[5]
    assert (lse_target[:, inside_of(i)] == 0).all() and torch.isfinite(lse_target).all()


def test_a_bad_target_spoils_its_sample_only(backend, monkeypatch):
    """And there marginal_target alone; a bad teacher spoils the divergences from it."""
    i = make(50, batch=4, weighted=False).to(backend.device)
    target, teacher = i.targets.clone(), i.target.clone()
    target[1, 0, 2, 3], teacher[2, 2, 3], teacher[3, 1, 4] = torch.nan, torch.nan, torch.nan
    good = ops.mixture_objective(i.logits, **given(i))
    bad = ops.mixture_objective(i.logits, **given(i, target=target, teacher=teacher))
    nan = {"marginal_target": [1], "distillation": [2], "marginal_teacher": [2, 3]}
    for name in FIELDS:
        value = getattr(bad, name)
        spoiled = torch.zeros(4, dtype=torch.bool, device=backend.device)
        spoiled[nan.get(name, [])] = True
        assert value[spoiled].isnan().all() and torch.equal(value[~spoiled], getattr(good, name)[~spoiled]), name


@pytest.mark.parametrize("left_out", [["samples"], ["data"], ["data", "samples"], ["target"], ["information"]])
def test_what_is_left_out_is_zero(backend, left_out):
    """The rest keeps its values, also the gradient of the rest."""
    i = make(23, sequences=4).to(backend.device)
    x = i.logits.requires_grad_()
    whole = ops.mixture_objective(x, **given(i))
    less = ops.mixture_objective(x, **given(i, **{name: None if name != "information" else False for name in left_out}))
    gone = {"target": ["marginal_target"], "information": ["information"]}
    gone |= {name: [f"joint_{name}", f"correlation_{name}"] for name in ("data", "samples")}
    absent = [field for name in left_out for field in gone[name]]
    for name in FIELDS:
        value, expected = getattr(less, name), getattr(whole, name)
        if name not in absent:
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        elif name.endswith("samples"):
            assert value.shape == (2, 0)
        else:
            assert value.shape == (2,) and value.dtype == torch.float32 and (value == 0).all()
    rest = [name for name in FELT if name not in absent]
    torch.testing.assert_close(gradient(less, x, rest), gradient(whole, x, rest), rtol=1e-5, atol=1e-6)


def test_sequences_may_lie_anywhere(backend):
    """Data and samples are read where they are, however they lie; before the samples the data are one more of them."""
    i = make(23, sequences=4).to(backend.device)
    x = i.logits.requires_grad_()
    tokens = i.tokens.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    dense = ops.mixture_objective(x, **given(i, data=i.tokens[:, 0].clone(), samples=i.tokens[:, 1:].clone()))
    apart = ops.mixture_objective(x, **given(i, data=tokens[:, 0], samples=tokens[:, 1:]))
    assert all(same_bits(a, b) for a, b in zip(dense, apart, strict=True))
    assert same_bits(gradient(dense, x), gradient(apart, x))
    together = ops.mixture_objective(x, **given(i, data=None, samples=tokens))
    for name in ("joint", "correlation"):
        data, samples = getattr(dense, f"{name}_data")[:, None], getattr(dense, f"{name}_samples")
        assert same_bits(getattr(together, f"{name}_samples"), torch.cat([data, samples], 1))


def test_a_target_is_a_mixture_of_any_number(backend):
    """One of T equal components is one component, which may come as (B, D, S)."""
    i = make(31, batch=3, mixed_target=5).to(backend.device)
    x = i.logits.requires_grad_()
    alone = i.targets[:, 2]
    results = [
        ops.mixture_objective(x, **given(i, target=target))
        for target in (alone, alone[:, None], alone[:, None].expand(-1, 7, -1, -1))
    ]
    assert all(same_bits(a, b) for a, b in zip(results[0], results[1], strict=True))
    for a, b in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(results[0], x), gradient(results[2], x), rtol=1e-4, atol=1e-6)
    mixed = ops.mixture_objective(x, **given(i, inside=None)).marginal_target
    torch.testing.assert_close(mixed, ops.mixture_kl(i.targets, x, i.weight), rtol=1e-6, atol=1e-6)
    assert ((mixed - results[0].marginal_target).abs() > 1e-3).any()


def test_information_is_of_the_first_component_and_has_no_gradient(backend):
    i = make(31, weighted=False).to(backend.device)
    x = i.logits.requires_grad_()
    objective = ops.mixture_objective(x, **given(i))
    p = i.logits.detach().double().softmax(-1)
    expected = (p[:, 0] * (p[:, 0] / p.mean(1)).log()).sum((-1, -2))
    torch.testing.assert_close(objective.information.double(), expected, rtol=1e-5, atol=1e-6)
    assert not objective.information.requires_grad and all(getattr(objective, name).requires_grad for name in FELT)
    alike = ops.mixture_objective(x[:, :1].expand(-1, 4, -1, -1), **given(i))
    assert (alike.information.abs() < 1e-6).all()


def test_gradients_of_the_parts_add_up(backend):
    i = make(29, batch=3).to(backend.device)
    x = i.logits.requires_grad_()
    objective = ops.mixture_objective(x, **given(i))
    alone = [torch.autograd.grad(getattr(objective, name).sum(), x, retain_graph=True)[0] for name in FELT]
    together = torch.autograd.grad(sum(getattr(objective, name).sum() for name in FELT), x)[0]
    torch.testing.assert_close(torch.stack(alone).sum(0), together, rtol=1e-4, atol=2e-6)


def test_batch_equals_its_samples_where_some_are_inside(backend):
    i = make(131, torch.bfloat16, batch=9, length=3).to(backend.device)
    whole = ops.mixture_objective(i.logits, **given(i))
    for b in range(9):
        one = i.samples(slice(b, b + 1))
        alone = ops.mixture_objective(one.logits, **given(one, inside=inside_of(i)[b : b + 1]))
        assert all(same_bits(v[b : b + 1], a) for v, a in zip(whole, alone, strict=True))


def _logistic(x, states=40):
    """Parameters made of a few numbers of each row."""
    return Logistic(x[..., 0].tanh(), x[..., 1], states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logistic_rows(backend, dtype):
    """As their logits, values and gradient; also where only some are logistic."""
    i = make(40, dtype, batch=4, length=21).to(backend.device)
    if dtype == torch.float64:
        i = i.to(dtype=dtype)
    i = replace(i, target=i.target[..., :40], tokens=i.tokens)
    mean, log_scale = i.logits[..., 0].tanh().requires_grad_(), i.logits[..., 1].clone().requires_grad_()
    x = Logistic(mean, log_scale, 40)
    exact = Logistic(mean.double(), log_scale.double(), 40).logits()
    for teacher, target in (
        (_logistic(i.target), _logistic(i.targets)),
        (_logistic(i.target), _logistic(i.target)),
        (i.target, _logistic(i.targets)),
        (_logistic(i.target), i.targets),
    ):
        wide = [v.logits() if isinstance(v, Logistic) else v for v in (teacher, target)]
        wide[1] = wide[1][:, None] if wide[1].dim() == 3 else wide[1]
        objective = ops.mixture_objective(x, **given(i, teacher=teacher, target=target))
        expected = reference.mixture_objective(
            exact, **given(i, teacher=wide[0].double(), target=wide[1].double(), weight=i.weight.double())
        )
        for name, value, right in zip(FIELDS, objective, expected, strict=True):
            close = dict(rtol=1e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
            torch.testing.assert_close(value.double(), right.double(), **close)
        got = [gradient(objective, v) for v in (mean, log_scale)]
        right = [gradient(expected, v) for v in (mean, log_scale)]
        for a, b in zip(got, right, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(
                a.double(), b.double(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-4
            )


def test_hidden_states(backend):
    """As their logits; tests of their own in test_hidden.py."""
    i = make(12, batch=3).to(backend.device)
    head = torch.randn(20, 12, device=backend.device)
    hidden, logits = Hidden(i.logits, head), i.logits @ head.T
    teacher, target = Hidden(i.target, head), Hidden(i.targets, head)
    some = given(i, teacher=teacher, target=target)
    wide = given(i, teacher=teacher.logits(), target=target.logits())
    for a, b in zip(ops.mixture_objective(hidden, **some), ops.mixture_objective(logits, **wide), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ops.mixture_log_prob(hidden, i.tokens, i.weight)[0], ops.mixture_log_prob(logits, i.tokens, i.weight)[0]
    )
    torch.testing.assert_close(
        ops.mixture_kl(target, logits, i.weight),
        ops.mixture_kl(target.logits(), hidden, i.weight),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("wide", ["logits", "target", "targets"])
def test_float64_anywhere(backend, wide):
    """The reference serves; results follow the logits."""
    i = make(17).to(backend.device)
    i = replace(i, **{wide: getattr(i, wide).double()})
    x = i.logits.requires_grad_()
    objective = ops.mixture_objective(x, **given(i))
    assert all(value.dtype == (torch.float64 if wide == "logits" else torch.float32) for value in objective)
    narrow = replace(i, **{wide: getattr(i, wide).float()})
    y = narrow.logits.detach().requires_grad_()
    expected = ops.mixture_objective(y, **given(narrow))
    for a, b in zip(objective, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(objective, x).float(), gradient(expected, y), rtol=1e-4, atol=2e-6)
