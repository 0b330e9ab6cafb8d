"""Which rows are read and which results they touch: weights, bad rows, strides, batches, threads, nothing at all."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from cases import DTYPES, OPS, READS_TARGET, Inputs, assert_same, make, same_bits, value_and_grad

from di4c_ext import ops, random

NAMES = list(OPS)


def _poison(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
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


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_bad_row_spoils_its_sample_only(backend, name, bad):
    """A NaN, a row of -inf or a +inf in sample 1 of 3: its values are NaN, the others' bits do not change."""
    i = make(1100, batch=3, length=4, weighted=False).to(backend.device)
    logits = i.logits.clone()
    logits[1, :, 2, :] = torch.where(torch.arange(1100, device=backend.device) == 1050, bad, logits[1, :, 2, :])
    if bad == -torch.inf:
        logits[1, :, 2, :] = bad
    spoiled = replace(i, logits=logits)
    values, _ = value_and_grad(OPS[name], spoiled)
    assert all(v[1].isnan().all() for v in values)
    assert_same(name, i, spoiled, pick=lambda x: x[[0, 2]])


@pytest.mark.parametrize("name", READS_TARGET)
def test_bad_target_row_spoils_its_sample_only(backend, name):
    i = make(1100, batch=3, length=4, weighted=False).to(backend.device)
    target, targets = i.target.clone(), i.targets.clone()
    target[1, 2, 1050] = targets[1, 0, 2, 1050] = torch.nan
    spoiled = replace(i, target=target, targets=targets)
    assert OPS[name](spoiled)[0][1].isnan().all()
    assert_same(name, i, spoiled, pick=lambda x: x[[0, 2]])


def _strided(x: torch.Tensor, offset: int, gap: int) -> torch.Tensor:
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


@pytest.mark.parametrize("name", NAMES)
def test_any_strides(backend, name):
    i = make(60, length=6).to(backend.device)
    permuted = i.logits.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert_same(name, i, replace(i, logits=permuted))
    classes_apart = i.logits.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same(name, i, replace(i, logits=classes_apart, target=i.target.mT.contiguous().mT))
    one = i.logits[:, :1]
    repeated = replace(i, logits=one.expand(-1, 3, -1, -1))
    assert_same(name, repeated, replace(i, logits=repeated.logits.contiguous()))


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


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(kernels, name):
    if kernels.name != "cpu":
        pytest.skip("threads are the CPU's")
    i = make(2100, batch=3, length=40)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(value_and_grad(OPS[name], i))
    for values, grad in results[1:]:
        assert same_bits(grad, results[0][1])
        assert all(same_bits(a, b) for a, b in zip(values, results[0][0], strict=True))


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
    for name in NAMES[3:]:
        alone = OPS[name](replace(i, logits=i.logits[:, 1]))[0]
        assert alone.shape == (2,) and same_bits(alone, OPS[name](i)[0][:, 1])


def test_only_the_logits_are_kept(backend):
    """Nothing of the logits' size is saved for the gradient but the inputs themselves."""
    i = make(4096, length=3).to(backend.device)
    given = {getattr(i, f.name).untyped_storage().data_ptr() for f in fields(i)}
    for name in NAMES:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            OPS[name](replace(i, logits=i.logits.detach().requires_grad_()))
        assert kept
        assert all(x.untyped_storage().data_ptr() in given or x.numel() <= 1000 for x in kept)


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
