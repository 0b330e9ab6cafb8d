"""What is measured: shapes, inputs, and every op of rows with a gradient beside its form in plain torch.

Floor of forward and backward: the logits (and teacher, and target) read once in each where the position counts, the
whole gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import plain
import torch
from measuring import nbytes, shape_name
from torch import Tensor

from di4c_ext import ops

Shape = tuple[int, int, int, int]  # B, L, D, S

SHAPES: tuple[Shape, ...] = ((2, 8, 256, 8192), (4, 16, 768, 256), (2, 32, 256, 1025), (1, 8, 64, 50258))
DIGITS: Shape = (16, 32, 64, 17)
COMPILED: Shape = SHAPES[2]  # a compilation takes longer than all the rest of its row
# Sizes that fill a GPU: the others are within its second-level cache, or a matter of launches.
LARGE: tuple[Shape, ...] = ((8, 32, 256, 1025), (4, 16, 128, 50258)) if torch.cuda.is_available() else ()
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Inputs:
    """One student's logits (B, L, D, S) and what they are held against; K = T = L."""

    logits: Tensor
    teacher: Tensor  # (B, D, S)
    target: Tensor | None  # (B, T, D, S)
    data: Tensor  # (B, D)
    samples: Tensor  # (B, K, D)
    weight: Tensor | None  # (B, D)


@lru_cache(maxsize=1)
def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, target: bool = False) -> Inputs:
    """Random inputs, the same every time; kept until others are asked for, so no call may change them."""
    B, L, D, S = shape
    g = torch.Generator(device).manual_seed(0)

    def rows(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device).mul_(2).to(dtype)

    return Inputs(
        logits=rows(B, L, D, S),
        teacher=rows(B, D, S),
        target=rows(B, L, D, S) if target else None,
        data=torch.randint(0, S, (B, D), generator=g, device=device),
        samples=torch.randint(0, S, (B, L, D), generator=g, device=device),
        weight=None,
    )


@dataclass(frozen=True)
class Op:
    """A loss of the logits: ours, in plain torch, and the published way where that is another."""

    ours: Callable[[Tensor, Inputs], Tensor]
    plain: Callable[[Tensor, Inputs], Tensor]
    published: Callable[[Tensor, Inputs], Tensor] | None = None
    ratio: float | None = None  # how many times plain torch's speed we promise on a CPU
    teacher: bool = False
    target: bool = False
    tokens: bool = False

    def floor(self, i: Inputs, share: float = 1.0) -> int:
        """Bytes of a forward and a backward of which `share` of the positions count."""
        read = nbytes(i.logits, i.teacher if self.teacher else None, i.target if self.target else None)
        return int(2 * share * read) + nbytes(i.logits) + (2 * nbytes(i.samples) if self.tokens else 0)


def _total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in values]).sum()


def _objective(x: Tensor, i: Inputs) -> Tensor:
    found = ops.mixture_objective(
        x, teacher=i.teacher, data=i.data, samples=i.samples, target=i.target, weight=i.weight
    )
    return _total(
        (
            found.distillation,
            found.marginal_teacher,
            found.marginal_target,
            found.correlation_data,
            found.correlation_samples,
        )
    )


def _plain_objective(form: Callable[..., tuple[Tensor, ...]]) -> Callable[[Tensor, Inputs], Tensor]:
    return lambda x, i: _total(form(x, i.teacher, i.data, i.samples, i.target, i.weight))


def _rows_kl(x: Tensor, i: Inputs) -> Tensor:
    """KL(teacher || p_l), every latent for itself, (B, L)."""
    log_t = plain.log_p(i.teacher)[:, None]
    rows = (log_t.exp() * (log_t - plain.log_p(x))).sum(-1)
    return (rows if i.weight is None else rows * i.weight[:, None]).sum(-1)


MIXTURE = {
    "mixture_log_prob": Op(
        lambda x, i: _total(ops.mixture_log_prob(x, i.samples, i.weight)),
        lambda x, i: _total(plain.mixture_log_prob(x, i.samples, i.weight)),
        lambda x, i: _total(plain.published_log_prob(x, i.samples, i.weight)),
        ratio=8,
        tokens=True,
    ),
    "mixture_kl": Op(
        lambda x, i: ops.mixture_kl(i.teacher, x, i.weight),
        lambda x, i: plain.mixture_kl(i.teacher, x, i.weight),
        ratio=6,
        teacher=True,
    ),
    "mixture_objective": Op(
        _objective,
        _plain_objective(plain.mixture_objective),
        _plain_objective(plain.published_objective),
        ratio=8,
        teacher=True,
        target=True,
        tokens=True,
    ),
}
MASKED_KL = Op(lambda x, i: ops.masked_kl(i.teacher, x, i.weight), _rows_kl, teacher=True)


def name(shape: Iterable[int], dtype: torch.dtype) -> str:
    """A shape and its dtype as the tables and test names have them."""
    return f"{shape_name(*shape)} {str(dtype)[6:]}"
