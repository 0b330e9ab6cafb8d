"""The mixture's kernels, forward and backward, against the float64 definition."""

from __future__ import annotations

from dataclasses import replace

import emulate
import pytest
import torch
from comparison import LONG, STATES, layout_of, random_logits, random_tokens, random_weight
from mixtures import Mixture, check_mixture, run
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("tokens", "teacher", "target", "information", "all")


def mixture(
    states: int,
    *,
    kind: str = "all",
    batch: int = 2,
    latents: int = 3,
    length: int = 5,
    count: int = 4,
    targets: int = 2,
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    shift: float = 0.0,
    weighted: bool = True,
    split: bool = True,
    logistic: bool = False,
) -> Mixture:
    """Random operands; `kind` names which there are. With `split`, the samples are inside and outside by turns."""

    def operand(rows: int, seed: int, dtype: torch.dtype) -> Tensor:
        if logistic:
            return logistic_rows(batch, rows, length, seed)
        values = random_logits(batch, rows, length, states, dtype=torch.float32, seed=seed, scale=scale)
        return (values + shift).to(dtype)

    has = {name: kind in (name, "all") for name in KINDS}
    other = dtype if logistic else DTYPES[DTYPES.index(dtype) - 1]  # targets have a dtype of their own
    return Mixture(
        logits=operand(latents, 0, dtype),
        teacher=operand(1, 1, dtype) if has["teacher"] else None,
        target=operand(targets, 2, other) if has["target"] else None,
        first=random_tokens(states, batch, length, seed=1) if kind == "all" and count > 1 else None,
        tokens=random_tokens(states, batch, count - (kind == "all" and count > 1), length) if has["tokens"] else None,
        inside=(torch.arange(batch) % 2).to(torch.uint8) if split else None,
        weight=random_weight(batch, length) if weighted else None,
        information=has["information"],
        logistic_states=states if logistic else None,
    )


def logistic_rows(batch: int, rows: int, length: int, seed: int) -> Tensor:
    """Means in [-1, 1] and beyond, from scales that one bin holds to scales beyond the whole range."""
    generator = torch.Generator().manual_seed(seed + rows * length)
    mean = torch.rand(batch, rows, length, generator=generator) * 2.4 - 1.2
    log_scale = torch.rand(batch, rows, length, generator=generator) * 9 - 5
    return torch.stack([mean, log_scale], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [*STATES, 700])
