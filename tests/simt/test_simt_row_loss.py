"""The five row losses, forward and backward, against the float64 definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import emulate
import pytest
import torch
from comparison import LONG, STATES, check, check_planes, layout_of, poison, random_logits, random_tokens, random_weight
from torch import Tensor

from di4c_ext.ops import reference

KINDS = {"forward_kl": 0, "reverse_kl": 1, "js": 2, "tv": 3, "cross_entropy": 4}  # api.h: RowLoss
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient_weights(*shape: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, torch.Size(shape).numel() + 1)[1:].view(*shape)


def loss(
    kind: str,
    target: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    *,
    pad: int = 0,
    offset: int = 0,
    way: str = "turns",
    orders: Sequence[int] = emulate.ORDERS,
) -> tuple[Tensor, Tensor]:
    """The kernels' loss (B, L) and gradient. `target`: logits (B, D, S), or tokens (B, D) for cross entropy."""
    batch, latents, length, states = logits.shape
    to_tokens = kind == "cross_entropy"
    inputs = {
        "kind": KINDS[kind],
        "target": None if to_tokens else emulate.lay_out(target[:, None], pad, (offset + 2) % 5),
        "tokens": target if to_tokens else None,
        "logits": emulate.lay_out(logits, pad, offset),
        "weight": weight,
        "split": emulate.workspace(way, batch * latents * length, 32),
        **{"B": batch, "L": latents, "D": length, "S": states},
    }
    capability = emulate.WAYS[way][0]
    forward = emulate.run(
        "row_loss",
        inputs,
        {
            "loss": ((batch, latents), torch.float32),
            "stats": ((5, batch, latents, length), torch.float32),
            "row": ((batch, latents, length), torch.float32),
        },
        orders=orders,
        capability=capability,
    )
    stats = forward["stats"]
    check_planes(stats[:2], logits, weight)
    if to_tokens:
        assert (stats[2:4] == 0).all()
    else:
        check_planes(stats[2:4], target[:, None].expand_as(logits), weight)
    backward = emulate.run(
        "row_loss_backward",
        {**inputs, "stats": stats, "grad_loss": gradient_weights(batch, latents)},
        {"grad": (logits.shape, logits.dtype)},
        orders=orders,
        capability=capability,
    )
    return forward["loss"], backward["grad"]


