"""Hidden logits of which some are certain or not asked for: the same draws and losses as of whole logits, and no row of
logits is made that nobody reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hidden_cases import make, whole, with_gradients
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Hidden, sample_hidden_op
from di4c_ext.ops.logits import settled

B, D, H, S = 3, 23, 6, 41


def rows(device: torch.device, bias: bool = True, dtype: torch.dtype = torch.float32) -> Hidden:
    """Products without rounding, so that every way to multiply gives the same bits."""
    g = torch.Generator().manual_seed(3)

    def exact(*shape: int) -> Tensor:
        return (torch.randint(-2, 3, shape, generator=g) / 2).to(device, dtype)

    return Hidden(exact(B, D, H), exact(S, H), exact(S) if bias else None)


def some_certain(device: torch.device, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(4)
    value = torch.randint(0, S, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.5, value, -1).to(device)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of logits made by each product of a draw."""
    seen: list[int] = []
    product, with_bias = torch.mm, torch.addmm

    def mm(a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        seen.append(len(a))
        return product(a, b, **options)

    def addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Tensor) -> Tensor:
        seen.append(len(a))
        return with_bias(bias, a, b, **options)

    monkeypatch.setattr(sample_hidden_op.torch, "mm", mm)
    monkeypatch.setattr(sample_hidden_op.torch, "addmm", addmm)
    return seen


def test_what_is_certain() -> None:
    hidden = rows(torch.device("cpu"))
    certain = some_certain(hidden.device, B, D)
    logits = hidden._replace(certain=certain).logits()
    known = certain >= 0
    assert torch.equal(logits[~known], hidden.logits()[~known])
    one_hot = torch.nn.functional.one_hot(certain[known], S).float()
    assert torch.equal(logits.softmax(-1)[known], one_hot)
    assert torch.equal(settled(hidden.logits(), certain), logits)
    lifted = hidden._replace(certain=certain).mapped(lambda x: x[:, None])
    assert lifted.shape == (B, 1, D, S) and torch.equal(lifted.logits()[:, 0], logits)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("mask_id", [S, 5])
@pytest.mark.parametrize("draws", [None, 3])
def test_a_step_is_that_from_whole_logits(backend, mask_id: int, draws: int | None, top_p: float, monkeypatch) -> None:
    keys = random.keys(2, B, backend.device)
    g = torch.Generator().manual_seed(5)
    x_t = torch.where(torch.rand(B, D, generator=g) < 0.6, mask_id, 3).to(backend.device)
    unmask = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, device=backend.device)
    options = {"unmask_prob": unmask, "mask_id": mask_id, "draws": draws, "stream": 1, "temperature": 0.8}
    for hidden in (rows(backend.device), rows(backend.device, bias=False, dtype=torch.bfloat16)):
        expected = ops.absorbing_step(hidden.logits(), x_t, keys, top_p=top_p, return_log_prob=True, **options)
        found = ops.absorbing_step(hidden, x_t, keys, top_p=top_p, return_log_prob=True, **options)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert found[0].eq(x_t if draws is None else x_t[:, None]).float().mean() < 1  # some was unmasked
    with pytest.raises(ValueError, match=r"unmask_prob must lie in \[0, 1\]"):
        ops.absorbing_step(hidden, x_t, keys, **{**options, "unmask_prob": unmask + 0.5})


@pytest.mark.parametrize("chunk_bytes", [1, 9000, 1 << 30])
@pytest.mark.parametrize("draws", [1, 4])
def test_only_rows_that_are_unmasked_are_made(kernels, made: list[int], chunk_bytes: int, draws: int) -> None:
    hidden, keys = rows(kernels.device), random.keys(6, B, kernels.device)
    x_t = torch.full((B, D), S, device=kernels.device)
    x_t[:, ::4] = 1
    unmask = torch.full((B,), 0.1, dtype=torch.float64, device=kernels.device)
    step = S, draws, 0, 1.0, 1.0, False, 0, chunk_bytes
    found, _ = torch.ops.di4c.sample_hidden(*hidden, keys, x_t, unmask, *step)
    settings = {"unmask_prob": 0.1, "mask_id": S, "draws": draws}
    expected = ops.absorbing_step(hidden.logits(), x_t, keys, **settings)
    assert torch.equal(found, expected)
    wanted = ((expected != x_t[:, None]).any(1)).sum().item()
    assert 0 < wanted < B * D / 2 and sum(made) == wanted
    # Nothing else is looked at: not the states of other rows either.
    bad = hidden.states.masked_fill(~(expected != x_t[:, None]).any(1)[..., None], torch.nan)
    assert torch.equal(ops.absorbing_step(hidden._replace(states=bad), x_t, keys, **settings), expected)


