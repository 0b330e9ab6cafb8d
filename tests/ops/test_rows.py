"""Which rows are read and which results they touch: weights, layouts, batches, threads, nothing at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import calls
import pytest
import torch
from cases import DTYPES, OPS, Inputs, assert_same, make, same_bits, value_and_grad
from torch import Tensor

from di4c_ext import ops, random

NAMES = list(OPS)


def _poison(x: Tensor, where: Tensor) -> Tensor:
    """NaN in the rows (B, ..., D, S) where (B, D) says so."""
    shape = (where.shape[0], *[1] * (x.dim() - 3), where.shape[1], 1)
    return x.masked_fill(where.view(shape), torch.nan)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_weight_zero_are_not_read(backend, name):
    for dtype in DTYPES:
        i = make(77, dtype, length=20).to(backend.device)
        zero = i.weight == 0
        assert zero.any()
        poisoned = replace(
            i,
            logits=_poison(i.logits, zero),
            target=_poison(i.target, zero),
            targets=_poison(i.targets, zero),
            tokens=i.tokens.masked_fill(zero[:, None], -100),
        )
        assert_same(name, i, poisoned)
        _, grad = value_and_grad(OPS[name], poisoned)
        assert (grad.transpose(1, 2)[zero] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_sample_without_weight_is_zero(backend, name):
    i = make(50, length=6).to(backend.device)
    i.weight[0] = 0.0
    values, grad = value_and_grad(OPS[name], i)
    assert all((v[0] == 0).all() and (v[1] != 0).any() for v in values)
    assert (grad[0] == 0).all() and (grad[1] != 0).any()


def _strided(x: Tensor, offset: int, gap: int) -> Tensor:
    """The same values at an offset of `offset` elements, `gap` unused elements (NaN) after every row."""
    rows = x.numel() // x.shape[-1]
    flat = x.new_full((offset + rows * (x.shape[-1] + gap),), torch.nan)
    view = flat[offset:].view(*x.shape[:-1], x.shape[-1] + gap)[..., : x.shape[-1]]
    view.copy_(x)
    return view


@pytest.mark.parametrize("name", NAMES)
def test_every_misalignment(backend, name):
    for dtype in DTYPES:
        for states in (16, 37):
            i = make(states, dtype).to(backend.device)
            for offset in range(8):
                moved = replace(
                    i,
                    logits=_strided(i.logits, offset, offset % 3),
                    target=_strided(i.target, 7 - offset, 1),
                    targets=_strided(i.targets, 7 - offset, 0),
                )
                assert_same(name, i, moved)


def _every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def _transposed(x: Tensor) -> Tensor:
    """The last dimension is the slowest."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _off_by_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    """The first of all, again and again."""
    return x[:1].expand_as(x)


@pytest.mark.parametrize("lay_out", [_every_other, _transposed, _off_by_one, _expanded])
@pytest.mark.parametrize("name", calls.NAMES)
def test_any_layout(backend, name, lay_out):
    """Every tensor of every op in a layout of its own, those that must be copied included: the bits do not change."""
    for dtype in DTYPES:
        call = calls.make(name, 60, dtype, batch=3).to(backend.device)
        moved = call.each(lay_out)
        dense = moved.each(lambda x: x.clone(memory_format=torch.contiguous_format))
        (values, grads), (expected, expected_grads) = calls.run(moved), calls.run(dense)
        for got, want in zip([*values, *grads], [*expected, *expected_grads], strict=True):
            if name.endswith("_of_hidden") and got.is_floating_point():  # the product with the head may be rounded anew
                torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
            else:
                assert same_bits(got, want), dtype


def test_offsets_above_32_bits(backend):
    """Rows further apart than 2^31 elements: strides are 64 bits all the way down."""
    if backend.device.type != "cpu":
        pytest.skip("needs no device")
    far = torch.empty_strided((2, 1, 2, 33), ((1 << 31) + 64, 0, 33, 1), dtype=torch.float16)
    far.copy_(make(33, torch.float16, components=1, length=2).logits)
    i = make(33, torch.float16, components=1, length=2)
    for name in ("mixture_log_prob", "masked_kl"):
        assert_same(name, i, replace(i, logits=far))


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_its_samples(backend, name):
    i = make(131, torch.bfloat16, batch=64, length=3).to(backend.device)
    values = OPS[name](i)
    for b in (0, 1, 17, 63):
        alone = OPS[name](i.samples(slice(b, b + 1)))
        assert all(same_bits(v[b : b + 1], a) for v, a in zip(values, alone, strict=True))


@pytest.mark.parametrize("name", calls.NAMES)
def test_runs_change_no_bit(kernels, name):
    """20 runs, every other one on two threads, but where a head is multiplied with: that is the matrix library's."""
    fixed = name.endswith("_of_hidden")
    call = calls.make(name, 1100, batch=3, length=40).to(kernels.device)
    first = None
    for time in range(20):
        torch.set_num_threads(1 if fixed else 1 + time % 2)
        values, grads = calls.run(call)
        first = first or [*values, *grads]
        assert all(same_bits(a, b) for a, b in zip([*values, *grads], first, strict=True))


def test_callers_on_many_threads(kernels):
    """Ops called from several Python threads at once, which share one pool of workers."""
    torch.set_num_threads(2)
    all_calls = [calls.make(name, 1100, length=40).to(kernels.device) for name in calls.NAMES]
    alone = [call() for call in all_calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: call(), all_calls * 3))
    for values, expected in zip(together, alone * 3, strict=True):
        assert all(same_bits(a, b) for a, b in zip(values, expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("empty", ["batch", "length", "sequences"])
def test_nothing_to_do(backend, name, empty):
    i = make(9, **{empty: 0}).to(backend.device)
    values, grad = value_and_grad(OPS[name], _with_row_tokens(i) if name == "masked_cross_entropy" else i)
    assert grad.shape == i.logits.shape
    for value in values:
        assert value.shape[0] == i.logits.shape[0]
        if empty == "length":
            assert (value == 0).all()


def _with_row_tokens(i: Inputs) -> Inputs:
    return i if i.tokens.shape[1] else replace(i, tokens=i.tokens.new_zeros((i.tokens.shape[0], 1, i.tokens.shape[2])))


def test_student_without_latents(backend):
    """Logits (B, D, S) give (B,), the column of one component."""
    i = make(45).to(backend.device)
    for name in (name for name in NAMES if name.startswith("masked")):
        alone = OPS[name](replace(i, logits=i.logits[:, 1]))[0]
        assert alone.shape == (2,) and same_bits(alone, OPS[name](i)[0][:, 1])


def test_more_than_2_31_elements(kernels):
    """The last samples of a tensor that 32-bit offsets cannot reach."""
    if kernels.name != "cuda" or torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs a GPU with 16 GB free")
    states, batch = 1 << 16, (1 << 15) + 100
    x = torch.randn(batch, 1, states, dtype=torch.float16, device="cuda")
    keys, tokens = random.keys(0, batch, "cuda"), torch.full((batch, 1), 9, device="cuda")
    drawn, loss = ops.sample_categorical(x, keys), ops.masked_cross_entropy(x, tokens)
    for few in (slice(0, 3), slice(batch - 3, batch)):
        assert torch.equal(ops.sample_categorical(x[few].clone(), keys[few]), drawn[few])
        assert torch.equal(ops.masked_cross_entropy(x[few].clone(), tokens[few]), loss[few])
