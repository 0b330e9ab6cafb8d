"""The ops as PyTorch operators: opcheck, FakeTensor, meta, torch.compile, AMP, and what autograd may ask of them."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from cases import DEFINITIONS, OPS, make, value_and_grad
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from di4c_ext import ops, random
from di4c_ext.ops import reference

NAMES = list(OPS)


INPUTS = ("teacher", "target", "tokens", "inside", "weight")  # of di4c::mixture, each of which may be absent


def _mixture_inputs(i, absent=()):
    """The seven inputs of di4c::mixture, some of them None; the first sequence apart beside tokens and weight."""
    given = {
        "teacher": i.target,
        "target": i.targets,
        "tokens": i.tokens,
        "inside": torch.arange(i.logits.shape[0], device=i.logits.device) % 2 == 0,
        "weight": i.weight,
    }
    teacher, target, tokens, inside, weight = (None if name in absent else given[name] for name in INPUTS)
    first = None if tokens is None or weight is None else i.tokens[:, 1]
    return i.logits, teacher, target, first, tokens, inside, weight


def _backward_inputs(inputs, outputs, states=None):
    """The arguments of di4c::mixture_backward, by the inputs and outputs of di4c::mixture."""
    outputs = [value.detach() for value in outputs]
    grads = [torch.ones_like(value) for value in outputs[:3]]
    return *grads, inputs[0].detach(), *inputs[1:], *outputs[:2], *outputs[3:], states


def _packed(x):
    """Rows of two floats, mean and log-scale, as many as x has rows."""
    return torch.stack([x.float().mean(-1).tanh(), x.float().std(-1)], -1)


def _op_calls(device):
    """Calls of every registered operator: name, arguments."""
    i = make(37).to(device)
    keys = random.keys(0, 2, device)
    logistic = replace(i, logits=_packed(i.logits), target=_packed(i.target), targets=_packed(i.targets))
    dense, logistic, few = _mixture_inputs(i), _mixture_inputs(logistic), _mixture_inputs(i, ("teacher", "target"))
    alone = (i.logits.clone(), None, None, i.tokens[:, 0], None, None, i.weight)
    for inputs in (dense, logistic, few, alone):
        inputs[0].requires_grad_()
    x, plain = i.logits.requires_grad_(), i.logits.detach()
    out = torch.ops.di4c.mixture(*dense, None, True)
    loss, stats = torch.ops.di4c.row_loss(2, i.target, None, x, i.weight)
    prob = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    return [
        ("random_bits", (keys, 3, 1)),
        ("sample", (plain[:, 0], keys, None, None, -1, 2, 0, 1.0, True)),
        ("sample", (plain[:, 0], keys, i.tokens[:, 0], prob, 37, 1, 0, 1.0, False)),
        ("mixture", (*dense, None, True)),
        ("mixture", (*few, None, False)),
        ("mixture", (*logistic, 37, True)),
        ("mixture", (*alone, None, False)),
        ("mixture_backward", _backward_inputs(dense, out)),
        ("mixture_backward", _backward_inputs(logistic, torch.ops.di4c.mixture(*logistic, 37, True), 37)),
        ("row_loss", (0, i.target, None, x, i.weight)),
        ("row_loss", (4, None, i.tokens[:, 0], x, None)),
        ("row_loss_backward", (torch.ones_like(loss), 2, i.target, None, plain, i.weight, stats.detach())),
    ]


@pytest.mark.parametrize("call", range(12))
def test_opcheck(backend, call):
    name, arguments = _op_calls(backend.device)[call]
    torch.library.opcheck(getattr(torch.ops.di4c, name).default, arguments)


def test_mixture_with_any_of_its_inputs_absent(backend):
    """Schema and FakeTensor rule hold for every combination, and what an absent input would add is not there."""
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    for present in itertools.product((True, False), repeat=len(INPUTS)):
        absent = [name for name, here in zip(INPUTS, present, strict=True) if not here]
        i = make(7, length=3).to(backend.device)
        inputs = _mixture_inputs(i, absent)
        information = "weight" in absent
        inputs[0].requires_grad_()
        torch.library.opcheck(torch.ops.di4c.mixture.default, (*inputs, None, information), test_utils=quick)
        outputs = torch.ops.di4c.mixture(*inputs, None, information)
        arguments = _backward_inputs(inputs, outputs)
        torch.library.opcheck(torch.ops.di4c.mixture_backward.default, arguments, test_utils=quick)
        joint, _, parts, _, lse_teacher, lse_target, share, pull = outputs
        for name, values in (
            ("teacher", (lse_teacher, parts[:2])),
            ("target", (lse_target, parts[2])),
            ("tokens", (joint, share)),
        ):
            assert all((value != 0).any() == (name not in absent) for value in values), (name, absent)
        assert (parts[3] != 0).any() == information
        assert pull.shape[0] == ("teacher" not in absent) + ("target" not in absent)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("empty", [None, "batch", "length"])
def test_fake_tensors(name, empty):
    """Shapes and dtypes are known without data, also where there is nothing."""
    i = make(9, torch.bfloat16, **({empty: 0} if empty else {}))
    real = value_and_grad(OPS[name], i)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = value_and_grad(OPS[name], replace(i, **{k: mode.from_tensor(v) for k, v in vars(i).items()}))
    for a, b in zip([*real[0], real[1]], [*fake[0], fake[1]], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def test_meta_tensors():
    x = torch.empty(2, 3, 5, device="meta")
    keys = torch.empty(2, dtype=torch.int64, device="meta")
    tokens, log_prob = ops.sample_categorical(x, keys, draws=4, return_log_prob=True)
    assert tokens.shape == log_prob.shape == (2, 4, 3) and tokens.device.type == "meta"
    assert ops.random_bits(keys, 7, stream_word=0).shape == (2, 7, 2)


def _everything(logits, target, tokens, weight, keys):
    """A training step's worth of ops in one graph: draws, losses, their sum."""
    x_t = tokens[:, 0]
    drawn = ops.sample_categorical(target, keys, draws=2)
    stepped = ops.absorbing_step(target, x_t, keys, unmask_prob=0.5, mask_id=3, temperature=0.8)
    joint, correlation = ops.mixture_log_prob(logits, drawn, weight)
    loss = joint.sum() + correlation.sum() + ops.mixture_kl(target, logits, weight).sum()
    objective = ops.mixture_objective(
        logits, teacher=target, data=x_t, samples=drawn, target=target, weight=weight, inside=x_t[:, 0] > 3
    )
    loss = loss + sum(value.sum() for value in objective)
    for op in (ops.masked_kl, ops.masked_reverse_kl, ops.masked_js, ops.masked_tv):
        loss = loss + op(target, logits, weight).sum()
    return loss + ops.masked_cross_entropy(logits, tokens[:, 0]).sum(), drawn, stepped


