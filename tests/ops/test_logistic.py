"""Logistic logits: every op on them against the same op on logits, and draws by their law."""

from __future__ import annotations

import math

import pytest
import torch
from cases import same_bits
from laws import chi_square
from logistics import STATES, some_rows, to
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Logistic

LOG_SCALES = ((-8.0, -4.0), (-4.0, -1.0), (-1.0, 1.5), (1.5, 4.0))
EPS = torch.finfo(torch.float32).eps


# --- the kernels, class by class ------------------------------------------------------------------------------


@pytest.mark.parametrize("log_scales", LOG_SCALES, ids=str)
@pytest.mark.parametrize("states", STATES)
def test_every_class(implementation, states, log_scales):
    """Each class's log-probability, asked for as a sequence of length 1, and its gradient."""
    x = some_rows(states, 24, 1, 1, low=log_scales[0], high=log_scales[1], seed=states)
    tokens = torch.arange(states)[:, None].expand(24, -1, 1)
    upstream = torch.randn(24, states, generator=torch.Generator().manual_seed(2))

    def run(rows: Logistic, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = to(rows, device=device)
        mean, log_scale = rows.mean.requires_grad_(), rows.log_scale.requires_grad_()
        joint, _ = ops.mixture_log_prob(Logistic(mean, log_scale, states), tokens.to(device))
        grads = torch.autograd.grad(joint, (mean, log_scale), upstream.to(joint))
        return joint.detach().cpu().double(), torch.stack(grads, -1).cpu().double().view(24, 2)

    value, grad = run(x, implementation.device)
    exact, exact_grad = run(to(x, torch.float64), torch.device("cpu"))
    logits = to(x, torch.float64).logits().view(24, states)
    largest, top = logits.detach().max(-1, keepdim=True)
    error, size = value - exact, 1 + logits.detach().abs() + largest.abs()
    assert ((error - error.gather(-1, top)).abs() <= 6 * EPS * size).all()  # of one logit against another
    assert (error.abs() <= (8 + states / 32) * EPS * size).all()  # and of the sum of all, which is taken in floats
    # A slope is at most kappa for the mean, |r| <= 2.2 kappa for the log-scale; a row's probabilities sum to 1.
    kappa = torch.exp(2 - x.log_scale.double()).view(24, 1)
    steepest = upstream.double().abs().sum(-1, keepdim=True) * torch.cat([kappa, 1 + 2.2 * kappa], -1)
    assert ((grad - exact_grad).abs() <= 8 * EPS * steepest).all()


@pytest.mark.parametrize("states", [1, 3, 256])
def test_extreme_scales(implementation, states):
    """Log-scales below -64 count as -64 and have no gradient, infinite ones make one class certain or all alike."""
    log_scale = torch.tensor([-math.inf, -1e4, -70.0, -63.0, 30.0, 90.0, 1e4, math.inf])[:, None, None]
    mean = torch.full_like(log_scale, 0.3)
    tokens = torch.arange(states)[:, None].expand(8, -1, 1)
    device = implementation.device
    m, s = (v.to(device).requires_grad_() for v in (mean, log_scale))
    joint, _ = ops.mixture_log_prob(Logistic(m, s, states), tokens.to(device))
    finite = Logistic(mean.double(), log_scale.double().clamp(-64, 200), states)
    exact, _ = ops.mixture_log_prob(finite, tokens)
    torch.testing.assert_close(joint.detach().cpu().double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(joint[:, 0].sum(), (m, s))
    assert (grads[1][:3] == 0).all()
    assert all(torch.isfinite(g[1:7]).all() for g in grads)


# --- the ops --------------------------------------------------------------------------------------------------


def _arguments(name: str, device: torch.device, states: int = 37, weighted: bool = True) -> dict[str, object]:
    g = torch.Generator().manual_seed(states)
    tokens = torch.randint(0, states, (2, 3, 21), generator=g).to(device)
    weight = torch.rand(2, 21, generator=g).mul(2).sub(0.6).clamp(min=0).to(device) if weighted else None
    teacher = to(some_rows(states, 2, 21, seed=1), device=device)
    target = to(some_rows(states, 2, 4, 21, seed=2), device=device)
    if name == "mixture_log_prob":
        return {"tokens": tokens, "weight": weight}
    if name == "mixture_kl":
        return {"target": teacher, "weight": weight}
    if name == "mixture_kl_of_mixture":
        return {"target": target, "weight": weight}
    inside = torch.tensor([True, False], device=device)
    given = {"teacher": teacher, "target": target, "data": tokens[:, 0], "samples": tokens, "inside": inside}
    return {**given, "weight": weight, "information": True}


OPS = ("mixture_log_prob", "mixture_kl", "mixture_kl_of_mixture", "mixture_objective")


def _values_and_grad(name: str, x: Logistic, arguments: dict[str, object], form: str) -> list[Tensor]:
    """Outputs and the gradients of mean and log-scale: on "rows" as they are, on their "logits", in "float64"."""
    if form == "float64":
        x = to(x, torch.float64)
        arguments = {k: to(v, torch.float64) if isinstance(v, Logistic) else v for k, v in arguments.items()}
    if form == "logits":
        arguments = {k: v.logits() if isinstance(v, Logistic) else v for k, v in arguments.items()}
    leaves = x.mean.detach().requires_grad_(), x.log_scale.detach().requires_grad_()
    leaf = Logistic(*leaves, x.num_states)
    op = getattr(ops, name.removesuffix("_of_mixture"))
    out = op(logits=leaf.logits() if form == "logits" else leaf, **arguments)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    summed = [o for o in outputs if o.requires_grad]
    torch.autograd.backward(summed, [torch.linspace(0.5, -1.5, o.numel()).to(o).view(o.shape) for o in summed])
    return [*(o.detach() for o in outputs), *(v.grad for v in leaves)]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("states", [2, 37, 256, 1500])
@pytest.mark.parametrize("name", OPS)
def test_as_on_logits(backend, name, states, weighted):
    """Off the float64 definition by at most twice what plain float32 is on materialised logits, and a few ulp."""
    x = to(some_rows(states, 2, 5, 21, low=-3.0, seed=3), device=backend.device)
    arguments = _arguments(name, backend.device, states, weighted)
    exact = _values_and_grad(name, x, arguments, "float64")
    plain = _values_and_grad(name, x, arguments, "logits")
    for value, by_logits, truth in zip(_values_and_grad(name, x, arguments, "rows"), plain, exact, strict=True):
        assert value.dtype == torch.float32 and value.shape == truth.shape
        few_ulp = 16 * EPS * (1 + truth.abs().max().item())
        allowed = 2 * (by_logits - truth).abs().max().item() + few_ulp
        assert (value - truth).abs().max().item() <= allowed, name


@pytest.mark.parametrize("name", OPS)
def test_half_precision_is_converted(backend, name):
    x = to(some_rows(37, 2, 5, 21), torch.bfloat16, backend.device)
    arguments = _arguments(name, backend.device)
    narrow = _values_and_grad(name, x, arguments, "rows")
    wide = _values_and_grad(name, to(x, torch.float32), arguments, "rows")
    assert narrow[-1].dtype == narrow[-2].dtype == torch.bfloat16
    assert all(same_bits(a, b.to(a.dtype)) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_bad_rows_keep_to_themselves(backend, name):
    """A NaN mean or log-scale makes its sample NaN; under weight 0 it is not looked at; the other sample stays."""
    x = to(some_rows(37, 2, 5, 21), device=backend.device)
    arguments = _arguments(name, backend.device)
    arguments["weight"][:, 4], arguments["weight"][:, 5] = 1.0, 0.0
    good = _values_and_grad(name, x, arguments, "rows")
    for field in ("mean", "log_scale"):
        for position in (4, 5):
            bad = Logistic(x.mean.clone(), x.log_scale.clone(), 37)
            getattr(bad, field)[0, 2, position] = math.nan
            values = _values_and_grad(name, bad, arguments, "rows")
            assert all(same_bits(a[1:], b[1:]) for a, b in zip(values, good, strict=True))
            if position == 5:
                assert all(same_bits(a, b) for a, b in zip(values, good, strict=True))
                assert (values[-1][:, :, 5] == 0).all() and (values[-2][:, :, 5] == 0).all()
            else:
                assert any(a[0].isnan().any() for a in values[:-2])


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_layouts(backend, layout):
    x = to(some_rows(37, 2, 5, 21), device=backend.device)
    if layout == "transposed":
        other = Logistic(x.mean.mT.contiguous().mT, x.log_scale.mT.contiguous().mT, 37)
    elif layout == "expanded":
        x = Logistic(x.mean, x.log_scale[:, :1].expand_as(x.mean).contiguous(), 37)
        other = Logistic(x.mean, x.log_scale[:, :1].expand_as(x.mean), 37)
    else:
        both = torch.stack([x.mean, x.log_scale], -1)
        other = Logistic(both[..., 0], both[..., 1], 37)
    arguments = _arguments("mixture_objective", backend.device)
    plain = _values_and_grad("mixture_objective", x, arguments, "rows")
    again = _values_and_grad("mixture_objective", other, arguments, "rows")
    assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True))


def test_instruction_sets_agree_to_the_bit(monkeypatch):
    """Those with a fused multiply-add; without one, products round on their own."""
    found = []
    for isa in ("avx2", "avx512"):
        monkeypatch.setenv("DI4C_ISA", isa)
        try:
            ops.native.info()["isa_active"]
        except (KeyError, ValueError):
            pytest.skip(f"no {isa} here")
        values = []
        for states, low in ((37, -3.0), (1500, -8.0)):
            x = some_rows(states, 2, 5, 21, low=low, seed=4)
            arguments = _arguments("mixture_objective", torch.device("cpu"), states)
            values += _values_and_grad("mixture_objective", x, arguments, "rows")
        found.append(values)
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# --- draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [1, 2, 256, 1025, 4096])
def test_same_tokens_as_from_logits(implementation, states):
    x = to(some_rows(states, 3, 4, 6, low=-5.0, high=2.0), device=implementation.device)
    keys = random.keys(5, 3, implementation.device)
    exact = to(x, torch.float64).logits()
    for options in ({}, {"draws": 40, "stream": 3}, {"temperature": 0.6}):
        tokens, log_prob = ops.sample_categorical(x, keys, return_log_prob=True, **options)
        expected = ops.sample_categorical(exact, keys, return_log_prob=True, **options)
        assert torch.equal(tokens, expected[0]), options
        torch.testing.assert_close(log_prob, expected[1], rtol=1e-5, atol=1e-5)
    largest = ops.sample_categorical(x, keys, temperature=0.0)[..., None]  # of neighbours that are almost alike, any
    size = exact.amax(-1, keepdim=True).abs().clamp(min=1)
    assert (exact.amax(-1, keepdim=True) - exact.gather(-1, largest) <= 4 * EPS * size).all()


@pytest.mark.parametrize("log_scale", [-6.0, -2.0, 1.0])
def test_draws_follow_the_law(backend, log_scale):
    x = Logistic(torch.tensor([[0.31]]), torch.tensor([[log_scale]]), 64)
    n = 200_000 if backend.is_native else 20_000
    keys = random.keys(11, 1, backend.device)
    tokens = ops.sample_categorical(to(x, device=backend.device), keys, draws=n)
    counts = torch.bincount(tokens.flatten().cpu(), minlength=64)
    assert chi_square(counts, torch.softmax(to(x, torch.float64).logits(), -1).flatten()) > 1e-3


def test_pieces_draw_what_the_whole_does(backend):
    x = to(some_rows(100, 2, 30), device=backend.device)
    keys = random.keys(1, 2, backend.device)
    whole = ops.sample_categorical(x, keys, draws=3)
    for start in (0, 7, 22):
        piece = Logistic(x.mean[:, start : start + 8], x.log_scale[:, start : start + 8], 100)
        tokens = ops.sample_categorical(piece, keys, draws=3, first_position=start)
        assert torch.equal(tokens, whole[:, :, start : start + 8])


def test_bad_rows_draw_minus_one(backend):
    x = to(some_rows(100, 2, 3, 8), device=backend.device)
    keys = random.keys(1, 2, backend.device)
    good, good_log_prob = ops.sample_categorical(x, keys, return_log_prob=True)
    for field in ("mean", "log_scale"):
        bad = Logistic(x.mean.clone(), x.log_scale.clone(), 100)
        getattr(bad, field)[1, 1, 2] = math.nan
        tokens, log_prob = ops.sample_categorical(bad, keys, return_log_prob=True)
        assert tokens[1, 1, 2] == -1 and log_prob[1, 1, 2].isnan()
        tokens[1, 1, 2], log_prob[1, 1, 2] = good[1, 1, 2], good_log_prob[1, 1, 2]
        assert torch.equal(tokens, good) and torch.equal(log_prob, good_log_prob)


def test_nothing_to_draw(backend):
    for shape in ((0, 5), (2, 0), (2, 3, 0)):
        x = to(some_rows(8, *shape), device=backend.device)
        keys = random.keys(1, shape[0], backend.device)
        assert ops.sample_categorical(x, keys).shape == shape
        assert ops.sample_categorical(x, keys, draws=0).shape == (shape[0], 0, *shape[1:])


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"mean": [[0.0]]}, TypeError, r"logits\.mean must be a tensor .* got list"),
        ({"log_scale": torch.zeros(2, 3, 4).long()}, TypeError, r"logits\.log_scale must be float32.* got torch.int64"),
        ({"log_scale": torch.zeros(2, 3)}, ValueError, r"logits\.log_scale must have .* \(2, 3, 4\), got \(2, 3\)"),
        (
            {"mean": torch.zeros(3), "log_scale": torch.zeros(3)},
            ValueError,
            r"logits\.mean must have shape .* got \(3,\)",
        ),
        (
            {"log_scale": torch.zeros(2, 3, 4, device="meta")},
            ValueError,
            r"logits\.log_scale must be on cpu.* got meta",
        ),
        ({"num_states": 0}, ValueError, r"logits\.num_states must lie between 1 and 262144, got 0"),
        ({"num_states": (1 << 18) + 1}, ValueError, r"logits\.num_states must lie between 1 and 262144, got 262145"),
        ({"num_states": 2.0}, TypeError, r"logits\.num_states must be an integer, got 2.0"),
    ],
)
@pytest.mark.parametrize("name", ["sample_categorical", "mixture_log_prob"])
def test_refused(reference_ops, name, fields, error, words):
    x = Logistic(**{"mean": torch.zeros(2, 3, 4), "log_scale": torch.zeros(2, 3, 4), "num_states": 5, **fields})
    other = random.keys(0, 2) if name == "sample_categorical" else torch.zeros(2, 1, 4, dtype=torch.int64)
    with pytest.raises(error, match=f"{name}: {words}"):
        getattr(ops, name)(x, other)


