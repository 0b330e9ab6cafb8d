"""mixture_log_prob and mixture_kl, forward and backward, against the float64 definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import emulate
import pytest
import torch
from comparison import (
    LONG,
    STATES,
    check,
    check_planes,
    layout_of,
    poison,
    random_logits,
    random_tokens,
    random_weight,
)
from torch import Tensor

from di4c_ext.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = 16  # config.h: kPositions


def gradient_weights(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, torch.Size(shape).numel() + 1)[1:].view(*shape)


def log_prob(
    logits: Tensor,
    tokens: Tensor,
    weight: Tensor | None,
    *,
    pad: int = 0,
    offset: int = 0,
    orders: Sequence[int] = emulate.ORDERS,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' joint, correlation and gradient (for the output gradients that `gradient_weights` gives)."""
    batch, latents, length, states = logits.shape
    count = tokens.shape[1]
    inputs = {
        "logits": emulate.lay_out(logits, pad, offset),
        "tokens": tokens,
        "weight": weight,
        **{"B": batch, "L": latents, "D": length, "S": states, "K": count},
    }
    blocks = -(-length // POSITIONS)
    forward = emulate.run(
        "mixture_log_prob",
        inputs,
        {
            "joint": ((batch, count), torch.float32),
            "correlation": ((batch, count), torch.float32),
            "lse": ((2, batch, latents, length), torch.float32),
            "share": ((batch, latents, count), torch.float32),
            "work": ((batch, blocks, latents + 1, count), torch.float64),
        },
        orders=orders,
    )
    check_planes(forward["lse"], logits, weight)
    kept = {name: forward[name] for name in ("lse", "share")}
    upstream = {"grad_joint": gradient_weights(batch, count), "grad_correlation": -gradient_weights(batch, count) + 0.5}
    backward = emulate.run(
        "mixture_log_prob_backward",
        {**inputs, **kept, **upstream},
        {"grad": (logits.shape, logits.dtype)},
        orders=orders,
    )
    return forward["joint"], forward["correlation"], backward["grad"]


def log_prob_definition(logits: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    joint, correlation, lse, share = reference.mixture_log_prob_forward(logits, tokens, weight)
    upstream = gradient_weights(*joint.shape).to(joint.dtype)
    grad = reference.mixture_log_prob_backward(upstream, 0.5 - upstream, logits, tokens, weight, lse, share)
    return joint, correlation, grad


def check_log_prob(
    logits: Tensor, tokens: Tensor, weight: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    got = log_prob(poison(logits, weight), tokens, weight, **options)
    exact = log_prob_definition(logits.double(), tokens, weight)
    plain = log_prob_definition(logits, tokens, weight)
    for i, name in enumerate(("joint", "correlation", "grad")):
        check(got[i], exact[i], plain[i], name)
    if weight is not None:
        assert (got[2].transpose(1, 2)[weight == 0] == 0).all()
    return got


@pytest.mark.parametrize("states", STATES)
def test_log_prob(states: int) -> None:
    for dtype in DTYPES:
        logits = random_logits(2, 3, 5, states, dtype=dtype)
        pad, offset = layout_of(states, dtype)
        tokens = random_tokens(states, 2, 4, 5)
        check_log_prob(logits, tokens, random_weight(2, 5), pad=pad, offset=offset, orders=(0, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_of_many_states(dtype: torch.dtype) -> None:
    pad, offset = layout_of(LONG, dtype)
    logits = random_logits(1, 2, 1, LONG, dtype=dtype)
    check_log_prob(logits, random_tokens(LONG, 1, 2, 1), None, pad=pad, offset=offset, orders=(1,))


@pytest.mark.parametrize(
    ("latents", "length", "count"),
    [(1, 1, 1), (40, 3, 2), (33, 20, 1), (2, 37, 3), (2, 2, 40), (3, 4, 0)],
)
def test_log_prob_of_every_shape(latents: int, length: int, count: int) -> None:
    """More components than lanes, more positions than a block, more sequences than states (repeated tokens)."""
    logits = random_logits(2, latents, length, 11, dtype=torch.float32)
    check_log_prob(logits, random_tokens(11, 2, count, length), random_weight(2, length))


def test_log_prob_of_more_sequences_than_one_launch_takes() -> None:
    logits = random_logits(1, 2, 1, 13, dtype=torch.float32)
    check_log_prob(logits, random_tokens(13, 1, 515, 1), None, orders=(2,))


@pytest.mark.parametrize("scale", [0.1, 60.0])
def test_log_prob_of_flat_and_of_sharp_rows(scale: float) -> None:
    logits = random_logits(2, 4, 6, 300, dtype=torch.float32, scale=scale)
    check_log_prob(logits, random_tokens(300, 2, 4, 6), None)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_of_shifted_rows(dtype: torch.dtype, shift: float) -> None:
    """Far from 0 a row loses nothing but the rounding of its logits."""
    logits = (random_logits(2, 3, 5, 300, dtype=torch.float32) + shift).to(dtype)
    check_log_prob(logits, random_tokens(300, 2, 4, 5), random_weight(2, 5))


def test_log_prob_where_tokens_are_impossible() -> None:
    """Probability 0 under one component, and under all: joint -inf, no part in the correlation."""
    logits = random_logits(2, 3, 4, 9, dtype=torch.float32)
    tokens = random_tokens(9, 2, 2, 4)
    logits[0, 1, 2, tokens[0, 0, 2]] = -torch.inf
    logits[1, :, 3, tokens[1, 1, 3]] = -torch.inf
    joint, correlation, grad = check_log_prob(logits, tokens, None)
    assert torch.isneginf(joint).tolist() == [[False, False], [tokens[1, 0, 3] == tokens[1, 1, 3], True]]
    assert correlation.isfinite().all() and grad.isfinite().all()


def test_log_prob_of_bad_rows_and_tokens() -> None:
    """A NaN row spoils its sample, a token outside its sequence; the others keep every bit."""
    logits = random_logits(4, 2, 3, 21, dtype=torch.bfloat16)
    tokens = random_tokens(21, 4, 2, 3)
    clean = log_prob(logits, tokens, None)
    for bad in (torch.nan, torch.inf):
        logits[1, 0, 2, 5] = bad
        tokens[2, 1, 0] = 21
        tokens[3, 0, 1] = -1
        joint, correlation, grad = log_prob(logits, tokens, None)
        broken = [[False, False], [True, True], [False, True], [True, False]]
        for got, before in ((joint, clean[0]), (correlation, clean[1])):
            assert got.isnan().tolist() == broken
            assert torch.equal(got[~got.isnan()], before[~got.isnan()])
        assert torch.equal(grad[0], clean[2][0]) and grad[1].isnan().any()


def kl(
    target: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    *,
    pad: int = 0,
    offset: int = 0,
    orders: Sequence[int] = emulate.ORDERS,
) -> tuple[Tensor, Tensor]:
    """The kernels' KL and gradient."""
    batch, latents, length, states = logits.shape
    parts = target.shape[1]
    inputs = {
        "target": emulate.lay_out(target, pad, (offset + 1) % 4),
        "logits": emulate.lay_out(logits, pad, offset),
        "weight": weight,
        **{"B": batch, "T": parts, "L": latents, "D": length, "S": states},
    }
    forward = emulate.run(
        "mixture_kl",
        inputs,
        {
            "kl": ((batch,), torch.float32),
            "lse_target": ((2, batch, parts, length), torch.float32),
            "lse": ((2, batch, latents, length), torch.float32),
            "pull": ((batch, latents, length), torch.float32),
            "row": ((batch, length), torch.float32),
        },
        orders=orders,
    )
    check_planes(forward["lse_target"], target, weight)
    check_planes(forward["lse"], logits, weight)
    kept = {name: forward[name] for name in ("lse_target", "lse", "pull")}
    backward = emulate.run(
        "mixture_kl_backward",
        {**inputs, **kept, "grad_kl": gradient_weights(batch)},
        {"grad": (logits.shape, logits.dtype)},
        orders=orders,
    )
    return forward["kl"], backward["grad"]


def kl_definition(target: Tensor, logits: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    value, lse_target, lse, pull = reference.mixture_kl_forward(target, logits, weight)
    upstream = gradient_weights(*value.shape).to(value.dtype)
    return value, reference.mixture_kl_backward(upstream, target, logits, weight, lse_target, lse, pull)


def check_kl(target: Tensor, logits: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    got = kl(poison(target, weight), poison(logits, weight), weight, **options)
    exact = kl_definition(target.double(), logits.double(), weight)
    plain = kl_definition(target, logits, weight)
    for i, name in enumerate(("kl", "grad")):
        check(got[i], exact[i], plain[i], name)
    if weight is not None:
        assert (got[1].transpose(1, 2)[weight == 0] == 0).all()
    return got[0]


@pytest.mark.parametrize("states", STATES)
def test_kl(states: int) -> None:
    for i, dtype in enumerate(DTYPES):
        target = random_logits(2, 1 + i % 2, 4, states, dtype=DTYPES[i - 1], seed=1)
        logits = random_logits(2, 3, 4, states, dtype=dtype)
        pad, offset = layout_of(states, dtype)
        check_kl(target, logits, random_weight(2, 4), pad=pad, offset=offset, orders=(0, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_many_states(dtype: torch.dtype) -> None:
    target = random_logits(1, 1, 1, LONG, dtype=dtype, seed=1)
    logits = random_logits(1, 2, 1, LONG, dtype=dtype)
    pad, offset = layout_of(LONG, dtype)
    check_kl(target, logits, None, pad=pad, offset=offset, orders=(1,))


@pytest.mark.parametrize(("parts", "latents", "length"), [(1, 1, 1), (3, 40, 2), (9, 2, 530)])
def test_kl_of_every_shape(parts: int, latents: int, length: int) -> None:
    target = random_logits(1, parts, length, 5, dtype=torch.float32, seed=1)
    logits = random_logits(1, latents, length, 5, dtype=torch.float32)
    check_kl(target, logits, random_weight(1, length), orders=(0, 1))


@pytest.mark.parametrize(("scale", "shift"), [(0.1, 0.0), (60.0, 0.0), (3.0, 1000.0), (3.0, -1000.0)])
@pytest.mark.parametrize("parts", [1, 2])
def test_kl_of_flat_sharp_and_shifted_rows(parts: int, scale: float, shift: float) -> None:
    for dtype in DTYPES:
        target = (random_logits(2, parts, 4, 300, dtype=torch.float32, seed=1, scale=scale) + shift).to(dtype)
        logits = (random_logits(2, 3, 4, 300, dtype=torch.float32, scale=scale) + shift).to(dtype)
        check_kl(target, logits, random_weight(2, 4), orders=(0, 3))


def test_kl_far_down_the_tail() -> None:
    """A class below the smallest float under every component still counts, through its logarithm."""
    target = torch.zeros(1, 1, 1, 4)
    logits = torch.tensor([[0.0, -150.0, -160.0, -140.0], [1.0, -145.0, -150.0, -155.0]]).view(1, 2, 1, 4)
    assert check_kl(target, logits, None).item() > 100


def test_kl_of_impossible_classes_and_bad_rows() -> None:
    target = random_logits(5, 2, 3, 40, dtype=torch.float32, seed=1)
    logits = random_logits(5, 3, 3, 40, dtype=torch.float32)
    clean = check_kl(target, logits, None)
    target[0, :, 1, :7] = -torch.inf  # impossible to the target: no loss
    logits[0, :, 1, 3] = -torch.inf  # impossible to both
    logits[1, :, 2, 11] = -torch.inf  # impossible to the components alone: infinite
    logits[2, 1, 0, 39] = torch.nan
    target[3, 0, 2, 0] = torch.inf
    got, grad = kl(target, logits, None)
    exact, exact_grad = kl_definition(target.double(), logits.double(), None)
    check(got, exact, exact, "kl")
    check(grad[[0, 1, 4]], exact_grad[[0, 1, 4]], exact_grad[[0, 1, 4]], "grad")
    assert torch.isposinf(got).tolist() == [False, True, False, False, False]
    assert got.isnan().tolist() == [False, False, True, True, False]
    assert got[4] == clean[4]