@pytest.mark.parametrize("chunk_bytes", [1, 9000, 1 << 30])
def test_what_is_certain_is_drawn_without_being_made(kernels, made: list[int], chunk_bytes: int) -> None:
    hidden, keys = rows(kernels.device, bias=False), random.keys(7, B, kernels.device)
    certain = some_certain(kernels.device, B, D)
    told = hidden._replace(certain=certain, states=hidden.states.masked_fill(certain[..., None] >= 0, torch.nan))
    options = {"draws": 2, "first_position": 5, "return_log_prob": True}
    found = ops.sample_categorical_from_hidden(told, keys, chunk_bytes=chunk_bytes, **options)
    assert sum(made) == int((certain < 0).sum())
    expected = ops.sample_categorical(settled(hidden.logits(), certain), keys, **options)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert bool((found[0] == certain[:, None])[(certain >= 0)[:, None].expand_as(found[0])].all())


def test_certain_rows_of_a_step(backend) -> None:
    hidden, keys = rows(backend.device), random.keys(8, B, backend.device)
    told = hidden._replace(certain=some_certain(backend.device, B, D))
    x_t = torch.full((B, D), S, device=backend.device)
    options = {"unmask_prob": 0.5, "mask_id": S}
    assert torch.equal(
        ops.absorbing_step(told, x_t, keys, **options), ops.absorbing_step(told.logits(), x_t, keys, **options)
    )


def test_nothing_to_draw(backend) -> None:
    hidden = rows(backend.device)
    keys = random.keys(0, B, backend.device)
    clean = torch.zeros(B, D, dtype=torch.int64, device=backend.device)
    assert torch.equal(ops.absorbing_step(hidden, clean, keys, unmask_prob=1.0, mask_id=S), clean)
    none = Hidden(hidden.states[:0], hidden.weight, hidden.bias)
    assert ops.absorbing_step(none, clean[:0], keys[:0], unmask_prob=1.0, mask_id=S).shape == (0, D)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_a_target_of_which_some_is_certain(backend, chunk_bytes: int) -> None:
    """The consistency target's law: values and gradients of the same logits made whole."""
    case = make(exact=True, inside=False).to(backend.device)
    certain = torch.where(case.tokens[:, :2] % 3 == 0, case.tokens[:, :2], -1)
    told = replace(case, target=case.target._replace(certain=certain))

    def pieces(name: str, case_) -> tuple[Tensor, ...]:
        return tuple(
            ops.mixture_objective_from_hidden(
                case_.student,
                teacher=case_.teacher,
                data=case_.tokens[:, 0],
                samples=case_.tokens,
                target=case_.target,
                weight=case_.weight,
                inside=case_.inside,
                information=True,
                chunk_bytes=chunk_bytes,
            )
        )

    found, expected = (with_gradients(run, "mixture_objective", told) for run in (pieces, whole))
    plain = pieces("mixture_objective", case)
    assert not torch.allclose(plain[2], found[0][2])  # marginal_target
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_a_teacher_of_several_components(backend, keep_bytes: int) -> None:
    """It enters by its mean, which is never whole."""
    case = make(exact=True).to(backend.device)
    mixture = case.target  # (B, 2, D, S)
    mean = mixture.logits().double().softmax(-1).mean(1).log()
    common = {"data": case.tokens[:, 0], "samples": case.tokens, "weight": case.weight, "inside": case.inside}
    results = []
    for teacher in (mixture, mean.float()):
        states = case.student.states.detach().requires_grad_()
        student = case.student._replace(states=states)
        found = ops.mixture_objective_from_hidden(
            student, teacher=teacher, chunk_bytes=1, keep_bytes=keep_bytes, **common
        )
        (found.distillation.sum() + 0.5 * found.marginal_teacher.sum() + found.joint_data.sum()).backward()
        results.append([found.distillation, found.marginal_teacher, found.joint_data, states.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


def test_refusals() -> None:
    case = make()
    told = case.student._replace(certain=torch.full(case.student.states.shape[:-1], -1))
    with pytest.raises(ValueError, match=r"mixture_log_prob_from_hidden: logits.certain must be None"):
        ops.mixture_log_prob(told, case.tokens)
    short = case.target._replace(certain=torch.zeros(3, 2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target\.certain must have shape"):
        ops.mixture_kl(short, case.student)