def test_everything(states: int, dtype: torch.dtype) -> None:
    pad, offset = layout_of(states, dtype)
    short = states < 1000
    case = mixture(states, dtype=dtype, length=5 if short else 3, targets=1 + states % 2)
    check_mixture(case, pad=pad, offset=offset, orders=(0, 3) if short else (3,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_long_rows(dtype: torch.dtype) -> None:
    """A cluster's slices are what one CTA takes in turn: the same bits."""
    pad, offset = layout_of(LONG, dtype)
    case = mixture(LONG, batch=1, latents=4, length=1, count=2, targets=1, dtype=dtype, weighted=False, split=False)
    alone = check_mixture(case, pad=pad, offset=offset, orders=(1,))
    shared = run(case, pad=pad, offset=offset, orders=(1,), capability=90)
    for name, a, b in zip(alone._fields, alone, shared, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [23, 1030])
def test_each_alone(kind: str, states: int) -> None:
    """And without samples inside or outside, and without weights."""
    case = mixture(states, kind=kind, length=2, weighted=False, split=False, targets=1)
    check_mixture(case, orders=(0, 3))


@pytest.mark.parametrize(
    ("latents", "length", "count", "targets"),
    [(1, 1, 1, 1), (40, 3, 2, 3), (33, 20, 1, 1), (2, 37, 3, 9), (2, 2, 40, 1), (3, 4, 0, 2), (2, 530, 1, 1)],
)
def test_every_shape(latents: int, length: int, count: int, targets: int) -> None:
    """More components than lanes, more positions than a block, more sequences than states (repeated tokens)."""
    long = length > 100
    case = mixture(
        11, batch=1 if long else 2, latents=latents, length=length, count=count, targets=targets, split=not long
    )
    check_mixture(case, orders=(3,) if long else emulate.ORDERS)


def test_short_rows_of_many_components() -> None:
    """More than a warp has room for: then a CTA takes the position."""
    check_mixture(mixture(19, batch=1, latents=130, length=2, count=2, weighted=False, split=False), orders=(0, 3))


@pytest.mark.parametrize(("states", "latents", "count"), [(13, 2, 70), (700, 2, 515), (13, 130, 515)])
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_more_sequences_than_tables_hold(kind: str, states: int, latents: int, count: int) -> None:
    case = mixture(states, kind=kind, batch=1, latents=latents, length=1, count=count, weighted=False, split=False)
    check_mixture(case, orders=(2,))


@pytest.mark.parametrize("kind", ["tokens", "all"])
@pytest.mark.parametrize(("states", "count"), [(31, 3), (31, 70), (300, 40), (1030, 3), (2100, 3)])
def test_in_place(states: int, count: int, kind: str) -> None:
    """The gradient in the logits' place has the bits of one beside them."""
    for dtype in DTYPES[:2]:
        case = mixture(states, kind=kind, batch=1, latents=5, length=2, count=count, dtype=dtype, split=False)
        beside = run(case.poisoned(), orders=(0,)).grad
        for capability in (75, 90):
            over = run(case.poisoned(), orders=(1, 2), capability=capability, in_place=True).grad
            assert torch.equal(over, beside)


@pytest.mark.parametrize(
    ("scale", "shift"), [(0.1, 0.0), (60.0, 0.0), (3.0, 1000.0), (3.0, -1000.0)], ids=["flat", "sharp", "high", "low"]
)
def test_flat_sharp_and_shifted_rows(scale: float, shift: float) -> None:
    """Far from 0 a row loses nothing but the rounding of its logits."""
    for targets, dtype in zip((1, 2, 1), DTYPES, strict=True):
        case = mixture(300, length=3, dtype=dtype, scale=scale, shift=shift, targets=targets, split=False)
        check_mixture(case, orders=(3,))


def test_nearly_equal_rows() -> None:
    """Divergences of 1e-8 keep their digits."""
    case = mixture(300, kind="teacher", latents=2, weighted=False, split=False)
    assert case.teacher is not None
    near = case.teacher.expand_as(case.logits) + 1e-4 * case.logits
    case = replace(case, logits=near, target=case.teacher + 1e-4)
    got = check_mixture(case, orders=(0,))
    assert (got.parts[1] > 0).all() and (got.parts[1] < 1e-5).all()


def test_far_down_the_tail() -> None:
    """A class below the smallest float under every component still counts, through its logarithm."""
    target = torch.zeros(1, 1, 1, 4)
    logits = torch.tensor([[0.0, -150.0, -160.0, -140.0], [1.0, -145.0, -150.0, -155.0]]).view(1, 2, 1, 4)
    got = check_mixture(Mixture(logits, teacher=target, target=target))
    assert (got.parts[:3] > 100).all()


def test_impossible_tokens() -> None:
    """Probability 0 under one component, and under all: joint -inf, no part in the correlation."""
    case = mixture(9, kind="tokens", count=2, length=4, weighted=False)
    logits, tokens = case.logits, case.tokens
    assert tokens is not None
    logits[0, 1, 2, tokens[0, 0, 2]] = -torch.inf
    logits[1, :, 3, tokens[1, 1, 3]] = -torch.inf
    got = check_mixture(case)
    assert torch.isneginf(got.joint).tolist() == [[False, False], [tokens[1, 0, 3] == tokens[1, 1, 3], True]]
    assert got.correlation.isfinite().all() and got.grad.isfinite().all()


def test_impossible_classes() -> None:
    case = mixture(40, kind="target", batch=3, length=3, weighted=False, split=False)
    assert case.target is not None
    case.target[0, :, 1, :7] = -torch.inf  # impossible to the target: no loss
    case.logits[0, :, 1, 3] = -torch.inf  # impossible to both
    case.logits[1, :, 2, 11] = -torch.inf  # impossible to the components alone: infinite
    got = check_mixture(case)
    assert torch.isposinf(got.parts[2]).tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("states", [21, 600])
def test_bad_rows_and_tokens(states: int, bad: float) -> None:
    """A NaN row spoils its sample, a token outside its sequence; the others keep every bit."""
    case = mixture(states, batch=6, latents=2, length=3, count=2, dtype=torch.bfloat16, weighted=False, split=False)
    clean = run(case, orders=(0,))
    logits, first, tokens, teacher, target = (
        x.clone() for x in (case.logits, case.first, case.tokens, case.teacher, case.target) if x is not None
    )
    logits[1, 0, 2, 5] = bad
    tokens[2, 0, 0] = states
    first[3, 1] = -1
    teacher[4, 0, 1, 3] = bad
    target[5, 1, 2, 0] = bad
    got = run(replace(case, logits=logits, first=first, tokens=tokens, teacher=teacher, target=target))
    broken = [[False, False], [True, True], [False, True], [True, False], [False, False], [False, False]]
    for now, before in ((got.joint, clean.joint), (got.correlation, clean.correlation)):
        assert now.isnan().tolist() == broken
        assert torch.equal(now[~now.isnan()], before[~now.isnan()])
    of_teacher, of_target = [1, 4], [1, 5]
    for part, samples in ((0, of_teacher), (1, of_teacher), (2, of_target), (3, [1])):
        assert got.parts[part].isnan().nonzero()[:, 0].tolist() == samples
        assert torch.equal(got.parts[part][[0, 2, 3]], clean.parts[part][[0, 2, 3]])
    assert torch.equal(got.grad[0], clean.grad[0])
    assert [g.isnan().any().item() for g in got.grad] == [False, True, True, True, True, True]


@pytest.mark.parametrize("states", [2, 17, 256, 300, 1025])
def test_logistic(states: int) -> None:
    short = states < 1000
    case = mixture(states, logistic=True, length=5 if short else 2, targets=1 + states % 2)
    check_mixture(case, pad=states % 2, offset=1, orders=(0, 3) if short else (3,))


@pytest.mark.parametrize("kind", KINDS)
def test_logistic_each_alone(kind: str) -> None:
    check_mixture(mixture(64, kind=kind, length=3, logistic=True, split=False, count=70), orders=(0, 3))


def test_logistic_in_place() -> None:
    for states in (40, 700):
        case = mixture(states, logistic=True, length=2)
        beside = run(case.poisoned(), orders=(0,)).grad
        assert torch.equal(run(case.poisoned(), orders=(1, 2), in_place=True).grad, beside)


@pytest.mark.parametrize("empty", ["batch", "length", "count"])
def test_nothing(empty: str) -> None:
    got = run(mixture(5, **{empty: 0}), orders=(0,))  # type: ignore[arg-type]
    assert (got.parts == 0).all() if empty == "length" else got.parts.isfinite().all()


def test_too_many_components() -> None:
    with pytest.raises(emulate.KernelFault, match=r"mixture_positions takes at most 1024 components.*got L = 1025"):
        run(mixture(2, kind="tokens", batch=1, latents=1025, length=1, count=1), orders=(0,))
