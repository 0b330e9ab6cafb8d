"""The mixture's losses, forward and backward: ours, plain torch, the published way, torch.compile.

Promised on a CPU: 8, 6 and 8 times plain torch's speed, and no memory but the gradient and 5% of the logits. Of the
sequences' likelihood there are two plain forms. The 8 are promised over the published one, in which every target
gathers for itself. The other, one log-softmax and one gather for all K, is a stronger peer of our own making: its ratio
is told and nothing is promised over it (NOTES.md says what memory allows there).
"""

from __future__ import annotations

import peers
import pytest
import torch
from cases import COMPILED, DIGITS, DTYPES, LARGE, MIXTURE, SHAPES, Shape, inputs, name
from measuring import nbytes, step

GATHERS = "mixture_log_prob"
BESIDE_GRADIENT = 0.05  # of the logits: what a call may take in memory beside the gradient


def _has_published(op: str, shape: Shape) -> bool:
    return MIXTURE[op].published is not None and (shape == COMPILED or (op == GATHERS and shape in SHAPES))


def _cases() -> list:
    found = []
    for shape in (*SHAPES, *LARGE, DIGITS):
        for dtype in DTYPES if shape != DIGITS else DTYPES[:1]:
            for op in MIXTURE:
                names = ["di4c", "torch"]
                names += ["torch, published"] if _has_published(op, shape) else []
                if shape == COMPILED:
                    names += ["torch.compile"] if dtype == torch.float32 else []
                found += [pytest.param(op, shape, dtype, by, id=f"{op}-{name(shape, dtype)}-{by}") for by in names]
    return found


@pytest.mark.parametrize("op, shape, dtype, by", _cases())
def test_mixture(meter, device, op: str, shape: Shape, dtype: torch.dtype, by: str):
    forms, i = MIXTURE[op], inputs(shape, dtype, device, op == "mixture_objective")
    chain = {
        "di4c": forms.ours,
        "torch": forms.plain,
        "torch, published": forms.published,
        "torch.compile": peers.compiled(forms.plain, device),
    }[by]
    promised = by == "di4c" and shape != DIGITS
    ratios = {"torch": None, "torch, published": forms.ratio} if op == GATHERS else {"torch": forms.ratio}
    meter(
        f"{op} fwd+bwd {name(shape, dtype)}",
        by,
        step(lambda x: chain(x, i), i.logits),
        forms.floor(i),
        at_least=ratios if promised else None,
        turns={"torch": (step(lambda x: forms.plain(x, i), i.logits), forms.floor(i))} if promised else None,
        growth_limit=(1 + BESIDE_GRADIENT) * nbytes(i.logits) if promised else None,
        may_fail=by != "di4c",
        graph=by != "torch.compile",
    )


@pytest.mark.parametrize("by", ["di4c", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_forward(meter, device, dtype: torch.dtype, by: str):
    """Without a gradient: evaluating held-out sequences."""
    i, forms = inputs(COMPILED, dtype, device), MIXTURE["mixture_log_prob"]
    chain = forms.ours if by == "di4c" else forms.plain
    with torch.no_grad():
        group = f"mixture_log_prob forward {name(COMPILED, dtype)}"
        meter(group, by, lambda: chain(i.logits, i), nbytes(i.logits, i.samples))
