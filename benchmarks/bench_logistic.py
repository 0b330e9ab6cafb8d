"""The mixture's losses and draws on a logistic head's two numbers, beside logits made of them by torch.

At the published sizes, 3,072 positions of 256 states under 16 latents, the logits of a sample are 50 MB, of which plain
torch holds a dozen and more at a time: 8 samples take it 6 GB. Promised on a CPU: 10 times plain torch's speed, 200 MB
of memory at most.
Floor: both numbers of every row read forward and backward, both gradients written. It says that nothing here is a
matter of memory: a row of 256 states is computed of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import peers
import plain
import pytest
import torch
from measuring import nbytes, shape_name
from torch import Tensor
from torch.nn.functional import logsigmoid

from di4c_ext import ops, random
from di4c_ext.ops import Logistic

LATENTS, LENGTH, STATES = 16, 3072, 256
BATCHES = (1, 2, 8)
COMPILED = BATCHES[0]
GROWTH_LIMIT = 200e6


@dataclass(frozen=True)
class Inputs:
    """A student's rows (B, L, D) and what they are held against; K = T = L."""

    logits: Logistic
    teacher: Logistic  # (B, D)
    target: Logistic  # (B, T, D)
    data: Tensor  # (B, D)
    samples: Tensor  # (B, K, D)
    inside: Tensor  # (B,)
    keys: Tensor  # (B,)


@lru_cache(maxsize=1)
def _inputs(batch: int, device: torch.device) -> Inputs:
    """Means in [-1, 1], scales as a trained head has them, one sample in four in the first time window."""
    g = torch.Generator(device).manual_seed(0)

    def rows(*sizes: int) -> Logistic:
        mean, log_scale = (torch.rand(*sizes, LENGTH, generator=g, device=device) for _ in range(2))
        return Logistic(mean * 2 - 1, log_scale * 3 - 2.5, STATES)

    def tokens(*sizes: int) -> Tensor:
        return torch.randint(0, STATES, (*sizes, LENGTH), generator=g, device=device)

    inside = torch.arange(batch, device=device) % 4 == 0
    keys = random.keys(0, batch, device)
    return Inputs(
        rows(batch, LATENTS), rows(batch), rows(batch, LATENTS), tokens(batch), tokens(batch, LATENTS), inside, keys
    )


def _made(x: Logistic) -> Tensor:
    """The logits by the published formula."""
    inverse = torch.exp(-(x.log_scale - 2))[..., None]
    half = 1 / x.num_states
    centres = torch.linspace(-1 + half, 1 - half, x.num_states, device=x.device)
    left = logsigmoid((centres - half - x.mean[..., None]) * inverse)
    right = logsigmoid((centres + half - x.mean[..., None]) * inverse)
    return right + torch.log1p(-torch.exp(left - right) + 1e-6)


def _total(values: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([value.sum() for value in values]).sum()


def _objective(x: Logistic, i: Inputs) -> Tensor:
    found = ops.mixture_objective(
        x, teacher=i.teacher, data=i.data, samples=i.samples, target=i.target, inside=i.inside
    )
    return _total(tuple(value for value in found if value.requires_grad))


def _plain_objective(x: Logistic, i: Inputs) -> Tensor:
    with torch.no_grad():
        teacher, target = _made(i.teacher), _made(i.target)
    return _total(plain.mixture_objective(_made(x), teacher, i.data, i.samples, target, inside=i.inside))


def _plain_kl(x: Logistic, i: Inputs) -> Tensor:
    with torch.no_grad():
        teacher = _made(i.teacher)
    return plain.mixture_kl(teacher, _made(x))


Loss = Callable[[Logistic, Inputs], Tensor]
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "mixture_log_prob": (
        lambda x, i: _total(ops.mixture_log_prob(x, i.samples)),
        lambda x, i: _total(plain.mixture_log_prob(_made(x), i.samples)),
    ),
    "mixture_kl": (lambda x, i: ops.mixture_kl(i.teacher, x), _plain_kl),
    "mixture_objective": (_objective, _plain_objective),
}


def _step(loss: Loss, i: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, the gradients of mean and log-scale made afresh each time."""

    def run() -> tuple[Tensor, ...]:
        mean, log_scale = (v.detach().requires_grad_() for v in (i.logits.mean, i.logits.log_scale))
        return torch.autograd.grad(loss(Logistic(mean, log_scale, STATES), i).sum(), (mean, log_scale))

    return run


@pytest.mark.parametrize("by", ["di4c", "torch", "torch.compile"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", list(LOSSES))
def test_losses(meter, device, op: str, batch: int, by: str):
    if by == "torch.compile" and batch != COMPILED:
        pytest.skip("compiled once")
    i, ours = _inputs(batch, device), by == "di4c"
    loss = LOSSES[op][0 if ours else 1]
    if by == "torch.compile":
        loss = peers.compiled(loss, device)
    meter(
        f"{op} of logistic rows fwd+bwd {shape_name(batch, LATENTS, LENGTH, STATES)}",
        by,
        _step(loss, i),
        3 * nbytes(i.logits.mean, i.logits.log_scale),
        at_least={"torch": 10} if ours else None,
        growth_limit=GROWTH_LIMIT if ours else None,
        may_fail=not ours,
        graph=by != "torch.compile",
    )


@pytest.mark.parametrize("by", ["di4c", "torch"])
@pytest.mark.parametrize("batch", BATCHES)
def test_sample(meter, device, batch: int, by: str):
    """One draw from every row of every latent: the consistency term's samples."""
    i, ours = _inputs(batch, device), by == "di4c"
    with torch.no_grad():
        meter(
            f"sample_categorical of logistic rows {shape_name(batch, LATENTS, LENGTH, STATES)}",
            by,
            (lambda: ops.sample_categorical(i.logits, i.keys)) if ours else (lambda: plain.race(_made(i.logits))),
            nbytes(i.logits.mean, i.logits.log_scale, i.samples),
            at_least={"torch": 10} if ours else None,
            growth_limit=GROWTH_LIMIT if ours else None,
            may_fail=not ours,
        )
