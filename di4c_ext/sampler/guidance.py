"""Guidance: further from the teacher towards its student and beyond, teacher + scale (student - teacher) on logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from di4c_ext.denoiser import Denoiser
from di4c_ext.ops import Hidden, Logistic, Logits, native
from di4c_ext.process.rows import beyond

LOGITS_BYTES = 256 << 20
BYTES_PER_LOGIT = 24  # the teacher's logits, and the float64 edges of the bins of the student's
_BYTES_PER_REFERENCE_LOGIT = 72  # where no kernels serve: the integer masses by which the reference draws


class GuidedLogits(NamedTuple):
    """teacher + scale (student - teacher), both (B, D, S), not made until a piece of it is asked for."""

    teacher: Logits
    student: Logits
    scale: float

    @property
    def shape(self) -> torch.Size:
        """(B, D, S)."""
        return self.teacher.shape

    @property
    def device(self) -> torch.device:
        return self.teacher.device

    def logits(self, samples: slice = slice(None)) -> Tensor:
        """The logits (B', D, S) of some samples, float32 or wider. A state that either rules out stays ruled out."""
        return beyond(dense(self.teacher, samples), dense(self.student, samples), self.scale)


class GuidedDenoiser(nn.Module):
    """denoiser(x_t, t, latents) -> GuidedLogits: two evaluations, the teacher's and the student's.

    scale 0 is the teacher, 1 the student, above 1 exaggerates what the student has learnt. Called with latents None
    the student is asked without, as any denoiser. Give it to a sampler in the student's place; the sampler makes the
    guided logits of as many samples at a time as `logits_bytes` allows.
    """

    def __init__(self, student: Denoiser, teacher: Denoiser, scale: float) -> None:
        super().__init__()
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"GuidedDenoiser: scale must be a number, got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"GuidedDenoiser: scale must be finite, 1 is the student unguided, got {scale}")
        self.student = student
        self.teacher = teacher
        self.scale = float(scale)

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor | None = None, **conditions: Tensor) -> GuidedLogits:
        told = conditions if latents is None else {"latents": latents, **conditions}
        teacher, student = self.teacher(x_t, t, **conditions), self.student(x_t, t, **told)
        if teacher.shape != student.shape:
            raise ValueError(
                f"GuidedDenoiser: teacher and student must give logits of one shape (B, D, S), got "
                f"{tuple(teacher.shape)} and {tuple(student.shape)}; are they of the same data?"
            )
        return GuidedLogits(teacher, student, self.scale)


def rows(logits: Logits, samples: slice) -> Logits:
    """The logits of some samples, in the form they have."""
    if isinstance(logits, Logistic):
        return logits._replace(mean=logits.mean[samples], log_scale=logits.log_scale[samples])
    return logits.mapped(lambda x: x[samples]) if isinstance(logits, Hidden) else logits[samples]


def in_pieces(
    function: Callable[..., Any],
    logits: Logits | GuidedLogits,
    logits_bytes: int,
    *per_sample: Tensor,
    made: bool = False,
) -> tuple[Tensor, ...]:
    """function(logits, *per_sample) -> tensors, in pieces of samples wherever logits would have to be made.

    That is of GuidedLogits, and of a Logistic without kernels for it, or where `made` says that the function makes its
    logits. A piece takes logits_bytes or is one sample.
    """
    kernels = isinstance(logits, Logistic) and has_kernels(logits.device) and not made
    if isinstance(logits, Tensor | Hidden) or kernels:
        return function(logits, *per_sample)
    each = bytes_per_logit(logits.device) * math.prod(logits.shape[1:])
    done = []
    for cut in cuts_of(logits.shape[0], each, logits_bytes):
        piece = logits.logits(cut) if isinstance(logits, GuidedLogits) else rows(logits, cut)
        done.append(function(piece, *(x[cut] for x in per_sample)))
    return tuple(torch.cat(parts) for parts in zip(*done, strict=True))


def has_kernels(device: torch.device) -> bool:
    """Whether ops on tensors there are served by kernels, not by the reference."""
    return device.type in ("cpu", "cuda") and native.available(device.type)


def bytes_per_logit(device: torch.device) -> int:
    """Of memory, at the peak of making float32 logits and drawing from them."""
    return BYTES_PER_LOGIT if has_kernels(device) else _BYTES_PER_REFERENCE_LOGIT


def cuts_of(batch: int, bytes_each: int, most_bytes: int) -> list[slice]:
    """The samples in pieces of at most so many bytes, a sample at least; one empty piece of none."""
    size = max(1, most_bytes // max(1, bytes_each))
    return [slice(start, start + size) for start in range(0, max(batch, 1), size)]


def dense(logits: Logits | GuidedLogits, samples: slice) -> Tensor:
    """The logits of some samples as a tensor (B', D, S), float32 or float64."""
    if isinstance(logits, GuidedLogits):
        return logits.logits(samples)
    part = rows(logits, samples)
    made = part if isinstance(part, Tensor) else part.logits()
    return made if made.dtype == torch.float64 else made.float()
