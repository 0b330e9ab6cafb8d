"""Few-step likelihood: the objective of students whose mixture has a sum that is known (`models.chain`).

A sampler of k steps makes x_0 with a probability whose logarithm is bounded by the steps' own,

    -log p_k(x_0) <= E_paths sum_i -log p(x_{t_{i+1}} | x_{t_i})            (`metrics.mixture_bound`)

where each term is of the mixture, all latents summed over. Drawing k from those the student is for, and one of its
steps t -> s, the loss of a sample is k times that step's term, in nats,

    L_data    = -k log p(x_s | x_t)      x_s, x_t noised data, with equal coins
    L_consis  = -k log p(x_s | x_t)      x_t noised data; the teacher steps t -> u, the student u -> s, u = (t + s) / 2
    L_distil  = sum_d KL(teacher^d || p^d(. | x_t; lambda))                             t <= window

the first two of the Di4C objective (`loss`) without their control variates, which make up for draws of lambda that are
not made here, and its third. Of a sample either the one or the other is taken, by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.latent_group import LatentGroup
from di4c_ext.loss_terms import LossParts, Rows, constant, marginal, of_states, row_divergence
from di4c_ext.ops import Logits
from di4c_ext.process import Process

# Sub-keys, one for each use of randomness.
_USES = 8
_KIND, _TIMES, _CORRUPT, _TEACHER, _STUDENT, _LATENTS, _TEACHER_LATENTS, _TARGET_LATENTS = range(_USES)
_TEACHERS = 8  # components of a teacher that is a mixture, whose mean stands for it where t <= window


@dataclass(frozen=True)
class FewStepObjective:
    """The loss when called, as `Di4CObjective` is; `DistillTrainer` takes either.

    num_steps          the numbers of steps k that the student is for, each as often; one may be named more than once
    consistency_share  share of the samples that L_consis is taken of, in place of L_data or L_distil
    window             L_distil is taken at t uniform in (0, window]
    window_share       share of the samples that it is taken of
    distillation       weight of L_distil
    """

    num_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    consistency_share: float = 0.0
    window: float = 0.05
    window_share: float = 0.0
    distillation: float = 1.0

    def __post_init__(self) -> None:
        if not self.num_steps or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in self.num_steps):
            raise ValueError(f"FewStepObjective: num_steps must be integers of at least 1, got {self.num_steps}")
        if min(self.consistency_share, self.window_share) < 0 or self.consistency_share + self.window_share > 1:
            raise ValueError(
                "FewStepObjective: consistency_share and window_share are shares of the samples, >= 0 and together at "
                f"most 1, got {self.consistency_share} and {self.window_share}"
            )
        if not 0 < self.window < 1 or not 0 <= self.distillation < float("inf"):
            raise ValueError(
                "FewStepObjective: window must lie in (0, 1) and distillation be a finite weight >= 0, "
                f"got {self.window} and {self.distillation}"
            )

    def draw_times(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, t and s, float64 (B,) each, 0 <= s < t <= 1 a step of k even ones: functions of a sample's key alone."""
        v, w = random.uniform(keys, 2).unbind(1)
        known = torch.tensor(self.num_steps, dtype=torch.float64, device=keys.device)
        k = known[(v * len(known)).long().clamp(max=len(known) - 1)]
        i = torch.minimum((w * k).floor(), k - 1)
        return k, (i + 1) / k, i / k

    def __call__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        process: Process,
        x_0: Tensor,
        keys: Tensor,
        *,
        latents: Latents,
        target: Denoiser | None = None,
        times: tuple[Tensor, Tensor] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        unconditional: Denoiser | None = None,
        teacher_latents: Latents | None = None,
        group: LatentGroup | None = None,
    ) -> LossParts:
        """The loss of x_0 (B, D) int64, every draw hanging on keys (B,) int64: fold the training step into them.

        student: called as (x_t, t, x_s=) for log p(x_s | x_t), (B,), and as every student with latents. target: the
        denoiser at u, the student itself unless given. teacher_latents: of a teacher that is a mixture, as in a second
        round. times, conditions, unconditional and group are there for the likeness and must be None or empty.

        Parts: "few_step_data", "few_step_consistency", "distillation", each 0 where it is not taken; diagnostics:
        "revealed", how many positions a step reveals. A draw that fails makes its sample NaN. Which samples are of
        which kind the host has to know: it waits for the device.
        """
        for name, given in (("times", times), ("conditions", conditions), ("unconditional", unconditional)):
            if given:
                raise ValueError(f"FewStepObjective: has no use for {name}; leave it out")
        if group is not None:
            raise ValueError("FewStepObjective: draws no latents that processes could share; give latent_processes 1")
        if x_0.ndim != 2 or keys.shape != x_0.shape[:1]:
            raise ValueError(
                "FewStepObjective: x_0 must be (B, D) and keys (B,), one a sample, "
                f"got {tuple(x_0.shape)} and {tuple(keys.shape)}"
            )
        key = random.fold_in(keys, torch.arange(_USES, device=keys.device)[:, None])  # (uses, B)
        coin = random.uniform(key[_KIND], 1)[:, 0]
        near = coin < self.window_share
        own = ~near & (coin < self.window_share + self.consistency_share)
        k, t, s = self.draw_times(key[_TIMES])
        t = torch.where(near, self.window * (1 - random.uniform(key[_TIMES], 1, stream=1)[:, 0]), t)
        x_t = process.corrupt(x_0, t, key[_CORRUPT])
        # At s = t nothing is revealed, and the likelihood says 0.
        x_s = process.corrupt(x_0, torch.where(near, t, s), key[_CORRUPT])
        broken = torch.zeros_like(near)
        if bool(own.any()):
            made = self._both_steps(
                student if target is None else target,
                *(teacher, process, x_t[own], t[own], s[own], key[:, own], latents, teacher_latents),
            )
            failed = made < 0
            broken[own] = failed.any(1)
            x_s[own] = torch.where(failed, x_t[own], made)
        value = -k * student(x_t, t.float(), x_s=x_s)
        if value.shape != t.shape:
            raise ValueError(
                f"FewStepObjective: the student must give log p(x_s | x_t), (B,) = {tuple(t.shape)}, got "
                f"{tuple(value.shape)}"
            )
        value = torch.where(broken, torch.nan, value)
        distillation = torch.zeros_like(value)
        if bool(near.any()):
            found = self._divergence(
                student, teacher, process, x_t[near], t[near], key[:, near], latents, teacher_latents
            )
            distillation = distillation.index_put((near.nonzero()[:, 0],), found.to(value.dtype))
        zero = torch.zeros_like(value)
        parts = {
            "few_step_data": torch.where(own, zero, value),
            "few_step_consistency": torch.where(own, value, zero),
            "distillation": self.distillation * distillation,
        }
        return LossParts(parts, {"revealed": (x_s != x_t).sum(1).to(value.dtype)})

    def _both_steps(
        self,
        target: Denoiser,
        teacher: Denoiser,
        process: Process,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        key: Tensor,
        latents: Latents,
        teacher_latents: Latents | None,
    ) -> Tensor:
        """x_s (n, D): half the step by the teacher, half by the student; -1 where a draw failed."""
        u = (t + s) / 2
        told = {} if teacher_latents is None else {"latents": teacher_latents(key[_TEACHER_LATENTS], 1)[:, 0]}
        with inference(teacher, x_t.device):
            logits = of_states(teacher(x_t, t.float(), **told), process)
            x_u: Any = process.step(x_t, logits, t, u, key[_TEACHER])
        failed = x_u < 0
        x_u = torch.where(failed, x_t, x_u)
        with inference(target, x_t.device):
            logits = of_states(target(x_u, u.float(), latents=latents(key[_TARGET_LATENTS], 1)[:, 0]), process)
            x_s: Any = process.step(x_u, logits, u, s, key[_STUDENT])
        return torch.where(failed, -1, x_s)

    def _divergence(
        self,
        student: Denoiser,
        teacher: Denoiser,
        process: Process,
        x_t: Tensor,
        t: Tensor,
        key: Tensor,
        latents: Latents,
        teacher_latents: Latents | None,
    ) -> Tensor:
        """sum_d KL(teacher^d || p^d(. | x_t; lambda)) of one lambda a sample, (n,): at most too large, by convexity."""
        told = {} if teacher_latents is None else {"latents": teacher_latents(key[_TEACHER_LATENTS], _TEACHERS)}
        with inference(teacher, x_t.device):
            known: Logits = of_states(constant(teacher(x_t, t.float(), **told)), process)
            known = known if teacher_latents is None else marginal(known)
        own = of_states(student(x_t, t.float(), latents=latents(key[_LATENTS], 1)[:, 0]), process)
        return row_divergence(Rows(own, known, process.weight(x_t)))
