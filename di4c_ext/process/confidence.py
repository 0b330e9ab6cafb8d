"""Masked diffusion whose teacher steps as MaskGIT samples: it reveals the positions that it is surest of.

The noise is that of absorbing diffusion: each position is masked with probability m(t), each alone. A step t -> s draws
a token at every masked position and reveals so many of them that D (1 - m(s)) positions are clean then, those of the
highest confidence log p(token) + gumbel (1 - rho(t)) g with Gumbel numbers g; rho(t) = (1 - t) T / (T - 1) is, at the
times of a sampler of T steps, how far it has come: 0 at its first step and 1 at its last.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import Logits
from di4c_ext.process import arguments, rows
from di4c_ext.process.absorbing import AbsorbingProcess
from di4c_ext.process.base import Time

_NAME = "ConfidenceProcess"


class ConfidenceProcess(AbsorbingProcess):
    """Absorbing diffusion with steps by confidence. Defaults are the published ones for image tokens, and departures:

    num_states, mask_id  1024 codes (mask_id left out): no law has the mask symbol. Published is 1025 with mask_id 1024,
                         the mask being a class like any other. A mask is never data: what probability it has in
                         teacher and student is learnt and compared for nothing, and where a step draws it the position
                         stays open although its turn has come. A denoiser that gives its logit all the same loses it
                         in `Di4CObjective` and in `sample_confidence`.
    gumbel               scale of the Gumbel numbers at t = 1
    ramp_steps           T of rho
    clamp_ramp           keeps rho to 1. Published is False: for t < 1 / T, where no sampler of T steps ever is, 1 - rho
                         is negative and the noise mirrored, and guidance goes beyond its full weight
    guidance             w, the weight of `guide` at rho = 1, for a teacher's step from guided logits. Published is 0,
                         although samples are then drawn with guidance: the student's targets start from states x_u
                         that its own sampler does not visit
    """

    def __init__(
        self,
        num_states: int,
        schedule: str = "arccos",
        mask_id: int | None = None,
        *,
        gumbel: float = 4.5,
        ramp_steps: int = 8,
        clamp_ramp: bool = False,
        guidance: float = 0.0,
    ) -> None:
        super().__init__(num_states, schedule, mask_id)
        for name, value in (("gumbel", gumbel), ("guidance", guidance)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{_NAME}: {name} must be finite and >= 0, got {value!r}")
        if isinstance(ramp_steps, bool) or not isinstance(ramp_steps, int) or ramp_steps < 2:
            raise ValueError(f"{_NAME}: ramp_steps must be an integer of at least 2, got {ramp_steps!r}")
        self.gumbel = float(gumbel)
        self.ramp_steps = ramp_steps
        self.clamp_ramp = clamp_ramp
        self.guidance = float(guidance)

    def __repr__(self) -> str:
        names = ("num_states", "schedule", "mask_id", "gumbel", "ramp_steps", "clamp_ramp", "guidance")
        return f"{_NAME}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def ramp(self, t: Time) -> Tensor:
        """rho(t), float64, of the shape of t."""
        rho = (1 - arguments.time(_NAME, "t", t)) * (self.ramp_steps / (self.ramp_steps - 1))
        return rho.clamp(max=1) if self.clamp_ramp else rho

    def guide(self, logits: Logits, unconditional: Logits, t: Time) -> Tensor:
        """(1 + w rho(t)) logits - w rho(t) unconditional, (B, D, S): what a guided teacher steps from."""
        conditional, without = rows.wide(logits), rows.wide(unconditional)
        if conditional.shape != without.shape:
            raise ValueError(
                f"{_NAME}.guide: logits and unconditional must be alike, (B, D, S), got "
                f"{tuple(conditional.shape)} and {tuple(without.shape)}"
            )
        scale = arguments.per_sample(f"{_NAME}.guide", "t", 1 + self.guidance * self.ramp(t), conditional)
        return rows.beyond(without, conditional, scale.to(conditional.dtype)[:, None, None])

    def step(
        self,
        x_t: Tensor,
        logits: Logits,
        t: Time,
        s: Time,
        keys: Tensor,
        *,
        draws: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stream: int = 0,
    ) -> Tensor:
        """x_s (B, D), or (B, draws, D): independent steps t -> s from one row of logits (B, D, S) each.

        k = max(0, floor(n - D m(s))) of a sample's n masked positions are revealed, the same number in every draw: how
        many are clean at s is given, how many were at t is chance. Where it was much, k is 0 and x_s is x_t. A row of
        logits without a distribution leaves -1 where it is masked. temperature divides the logits (a published
        multiplier is its inverse); top_p draws from the nucleus of each row, and log p is then within it.
        """
        caller = f"{_NAME}.step"
        arguments.states(caller, "x_t", x_t, keys)
        arguments.logits(caller, logits, x_t, self.num_states)
        t, s = arguments.time(_NAME, "t", t), arguments.time(_NAME, "s", s)
        arguments.falling(_NAME, t, s)
        length, x = x_t.shape[1], rows.whole(logits)
        options = {
            "draws": draws,
            "stream": stream,
            "temperature": temperature,
            "top_p": top_p,
            "return_log_prob": True,
        }
        drawn: Any
        if self.mask_id < self.num_states:  # a class like any other
            drawn = ops.sample_categorical(x, keys, **options)  # type: ignore[arg-type]
        else:
            drawn = ops.absorbing_step(x, x_t, keys, unmask_prob=1.0, mask_id=self.mask_id, **options)  # type: ignore[arg-type]
        masked = (x_t == self.mask_id).sum(1)
        clean = (1 - arguments.per_sample(caller, "s", self.mask_prob(s), x_t)) * length
        noise = arguments.per_sample(caller, "t", self.gumbel * (1 - self.ramp(t)), x_t)
        tokens, log_prob = drawn
        return ops.reveal(
            x_t,
            tokens,
            log_prob,
            keys,
            count=(clean - (length - masked)).floor().long(),
            mask_id=self.mask_id,
            noise=noise,
            stream=stream,
        )

    unmasked = None  # type: ignore[assignment]  # which positions a step reveals hangs on the logits

    def posterior(self, x_t: Tensor, logits: Tensor, t: Time, s: Time) -> Tensor:  # type: ignore[override]
        """Refused: positions are revealed together, so no table of single positions is the law of `step`."""
        raise NotImplementedError(f"{_NAME}.posterior: a step by confidence has no law position by position")