def test_refuses_a_position_below_zero():
    with pytest.raises(ValueError, match="first_position must be an integer >= 0, got -1"):
        ops.sample_categorical(some_rows(4, 2, 3), random.keys(0, 2), first_position=-1)


def test_refuses_other_numbers_of_states():
    with pytest.raises(ValueError, match="mixture_kl: target"):
        ops.mixture_kl(some_rows(5, 2, 4), some_rows(4, 2, 3, 4))


# --- as operators of PyTorch ----------------------------------------------------------------------------------


def test_opcheck(backend):
    packed = torch.stack(some_rows(11, 2, 3, 6)[:2], -1).to(backend.device)
    keys = random.keys(0, 2, backend.device)
    sample = (packed.flatten(1, 2), keys, None, None, -1, 2, 0, 1.0, True, 7, 11)
    torch.library.opcheck(torch.ops.di4c.sample.default, sample)
    tokens = torch.randint(0, 11, (2, 2, 6), device=backend.device)
    mixture = (packed.requires_grad_(), packed[:, 0].detach(), None, tokens[:, 0], tokens, None, None, 11, False)
    torch.library.opcheck(torch.ops.di4c.mixture.default, mixture)


def test_compile_fullgraph(backend):
    def step(mean: Tensor, log_scale: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        x = Logistic(mean, log_scale, 11)
        teacher = Logistic(mean[:, 0].detach(), log_scale[:, 0].detach(), 11)
        drawn = ops.sample_categorical(teacher, keys, draws=2)
        parts = ops.mixture_objective(x, teacher=teacher, samples=drawn)
        return parts.correlation_samples.sum() + parts.marginal_teacher.sum(), drawn

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        x = to(some_rows(11, batch, 3, 6), device=backend.device)
        keys = random.keys(0, batch, backend.device)
        eager = [v.clone().requires_grad_() for v in x[:2]]
        traced = [v.clone().requires_grad_() for v in x[:2]]
        (loss, tokens), (again, tokens_again) = step(*eager, keys), compiled(*traced, keys)
        loss.backward()
        again.backward()
        assert torch.equal(tokens, tokens_again) and same_bits(loss.detach(), again.detach())
        assert all(same_bits(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))
