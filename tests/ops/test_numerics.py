"""Values and gradients against the float64 definition, in every dtype, at every number of states and scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEFINITIONS, DTYPES, OPS, READS_TARGET, STATES, check, make, value_and_grad

from di4c_ext.ops import native, reference

NAMES = list(OPS)
MIXTURES = [name for name in NAMES if name.startswith("mixture")]


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_states(backend, name, states):
    wide = states > 5000
    if wide and not backend.is_native and states != 50258:
        pytest.skip("the reference has no vectors whose ends could go wrong")
    for dtype in (torch.float32, torch.bfloat16) if wide else DTYPES:
        sizes = dict(batch=1, components=2, length=2) if wide else dict(batch=1, length=3)
        check(name, make(states, dtype, weighted=not wide, seed=states, **sizes), backend.device)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 60.0])
@pytest.mark.parametrize("name", NAMES)
def test_scales_and_dtypes(backend, name, scale):
    for dtype in DTYPES:
        check(name, make(97, dtype, scale=scale, components=4, seed=1), backend.device)
    check(name, make(1500, scale=scale, batch=1, seed=2), backend.device)


@pytest.mark.parametrize("name", NAMES)
def test_translation(backend, name):
    """Adding 1000 to a row changes nothing but the rounding of its logits; float16 has ulp 1/2 there, still legal."""
    for dtype in DTYPES:
        check(name, make(300, dtype, shift=1000.0), backend.device)
        check(name, make(300, dtype, shift=-1000.0), backend.device)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_what_forward_keeps(backend, shift):
    """Row maxima and log-sums mean the same in every backend: the definition's backward can take over from them."""
    i = make(1500, shift=shift)
    weight = i.weight.clone()
    weight[:, 0], weight[:, 3] = 1.0, 0.0
    logits = i.logits.masked_fill((weight == 0)[:, None, :, None], torch.nan)  # not to be read
    i = replace(i, logits=logits, weight=weight).to(backend.device)
    arguments = (i.logits, i.target, i.targets, i.tokens, None, i.weight)
    given_op = (*arguments[:3], None, *arguments[3:])  # no sequence apart from the others
    joint, correlation, parts, *kept = torch.ops.di4c.mixture(*given_op, None, False)
    lse, lse_teacher, lse_target, share, pull = kept
    stats = torch.ops.di4c.row_loss(2, i.target, None, i.logits, i.weight)[1]
    wide = i.to(dtype=torch.float64)
    for got, rows in (
        (lse, wide.logits),
        (lse_teacher, wide.target[:, None]),
        (lse_target, wide.targets),
        (stats[:2], wide.logits),
        (stats[2:4], wide.target[:, None].expand_as(wide.logits)),
    ):
        used = (i.weight != 0)[:, None].expand(rows.shape[:-1])
        assert got.shape == (2, *rows.shape[:-1]) and (got[:, ~used] == 0).all()
        top, log_sum = got[0][used].double(), torch.logsumexp(rows - rows.amax(-1, keepdim=True), -1)[used]
        assert torch.equal(top, rows.amax(-1)[used])
        torch.testing.assert_close(got[1][used].double(), log_sum, rtol=1e-6, atol=1e-6)

    exact = reference.mixture_forward(*(_wide(v) for v in arguments), False)
    for got, expected in zip((share, pull), exact[6:], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    given = [torch.ones_like(v) for v in (joint, correlation, parts)]
    kept = [joint, correlation, *kept]
    grad = torch.ops.di4c.mixture_backward(*given, *given_op, *kept, None)
    exact = reference.mixture_backward(*(_wide(v) for v in (*given, *arguments, *kept)))
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=2e-6)


def _wide(x):
    return x if x is None or not x.is_floating_point() else x.double()


@pytest.mark.parametrize("name", NAMES)
def test_one_hot_rows(backend, name):
    i = make(260, scale=0.01)
    hot = torch.nn.functional.one_hot(i.tokens[:, 0], 260) * 80.0
    i = replace(i, logits=i.logits + hot[:, None], target=i.target + hot)
    check(name, i, backend.device)
    check(name, replace(i, tokens=(i.tokens + 1) % 260), backend.device)


@pytest.mark.parametrize("name", READS_TARGET)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_student_equal_to_teacher(backend, name, scale):
    """The divergence of equal rows is 0, and that of nearly equal rows is small and right."""
    i = make(513, scale=scale, weighted=False)
    one = i.target[:, None].expand_as(i.logits)
    same = replace(i, logits=one, targets=i.target[:, None])
    assert OPS[name](same.to(backend.device))[0].abs().max() <= 3e-6 * scale
    check(name, same, backend.device)
    check(name, replace(same, logits=one + 1e-3 * i.logits), backend.device)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_minus_inf(backend, name):
    """Classes without mass in student and teacher: whole chunks of 1024 of them, and single ones."""
    for states in (40, 3000):
        i = make(states)
        out = torch.arange(states) < (20 if states == 40 else 2100)
        out |= torch.arange(states) % 7 == 3
        tokens = (~out).nonzero().flatten()[i.tokens % int((~out).sum())]
        i = replace(
            i,
            logits=i.logits.masked_fill(out, -torch.inf),
            target=i.target.masked_fill(out, -torch.inf),
            targets=i.targets.masked_fill(out, -torch.inf),
            tokens=tokens,
        )
        check(name, i, backend.device)


