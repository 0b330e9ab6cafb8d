"""Self-distillation through time (SDTT, arXiv 2410.21035): a product student one step of which is K of its teacher's.

From x_t the frozen teacher takes K steps t = t_0 > t_1 > ... > t_K = s. Each position that x_t leaves open is given a
target: what the teacher said of it in the step that revealed it or, where none did, in the last one,

    target^d = teacher^d(. | x_{t_k}),   k = the step that reveals d, else K - 1
    loss     = sum_d D(target^d, student^d(. | x_t))                        over the positions that x_t leaves open

The student so learns what a position comes to once others are known. D is one of four:

    reverse_kl   KL(student || target), the published default
    kl           KL(target || student)
    tv           total variation, half the sum of |student - target|; the published one sums differences of logarithms
    mse          mean over the S states of (log student - log target)^2

Published is a mean over the open positions of a batch; here, as in every loss of this package, it is nats a sample.

A round ends when the student can do in N / K steps what its teacher does in N; the student is then the next round's
teacher, whose steps are K times as long (`SDTTObjective.round`; `di4c_ext.stages` runs one after the other). After
these rounds the teacher knows in few steps what it can as a product, and Di4C adds the correlations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.latent_group import LatentGroup
from di4c_ext.loss_terms import LossParts, Rows, constant, of_states, row_divergence
from di4c_ext.micro_batch import in_pieces
from di4c_ext.ops import Hidden, Logits
from di4c_ext.ops.hidden import CHUNK_BYTES
from di4c_ext.process import Process
from di4c_ext.process.rows import whole

Divergence = Literal["reverse_kl", "kl", "tv", "mse"]
_TIMES, _CORRUPT, _STEP, _LATENTS, _TEACHER_LATENTS = range(5)  # sub-keys, as in `loss`
_LEAST_ROWS = 16  # of logits made at a time, whatever they take


class Targets(NamedTuple):
    """What K steps of a teacher give: logits (B, D, S), constants; x_s (B, D), where its steps end; (B,) bool of the
    samples in which a draw failed."""

    logits: Logits
    x_s: Tensor
    broken: Tensor


def multi_step_targets(
    teacher: Denoiser,
    process: Process,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    keys: Tensor,
    num_steps: int,
    *,
    latents: Latents | None = None,
    conditions: Mapping[str, Tensor] | None = None,
) -> Targets:
    """K = num_steps even steps of the teacher from x_t (B, D) at t (B,) down to s (B,), and what each position is told.

    At positions that x_t knows the target is the teacher's at x_t, for nobody's use. latents: of a teacher that is a
    mixture, which takes a fresh one in every step. Hidden logits stay hidden, the targets being a choice among states
    under one head. Raises ValueError for a process without masks.
    """
    mask_id = _mask_of(process)
    x, target = x_t, None
    broken = torch.zeros_like(x_t[:, 0], dtype=torch.bool)
    with inference(teacher, x_t.device):
        for k in range(num_steps):
            # lerp is exact at both ends, so that the last step ends at s, at 0 where s is 0.
            now, then = (torch.lerp(t, s, i / num_steps) for i in (k, k + 1))
            key = random.fold_in(keys, k)
            told: dict[str, Any] = dict(conditions or {})
            if latents is not None:
                told["latents"] = latents(random.fold_in(key, _TEACHER_LATENTS), 1)[:, 0]
            logits = of_states(constant(teacher(x, now.float(), **told)), process)
            target = logits if target is None else _chosen(x == mask_id, logits, target)
            x_next = process.step(x, logits, now, then, key)
            failed = x_next < 0
            broken = broken | failed.any(1)
            x = torch.where(failed, x, x_next)
    if target is None:
        raise ValueError(f"multi_step_targets: num_steps must be at least 1, got {num_steps}")
    return Targets(target, x, broken)


@dataclass(frozen=True)
class SDTTObjective:
    """The loss of one round when called, as `Di4CObjective` is; `DistillTrainer` takes either.

    num_steps   K, steps of the teacher that one of the student is to do
    step        length of one of the teacher's steps; K step at most 1
    divergence  D: reverse_kl, kl, tv or mse
    time_grid   None, or T: t is rounded up to the next of 1/T, 2/T, ..., 1, once, and x_t noised there
    time_min    no time lies below; t is uniform between it and 1
    """

    num_steps: int = 2
    step: float = 1 / 1024
    divergence: Divergence = "reverse_kl"
    time_grid: int | None = None
    time_min: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"SDTTObjective: num_steps must be an integer of at least 1, got {self.num_steps!r}")
        if not 0 < self.num_steps * self.step <= 1:
            raise ValueError(
                f"SDTTObjective: {self.num_steps} steps of {self.step:g} must together be longer than 0 and at most 1; "
                "give shorter steps or fewer rounds"
            )
        if self.divergence not in get_args(Divergence):
            known = ", ".join(get_args(Divergence))
            raise ValueError(f"SDTTObjective: divergence must be one of {known}, got {self.divergence!r}")
        if self.time_grid is not None and self.time_grid < 1:
            raise ValueError(f"SDTTObjective: time_grid must be at least 1, got {self.time_grid}")
        if not 0 <= self.time_min < 1:
            raise ValueError(f"SDTTObjective: time_min must lie in [0, 1), got {self.time_min}")

    def round(self, number: int) -> SDTTObjective:
        """The objective of a round, 0 the first: the teacher's steps are K times as long in each as in the last."""
        return replace(self, step=self.step * self.num_steps**number)

    def draw_times(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """t and s, time_min <= s < t <= 1, float64 (B,) each: functions of a sample's key alone."""
        t = self.time_min + (1 - self.time_min) * (1 - random.uniform(keys, 1)[:, 0])
        if self.time_grid is not None:
            t = torch.ceil(t * self.time_grid) / self.time_grid
        return t, (t - self.num_steps * self.step).clamp(min=self.time_min)

    def __call__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        process: Process,
        x_0: Tensor,
        keys: Tensor,
        *,
        latents: Latents | None = None,
        target: Denoiser | None = None,
        times: tuple[Tensor, Tensor] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        unconditional: Denoiser | None = None,
        teacher_latents: Latents | None = None,
        group: LatentGroup | None = None,
    ) -> LossParts:
        """The loss of x_0 (B, D) int64, every draw hanging on keys (B,) int64: fold the training step into them.

        latents: None for the product student that a round trains; a mixture is called with one latent a sample. times:
        t and s, (B,) each, in place of `draw_times`. conditions: as `Di4CObjective` takes them. teacher_latents: of a
        teacher that is a mixture. target, unconditional and group are there for the likeness and must be None.

        Parts: "divergence"; diagnostics: "revealed", how many positions the teacher's steps reveal. A draw that fails
        (logits that hold no distribution) makes the parts of its sample NaN. Raises ValueError for a process without
        masks.
        """
        for name, given in (("target", target), ("unconditional", unconditional), ("group", group)):
            if given is not None:
                raise ValueError(f"SDTTObjective: has no use for {name}, the teacher's steps are all that it takes")
        if x_0.ndim != 2 or keys.shape != x_0.shape[:1]:
            raise ValueError(
                "SDTTObjective: x_0 must be (B, D) and keys (B,), one a sample, "
                f"got {tuple(x_0.shape)} and {tuple(keys.shape)}"
            )
        told: dict[str, Any] = dict(conditions or {})
        key = random.fold_in(keys, torch.arange(5, device=keys.device)[:, None])  # (uses, B)
        t, s = self.draw_times(key[_TIMES]) if times is None else times
        x_t = process.corrupt(x_0, t, key[_CORRUPT])
        goal, x_s, broken = multi_step_targets(
            teacher, process, x_t, t, s, key[_STEP], self.num_steps, latents=teacher_latents, conditions=told
        )
        if latents is not None:
            told["latents"] = latents(key[_LATENTS], 1)[:, 0]
        logits = of_states(student(x_t, t.float(), **told), process)
        expected = (*x_0.shape, process.num_states)
        if tuple(logits.shape) != expected:
            raise ValueError(
                f"SDTTObjective: the student must give logits (B, D, S) = {expected}, got {tuple(logits.shape)}"
            )
        value = divergence(self.divergence, goal, logits, process.weight(x_t), _mask_of(process))
        value = torch.where(broken, torch.nan, value)
        revealed = (x_s != x_t).sum(1).to(value.dtype)
        return LossParts({"divergence": value}, {"revealed": revealed})


