"""The ops as PyTorch operators: opcheck, FakeTensor, meta, torch.compile, AMP, and what autograd may ask of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import DEFINITIONS, OPS, make, value_and_grad
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode

from di4c_ext import ops, random
from di4c_ext.ops import reference

NAMES = list(OPS)


def _op_calls(device):
    """One call of every registered operator: name, arguments."""
    i = make(37).to(device)
    keys = random.keys(0, 2, device)
    x = i.logits.requires_grad_()
    joint, _, lse, share = torch.ops.di4c.mixture_log_prob(x, i.tokens, i.weight)
    kl, *kl_saved = torch.ops.di4c.mixture_kl(i.targets, x, i.weight)
    loss, stats = torch.ops.di4c.row_loss(2, i.target, None, x, i.weight)
    prob = torch.full((2,), 0.5, dtype=torch.float64, device=device)
    plain = x.detach()
    saved = [v.detach() for v in (lse, share)], [v.detach() for v in kl_saved], stats.detach()
    return [
        ("random_bits", (keys, 3, 1)),
        ("sample", (plain[:, 0], keys, None, None, -1, 2, 0, 1.0, True)),
        ("sample", (plain[:, 0], keys, i.tokens[:, 0], prob, 37, 1, 0, 1.0, False)),
        ("mixture_log_prob", (x, i.tokens, i.weight)),
        ("mixture_log_prob", (x, i.tokens, None)),
        (
            "mixture_log_prob_backward",
            (torch.ones_like(joint), torch.ones_like(joint), plain, i.tokens, i.weight, *saved[0]),
        ),
        ("mixture_kl", (i.targets, x, i.weight)),
        ("mixture_kl_backward", (torch.ones_like(kl), i.targets, plain, None, *saved[1])),
        ("row_loss", (0, i.target, None, x, i.weight)),
        ("row_loss", (4, None, i.tokens[:, 0], x, None)),
        ("row_loss_backward", (torch.ones_like(loss), 2, i.target, None, plain, i.weight, saved[2])),
    ]


@pytest.mark.parametrize("call", range(11))
def test_opcheck(backend, call):
    name, arguments = _op_calls(backend.device)[call]
    torch.library.opcheck(getattr(torch.ops.di4c, name).default, arguments)


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
    for op in (ops.masked_kl, ops.masked_reverse_kl, ops.masked_js, ops.masked_tv):
        loss = loss + op(target, logits, weight).sum()
    return loss + ops.masked_cross_entropy(logits, tokens[:, 0]).sum(), drawn, stepped


@inductor_config.patch(force_disable_caches=True)  # their keys hold the ops' names, not the shapes they return
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(_everything, fullgraph=True, dynamic=None)
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
    for name in ("mixture_log_prob", "mixture_kl", "row_loss"):
        assert callable(getattr(reference, name))