@pytest.mark.parametrize("name", [name for name in READS_TARGET if name != "masked_reverse_kl"])
def test_target_with_less_support(backend, name):
    i = make(70)
    out = torch.arange(70) % 3 == 0
    i = replace(i, target=i.target.masked_fill(out, -torch.inf), targets=i.targets.masked_fill(out, -torch.inf))
    check(name, i, backend.device)


@pytest.mark.parametrize("name", ["mixture_kl", "mixture_objective", "masked_kl"])
def test_class_the_student_lacks_is_inf(backend, name):
    i = make(70, weighted=False).to(backend.device)
    logits = i.logits.clone()
    logits[0, :, 2, 9] = -torch.inf
    value = OPS[name](replace(i, logits=logits))[0]
    assert torch.isposinf(value[0]).all() and torch.isfinite(value[1]).all()


def test_class_one_component_lacks(backend):
    """The mixture has what one of its components has."""
    i = make(70, weighted=False)
    logits = i.logits.clone()
    logits[0, 1, 2, 9] = -torch.inf
    i = replace(i, logits=logits, tokens=torch.full_like(i.tokens, 9))
    for name in ("mixture_log_prob", "mixture_kl", "mixture_kl_of_mixture"):
        check(name, i, backend.device)
    values, grad = value_and_grad(OPS["mixture_objective"], i.to(backend.device))
    exact, _ = value_and_grad(DEFINITIONS["mixture_objective"], i.to(backend.device, torch.float64))
    distillation, *others = values
    assert distillation[0] == torch.inf and torch.isfinite(distillation[1])  # the teacher against one component
    for value, expected in zip(others, exact[1:], strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(grad).all()


def test_token_no_component_has(backend):
    """joint is -inf, correlation and the gradient are those without the position."""
    i = make(40, weighted=False).to(backend.device)
    logits = i.logits.clone()
    logits[0, :, 3, 7] = -torch.inf
    tokens = i.tokens.clone()
    tokens[0, 0, 3] = 7
    tokens[0, 1, 3] = 8
    weight = torch.ones(2, 5, device=backend.device)
    without = weight.clone()
    without[0, 3] = 0.0

    def run(w):
        x = logits.clone().requires_grad_()
        joint, correlation = OPS["mixture_log_prob"](replace(i, logits=x, tokens=tokens, weight=w))
        (grad,) = torch.autograd.grad(correlation[0, 0], x)
        return joint, correlation, grad

    joint, correlation, grad = run(weight)
    _, expected, expected_grad = run(without)
    assert torch.isneginf(joint[0, 0]) and torch.isfinite(joint[0, 1]) and torch.isfinite(joint[1]).all()
    torch.testing.assert_close(correlation[0, 0], expected[0, 0])
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("components", [1, 2, 7, 33])
def test_numbers_of_components_and_sequences(backend, components):
    """K = 1 and K = L, more positions than one block of 16; a product (L = 1) has no correlation."""
    for sequences in (1, components):
        i = make(19, components=components, sequences=sequences, length=37, mixed_target=components)
        for name in MIXTURES:
            check(name, i, backend.device)
        if components == 1:
            assert OPS["mixture_log_prob"](i.to(backend.device))[1].abs().max() < 1e-6


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "neon"])
def test_every_instruction_set(kernels, isa, monkeypatch):
    if kernels.name != "cpu":
        pytest.skip("instruction sets are the CPU's")
    if isa not in native.info()["isa_built"]:
        pytest.skip(f"{isa} is not built")
    monkeypatch.setenv("DI4C_ISA", isa)
    try:
        assert native.info()["isa_active"] == isa
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    for name in NAMES:
        for states, dtype in ((1, torch.float32), (37, torch.bfloat16), (1025, torch.float16), (2053, torch.float32)):
            check(name, make(states, dtype, scale=3.0), kernels.device)


@pytest.mark.parametrize("name", READS_TARGET)
def test_target_in_another_dtype(backend, name):
    """A teacher in bfloat16 beside a student in float32, and the reverse; a float64 target is served as well."""
    for dtype, target_dtype in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        i = make(131, dtype)
        check(name, replace(i, target=i.target.to(target_dtype), targets=i.targets.to(target_dtype)), backend.device)
    i = make(131).to(backend.device)
    wide = replace(i, target=i.target.double(), targets=i.targets.double())
    torch.testing.assert_close(OPS[name](wide)[0], OPS[name](i)[0], rtol=1e-5, atol=1e-6)
