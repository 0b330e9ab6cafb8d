"""Gradients of 16 MiB and more, which go past the caches line by line, have the bits of smaller ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from di4c_ext import ops

PAST_CACHES = 16 << 20  # bytes of a gradient from which on it is written so (csrc/cpu/mixture_writer.h)
B, L, BLOCK = 2, 3, 16  # positions are summed up by the block
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = ("mixture_kl", "mixture_log_prob", "mixture_objective")
# Rows that begin anywhere in a line: of many pieces, of one, and so short that several share a line.
STATES = (2051, 1025, 7)


def _inputs(states: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Just large enough. Of the positions weight has ones and zeros, single and in a row; none at either end."""
    length = math.ceil(PAST_CACHES / (B * L * states * dtype.itemsize)) + 1
    g = torch.Generator().manual_seed(states)

    def rows(*sizes: int) -> Tensor:
        return torch.randn(B, *sizes, length, states, generator=g).mul_(2).to(dtype)

    weight = (torch.rand(B, length, generator=g) < 0.8).float()
    weight[:, :BLOCK] = weight[:, -3 * BLOCK :] = 0
    return {
        "logits": rows(L),
        "teacher": rows(),
        "samples": torch.randint(0, states, (B, 4, length), generator=g),
        "weight": weight,
    }


def _gradient(op: str, i: dict[str, Tensor]) -> Tensor:
    x = i["logits"].detach().requires_grad_()
    if op == "mixture_kl":
        loss = ops.mixture_kl(i["teacher"], x, i["weight"]).sum()
    elif op == "mixture_log_prob":
        loss = sum(value.sum() for value in ops.mixture_log_prob(x, i["samples"], i["weight"]))
    else:
        parts = ops.mixture_objective(
            x, teacher=i["teacher"], data=i["samples"][:, 0], samples=i["samples"][:, 1:], weight=i["weight"]
        )
        loss = sum(value.sum() for value in parts if value.requires_grad)
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("states", STATES)
def test_bits_of_a_large_gradient(implementation, states, op):
    """Positions without weight before and after add nothing, so without them all else keeps its bits."""
    if not implementation.is_native or implementation.device.type != "cpu":
        pytest.skip("of the CPU's kernels alone")
    dtype = DTYPES[(STATES.index(states) + OPS.index(op)) % len(DTYPES)]
    whole = _inputs(states, dtype)
    inner = slice(BLOCK, -2 * BLOCK)
    part = {
        name: value[:, inner] if name == "weight" else value[..., inner, :] if name != "samples" else value[..., inner]
        for name, value in whole.items()
    }
    found, expected = _gradient(op, whole), _gradient(op, part)
    assert expected.numel() * dtype.itemsize < PAST_CACHES <= found.numel() * dtype.itemsize
    assert torch.equal(found[:, :, inner].view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert (found[:, :, :BLOCK] == 0).all() and (found[:, :, -2 * BLOCK :] == 0).all()
    rows = found.transpose(1, 2)  # (B, D, L, S)
    assert (rows[whole["weight"] == 0] == 0).all() and (rows[whole["weight"] > 0] != 0).any()
