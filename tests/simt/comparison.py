"""Inputs for the kernels' tests, and how close a kernel must come to the float64 definition."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops.reference.mixture import row_planes, unread

STATES = (1, 2, 17, 31, 255, 256, 1025, 4099)
LONG = 50257
LAYOUTS = ((0, 0), (3, 1), (5, 3))  # (elements between rows, elements off a 16-byte boundary)
LIMITS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # spacing of the dtype at 1


def layout_of(states: int, dtype: torch.dtype) -> tuple[int, int]:
    """A layout for each case, so that every S meets aligned and misaligned rows across the dtypes."""
    return LAYOUTS[(states + list(LIMITS).index(dtype)) % len(LAYOUTS)]


def random_logits(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def random_tokens(states: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(states, shape, generator=torch.Generator().manual_seed(seed + states))


def random_weight(batch: int, length: int, seed: int = 0) -> Tensor:
    """Weights in [0.5, 1.5), about a third of them 0 and at least one, where there is more than one."""
    generator = torch.Generator().manual_seed(seed + length)
    weight = torch.rand(batch, length, generator=generator) + 0.5
    weight[torch.rand(batch, length, generator=generator) < 0.3] = 0.0
    if length > 1:
        weight[:, length // 2] = 0.0
        weight[:, 0] = 1.25
    return weight


def poison(logits: Tensor, weight: Tensor | None) -> Tensor:
    """NaN in the rows of weight 0 of logits (B, L, D, S): a kernel that reads one shows it."""
    if weight is None:
        return logits
    return torch.where((weight == 0)[:, None, :, None], torch.nan, logits).to(logits.dtype)


def check(got: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """At most twice the error of plain torch in the same dtype, and a few spacings of the result's dtype more.

    Args:
        got: what the kernel wrote.
        exact: the definition in float64.
        plain: the definition in the dtype of the logits (accumulating in float32).
        what: named in the message.
    """
    got64, exact, plain = got.double(), exact.double(), plain.double()
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(got64), special(exact)), f"{what}: {special.__name__} differs: {got64} for {exact}"
    if exact.numel() == 0:
        return
    finite = torch.isfinite(exact)
    zero = torch.zeros_like(exact)
    error = torch.where(finite, got64 - exact, zero).abs().max()
    plain_error = torch.where(finite & torch.isfinite(plain), plain - exact, zero).abs().max()
    largest = torch.where(finite, exact, zero).abs().max()
    allowed = 2 * plain_error + 4 * LIMITS[got.dtype] * largest + 1e-6
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (plain torch {plain_error:.3e})"


def check_planes(got: Tensor, logits: Tensor, weight: Tensor | None) -> None:
    """What forward keeps of logits (B, L, D, S): each row's maximum to the bit, log sum exp(x - max) to a few ulp.

    Args:
        got: (2, B, L, D) as the kernel wrote it; 0 where the weight is, NaN in the second plane for a bad row.
    """
    exact = row_planes(unread(logits.double(), weight), weight)
    bad = exact[1].isnan()
    assert torch.equal(got[1].isnan(), bad), f"bad rows: {got[1].isnan()} for {bad}"
    assert torch.equal(got[0][~bad].double(), exact[0][~bad]), f"maxima: {got[0]} for {exact[0]}"
    error = (got[1].double() - exact[1])[~bad].abs()
    assert (error <= 4 * LIMITS[torch.float32] * (1 + exact[1][~bad])).all(), f"log-sums: {error.max():.3e} off"