@inductor_config.patch(force_disable_caches=True)  # their keys hold the ops' names, not the shapes they return
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    # One of them with the code generator, which takes most of a minute: with sizes unknown from the start, once.
    options = {"backend": "inductor", "dynamic": True} if backend.is_native else {"backend": "aot_eager"}
    compiled = torch.compile(_everything, fullgraph=True, **options)
    for batch in (2, 3):  # the second makes the batch a symbol
        i = make(11, batch=batch).to(backend.device)
        keys = random.keys(0, batch, backend.device)
        eager = i.logits.clone().requires_grad_()
        traced = i.logits.clone().requires_grad_()
        loss, *tokens = _everything(eager, i.target, i.tokens, i.weight, keys)
        again, *tokens_again = compiled(traced, i.target, i.tokens, i.weight, keys)
        loss.backward()
        again.backward()
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(traced.grad, eager.grad)
        assert all(torch.equal(a, b) for a, b in zip(tokens, tokens_again, strict=True))


def test_compile_logistic_rows(backend):
    torch._dynamo.reset()

    def loss(mean, log_scale, i):
        x, teacher = (
            ops.Logistic(mean, log_scale, 11),
            ops.Logistic(mean[:, 0].detach(), log_scale[:, 0].detach(), 11),
        )
        objective = ops.mixture_objective(x, teacher=teacher, samples=i.tokens, weight=i.weight)
        return objective.distillation.sum() + objective.joint_samples.sum() - ops.mixture_kl(teacher, x).sum()

    i = make(11).to(backend.device)
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [i.logits[..., n].clone().requires_grad_() for n in range(2)]
        value = call(*leaves, i)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_call_still_checks_values(reference_ops):
    """Values are checked inside the op, so a compiled caller is told as well."""
    torch._dynamo.reset()
    i = make(5, weighted=False)
    compiled = torch.compile(lambda x, t: ops.masked_cross_entropy(x, t), fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, S\) = \[0, 5\)"):
        compiled(i.logits, i.tokens[:, 0] + 5)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(backend, name):
    i = make(29).to(backend.device)
    plain = OPS[name](i)
    with torch.autocast(backend.device.type, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(OPS[name](i), plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_refused(backend, name):
    i = make(7).to(backend.device)
    x = i.logits.requires_grad_()
    value = sum(v.sum() for v in OPS[name](replace(i, logits=x)))
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of its gradient is not provided"):
        grad.square().sum().backward()


def test_one_output_used_alone(backend):
    """The gradient of joint alone and of correlation alone add up to that of both."""
    i = make(13).to(backend.device)

    def grad(pick):
        x = i.logits.detach().clone().requires_grad_()
        pick(*ops.mixture_log_prob(x, i.tokens, i.weight)).sum().backward()
        return x.grad

    both = grad(lambda joint, correlation: joint + correlation)
    torch.testing.assert_close(
        grad(lambda joint, _: joint) + grad(lambda _, correlation: correlation), both, rtol=1e-4, atol=1e-6
    )


def test_expanded_gradient(backend):
    """sum().backward() hands the op a gradient of stride 0."""
    i = make(13).to(backend.device)
    for name in NAMES:
        x = i.logits.detach().clone().requires_grad_()
        sum(v.sum() for v in OPS[name](replace(i, logits=x))).backward()
        y = i.logits.double().requires_grad_()
        exact = replace(i.to(dtype=torch.float64), logits=y)
        sum(v.sum() for v in DEFINITIONS[name](exact)).backward()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=2e-6)


def test_draws_have_no_gradient():
    x = torch.randn(2, 3, 5, requires_grad=True)
    tokens, log_prob = ops.sample_categorical(x, random.keys(0, 2), return_log_prob=True)
    assert not tokens.requires_grad and not log_prob.requires_grad


def test_reference_names_match():
    """The error of the second derivative names a definition that exists."""
    for name in NAMES:
        x = make(5).logits.requires_grad_()
        value = OPS[name](replace(make(5), logits=x))[0].sum()
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError) as caught:
            grad.sum().backward()
        (definition,) = re.findall(r"di4c_ext\.ops\.reference\.(\w+)", str(caught.value))
        assert callable(getattr(reference, definition))
