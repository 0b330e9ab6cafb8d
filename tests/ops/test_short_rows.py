"""Many components of few states, which the CPU kernels take a component to a lane: everything the other shapes pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DTYPES, OPS, Inputs, assert_same, check, make, same_bits, value_and_grad

from di4c_ext.ops import native, reference

NAMES = [name for name in OPS if name.startswith("mixture")]
SHAPES = [(2, 32), (17, 20), (17, 32), (31, 33), (64, 40)]  # S, L


def _make(states: int, components: int, dtype: torch.dtype = torch.float32, **settings: object) -> Inputs:
    sizes = {"batch": 2, "length": 18, "sequences": 24, "mixed_target": 19} | settings
    return make(states, dtype, components=components, **sizes)


@pytest.mark.parametrize("states, components", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_numerics(implementation, name, states, components):
    for dtype in DTYPES:
        check(name, _make(states, components, dtype, seed=states), implementation.device)
    for scale, shift in ((0.1, 0.0), (10.0, 1000.0), (60.0, -1000.0)):
        check(name, _make(states, components, scale=scale, shift=shift, batch=1, length=3), implementation.device)


@pytest.mark.parametrize("name", NAMES)
def test_targets_alone_and_none(implementation, name):
    """A target of one component, one sequence, none, and unweighted positions."""
    for settings in ({"mixed_target": 1}, {"sequences": 1}, {"sequences": 0}, {"weighted": False}):
        if settings.get("sequences") == 0 and name == "mixture_log_prob":
            continue
        check(name, _make(17, 20, **settings), implementation.device)


@pytest.mark.parametrize("name", NAMES)
def test_far_tails_and_states_nobody_has(implementation, name):
    i = _make(17, 20)
    logits, target, targets = i.logits.clone(), i.target.clone(), i.targets.clone()
    logits[..., 3] -= 150.0  # below what a float holds as a probability, and still shared out by the components
    for rows in (logits, target, targets):
        rows[..., 5] = -torch.inf
    logits[:, ::2, :, 7] = -torch.inf
    tokens = torch.where(i.tokens == 5, 4, i.tokens)
    check(name, replace(i, logits=logits, target=target, targets=targets, tokens=tokens), implementation.device)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_row_spoils_its_sample_alone(implementation, name, bad):
    i = _make(17, 32).to(implementation.device)
    logits = i.logits.clone()
    weight = torch.ones_like(i.weight)
    weight[:, 4] = 0.0
    logits[0, 5, 2] = bad
    logits[:, :, 4] = torch.nan  # of weight 0: not read
    i = replace(i, weight=weight)
    values, grad = value_and_grad(OPS[name], replace(i, logits=logits))
    clean, clean_grad = value_and_grad(OPS[name], i)
    for value, before in zip(values, clean, strict=True):
        assert value[0].isnan().all() or name == "mixture_objective"
        assert same_bits(value[1:], before[1:])
    assert any(value[0].isnan().all() for value in values)
    assert same_bits(grad[1:], clean_grad[1:]) and (grad[:, :, 4] == 0).all() and grad[0, :, 2].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_threads_batch_and_sets(kernels, name, monkeypatch):
    """Not a bit depends on the number of threads, on the batch, or on AVX2 or AVX-512."""
    if kernels.name != "cpu":
        pytest.skip("threads and instruction sets are the CPU's")
    i = _make(17, 32, batch=3)
    whole = value_and_grad(OPS[name], i)
    torch.set_num_threads(1)
    single = value_and_grad(OPS[name], i)
    assert all(same_bits(a, b) for a, b in zip([*whole[0], whole[1]], [*single[0], single[1]], strict=True))
    alone = value_and_grad(lambda x: [2.0 * o for o in OPS[name](x)], i.samples(slice(1, 2)))
    assert all(same_bits(a[1:2] * 2, b) for a, b in zip(whole[0], alone[0], strict=True))
    if native.info()["isa_active"] == "avx512":
        monkeypatch.setenv("DI4C_ISA", "avx2")
        narrow = value_and_grad(OPS[name], i)
        assert all(same_bits(a, b) for a, b in zip([*whole[0], whole[1]], [*narrow[0], narrow[1]], strict=True))


def test_gradient_over_the_logits(kernels):
    """mixture_backward may write over the logits it reads."""
    if kernels.name != "cpu":
        pytest.skip("on CUDA the emulator's tests do this")
    i = _make(17, 32)
    (B, L, D, S), K, T = i.logits.shape, i.tokens.shape[1], i.targets.shape[1]
    ones = torch.ones(B, K)
    parts = torch.ones(4, B)
    inputs = (i.logits, i.target[:, None], i.targets, None, i.tokens, None, i.weight)
    joint, correlation, _, *rows = torch.ops.di4c.mixture(*inputs, None, False)
    kept = [joint, correlation, *rows]
    apart = torch.ops.di4c.mixture_backward(ones, ones, parts, *inputs, *kept, None)
    over = i.logits.clone()
    run = native.kernels(over)
    assert run is not None
    names = ("joint", "correlation", "lse", "lse_teacher", "lse_target", "share", "pull")
    run(
        "mixture_backward",
        **native.describe("logits", over),
        **native.describe("teacher", i.target[:, None]),
        **native.describe("target", i.targets),
        **dict(zip(names, kept, strict=True)),
        **native.describe_sequences("first", None),
        **native.describe_sequences("tokens", i.tokens),
        inside=None,
        weight=i.weight,
        grad_joint=ones,
        grad_correlation=ones,
        grad_parts=parts,
        grad=over,
        **{"B": B, "L": L, "D": D, "S": S, "K": K, "T": T},
    )
    assert same_bits(over, apart)


def test_layouts():
    """Rows that lie apart, and the definition beside it."""
    i = _make(17, 32)
    apart = replace(i, logits=i.logits.transpose(1, 2).contiguous().transpose(1, 2))
    for name in NAMES:
        assert_same(name, i, apart)
    assert reference.mixture_kl(i.targets, i.logits, i.weight).isfinite().all()