def definition(kind: str, target: Tensor, logits: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64 and target.is_floating_point():
        target = target.double()
    pair = (None, target) if kind == "cross_entropy" else (target, None)
    value, stats = reference.row_loss_forward(KINDS[kind], *pair, logits, weight)
    upstream = gradient_weights(*value.shape).to(value.dtype)
    return value, reference.row_loss_backward(upstream, KINDS[kind], *pair, logits, weight, stats)


def check_loss(
    kind: str, target: Tensor, logits: Tensor, weight: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    unread = target if kind == "cross_entropy" else poison(target[:, None], weight)[:, 0]
    got = loss(kind, unread, poison(logits, weight), weight, **options)
    exact = definition(kind, target, logits.double(), weight)
    plain = definition(kind, target, logits, weight)
    check(got[0], exact[0], plain[0], kind)
    check(got[1], exact[1], plain[1], f"grad of {kind}")
    if weight is not None:
        assert (got[1].transpose(1, 2)[weight == 0] == 0).all()
    return got


def target_for(kind: str, batch: int, length: int, states: int, dtype: torch.dtype) -> Tensor:
    if kind == "cross_entropy":
        return random_tokens(states, batch, length)
    return random_logits(batch, length, states, dtype=dtype, seed=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", STATES)
def test_every_kind(kind: str, states: int) -> None:
    dtypes = DTYPES if states < 1000 else (DTYPES[(states + KINDS[kind]) % 3],)
    for dtype in dtypes:
        logits = random_logits(2, 2, 3, states, dtype=dtype)
        pad, offset = layout_of(states, dtype)
        check_loss(
            kind,
            target_for(kind, 2, 3, states, dtype),
            logits,
            random_weight(2, 3),
            pad=pad,
            offset=offset,
            orders=(0, 3),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_many_states(kind: str) -> None:
    """Of a row that one CTA takes, or several: to the bit the same."""
    dtype, states = DTYPES[KINDS[kind] % 3], 65537 if kind == "reverse_kl" else LONG
    logits = random_logits(1, 2, 1, states, dtype=dtype)
    target = target_for(kind, 1, 1, states, dtype if kind != "js" else torch.float32)
    pad, offset = layout_of(states, dtype)
    results = [
        check_loss(kind, target, logits, None, pad=pad, offset=offset, way=way, orders=(1,)) for way in emulate.WAYS
    ]
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("kind", ["reverse_kl", "cross_entropy"])
@pytest.mark.parametrize("way", ["cluster", "ticket"])
def test_rows_shared_by_ctas(kind: str, way: str) -> None:
    """More rows than teams of CTAs, some of weight 0, one of them bad."""
    logits = random_logits(1, 2, 6, 16385, dtype=torch.bfloat16)
    target = target_for(kind, 1, 6, 16385, torch.bfloat16)
    weight = random_weight(1, 6)
    check_loss(kind, target, logits, weight, pad=1, way=way)
    logits[0, 1, 0, 16384] = torch.nan
    value, _ = loss(kind, target, logits, weight, way=way, orders=(2,))
    assert value.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_what_shared_memory_keeps_of_a_row_is_what_was_read(capability: int) -> None:
    """Devices keep as much of a row between its sweeps as they have room for; no bit depends on it."""
    logits = random_logits(1, 1, 1, 16384, dtype=torch.float32)
    inputs = {
        "kind": KINDS["js"],
        "target": emulate.lay_out(target_for("js", 1, 1, 16384, torch.float32)[:, None]),
        "logits": emulate.lay_out(logits),
        **{"B": 1, "L": 1, "D": 1, "S": 16384},
    }
    shapes = {"loss": (1, 1), "stats": (5, 1, 1, 1), "row": (1, 1, 1)}
    outputs = {name: (shape, torch.float32) for name, shape in shapes.items()}
    plain = emulate.run("row_loss", inputs, outputs, orders=(0,), capability=75)
    got = emulate.run("row_loss", inputs, outputs, orders=(1,), capability=capability)
    assert all(torch.equal(got[name], plain[name]) for name in outputs)


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_a_target_of_another_dtype(kind: str) -> None:
    for logits_dtype, target_dtype in ((DTYPES[0], DTYPES[1]), (DTYPES[1], DTYPES[2]), (DTYPES[2], DTYPES[0])):
        logits = random_logits(2, 1, 3, 77, dtype=logits_dtype)
        check_loss(kind, target_for(kind, 2, 3, 77, target_dtype), logits, None, pad=1)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_many_positions(kind: str) -> None:
    logits = random_logits(1, 2, 530, 3, dtype=torch.float32)
    check_loss(kind, target_for(kind, 1, 530, 3, torch.float32), logits, random_weight(1, 530), orders=(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_sharp_rows(kind: str) -> None:
    logits = random_logits(2, 2, 3, 130, dtype=torch.float32, scale=60.0)
    target = target_for(kind, 2, 3, 130, torch.float32)
    check_loss(kind, target if kind == "cross_entropy" else target * 20, logits, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_shifted_rows(kind: str, shift: float) -> None:
    """Far from 0 a row loses nothing but the rounding of its logits."""
    for dtype in DTYPES:
        logits = (random_logits(2, 2, 3, 300, dtype=torch.float32) + shift).to(dtype)
        target = target_for(kind, 2, 3, 300, torch.float32)
        target = target if kind == "cross_entropy" else (target + shift).to(dtype)
        check_loss(kind, target, logits, random_weight(2, 3), orders=(0, 3))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "tv"])
def test_equal_and_nearly_equal_rows(kind: str) -> None:
    target = random_logits(2, 3, 300, dtype=torch.float32)
    logits = torch.stack([target, target + 1e-3 * random_logits(2, 3, 300, dtype=torch.float32, seed=5)], 1)
    value, grad = check_loss(kind, target, logits, None)
    assert value[:, 0].abs().max() < 1e-6 and grad[:, 0].abs().max() < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_classes_without_mass(kind: str) -> None:
    """-inf in both, in the target alone, in the logits alone: nothing, nothing, infinite where the loss says so."""
    logits = random_logits(3, 2, 2, 50, dtype=torch.float32)
    target = target_for(kind, 3, 2, 50, torch.float32)
    logits[:, :, 0, 7] = -torch.inf
    logits[1, :, 1, 20:30] = -torch.inf
    if kind == "cross_entropy":
        target[:, 0], target[:, 1] = 8, 31
        target[2, 0] = 7
    else:
        target[:, 0, 7] = -torch.inf
        target[2, 1, 9:12] = -torch.inf
    value, _ = loss(kind, target, logits, None)
    exact = definition(kind, target, logits.double(), None)[0]
    check(value, exact, exact, kind)
    infinite = {"forward_kl": [1], "reverse_kl": [2], "cross_entropy": [2]}.get(kind, [])
    assert torch.isposinf(value).all(1).nonzero().flatten().tolist() == infinite


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("states", [33, 1200])
def test_bad_rows_touch_no_other(kind: str, states: int) -> None:
    logits = random_logits(5, 2, 2, states, dtype=torch.bfloat16)
    target = target_for(kind, 5, 2, states, torch.float32)
    clean = loss(kind, target, logits, None, orders=(0,))
    logits[1, 0, 1, states - 1] = torch.nan
    logits[2, 1, 0] = -torch.inf
    logits[3, 1, 1, 2] = torch.inf
    broken = [[False, False], [True, False], [False, True], [False, True], [True, True]]
    if kind == "cross_entropy":
        target[4, 0] = states
    else:
        target[4, 0, 5] = torch.nan
    value, grad = loss(kind, target, logits, None)
    assert value.isnan().tolist() == broken
    good = ~value.isnan()
    assert torch.equal(value[good], clean[0][good]) and torch.equal(grad[good], clean[1][good])


@pytest.mark.parametrize(("batch", "latents", "length"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_sum(batch: int, latents: int, length: int) -> None:
    value, grad = loss("js", torch.zeros(batch, length, 4), torch.zeros(batch, latents, length, 4), None)
    assert value.tolist() == torch.zeros(batch, latents).tolist() and grad.shape == (batch, latents, length, 4)


def test_every_weight_zero() -> None:
    value, grad = loss("js", torch.full((1, 3, 4), torch.nan), torch.full((1, 2, 3, 4), torch.nan), torch.zeros(1, 3))
    assert value.tolist() == [[0.0, 0.0]] and (grad == 0).all()