def divergence(kind: Divergence, target: Logits, logits: Logits, weight: Tensor, mask_id: int) -> Tensor:
    """sum_d w D(softmax target, softmax logits) of each sample, (B,), with a graph to the logits alone.

    target, logits: (B, D, S), either may be Hidden: of a Hidden only the rows of weight not 0 meet their head, a few
    at a time and once more backward. weight: (B, D). mask_id: a class of this number has no part in "mse".
    """
    if kind == "kl":
        return row_divergence(Rows(logits, target, weight))
    if not isinstance(logits, Hidden) and not isinstance(target, Hidden):
        return _of_tensors(kind, whole(target), whole(logits), weight, mask_id)
    place = weight.nonzero(as_tuple=True)  # to know how many there are, the host waits for the device
    student, teacher = _at(logits, place), _at(target, place)

    def of_rows(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return _of_tensors(kind, whole(_with(teacher, y)), whole(_with(student, x)), w, mask_id)

    num_rows = max(CHUNK_BYTES // (8 * logits.shape[-1]), _LEAST_ROWS)  # two rows of logits each
    values = in_pieces(of_rows, num_rows, 0, _data(student), _data(teacher), weight[place][:, None])
    assert isinstance(values, Tensor)  # what of_rows gives
    return values.new_zeros(weight.shape[0]).index_add(0, place[0], values)


def squared_error(target: Tensor, logits: Tensor, weight: Tensor, mask_id: int) -> Tensor:
    """sum_d w mean_s (log p(s) - log target(s))^2, (B,): states that the target rules out, and the mask, count as 0."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    unread = (weight == 0)[..., None]
    log_t, log_p = (
        x.to(dtype).masked_fill(is_mask, -torch.inf).masked_fill(unread, 0.0).log_softmax(-1)
        for x in (target.detach(), logits)
    )
    error = torch.where(torch.isneginf(log_t), 0.0, log_p - log_t)
    return (weight * error.square().mean(-1)).sum(-1)


def _of_tensors(kind: Divergence, target: Tensor, logits: Tensor, weight: Tensor, mask_id: int) -> Tensor:
    if kind == "mse":
        return squared_error(target, logits, weight, mask_id)
    return (ops.masked_tv if kind == "tv" else ops.masked_reverse_kl)(target, logits, weight)


def _mask_of(process: Process) -> int:
    mask_id = getattr(process, "mask_id", None)
    if mask_id is None:
        raise ValueError(
            f"SDTTObjective: its targets are those of the step that reveals a position, {process!r} reveals none; "
            "it is for masked diffusion"
        )
    return int(mask_id)


def _chosen(where: Tensor, new: Logits, old: Logits) -> Logits:
    """`new` at the positions (B, D) named, `old` at the others; alike in kind, a Hidden's head the same in both."""
    if isinstance(new, Hidden) and isinstance(old, Hidden):
        return new._replace(states=torch.where(where[..., None], new.states, old.states))
    return torch.where(where[..., None], whole(new), whole(old))


def _at(logits: Logits, place: tuple[Tensor, ...]) -> Tensor | Hidden:
    """(n, 1, S) of the n positions named."""
    if isinstance(logits, Hidden):
        return logits.mapped(lambda x: x[place][:, None])
    return whole(logits)[place][:, None]


def _data(rows: Tensor | Hidden) -> Tensor:
    return rows.states if isinstance(rows, Hidden) else rows


def _with(rows: Tensor | Hidden, data: Tensor) -> Tensor | Hidden:
    return rows._replace(states=data) if isinstance(rows, Hidden) else data
