"""Absorbing (masked) diffusion: a position is clean or masked, and once masked stays so.

Time runs from 1 (all masked) to 0 (data). With alpha(t) = P(clean at t) and m(t) = 1 - alpha(t), independently per
position,

    q(x_t | x_0):  masked with probability m(t), else x_0
    p(x_s | x_t):  clean positions stay; a masked one is unmasked with probability (m(t) - m(s)) / m(t), its token
                   then drawn from the denoiser; s < t

The schedules m(t) are those of `schedules.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.ops import Logits
from di4c_ext.process import arguments, rows
from di4c_ext.process.base import Time
from di4c_ext.process.schedules import TIMES
from di4c_ext.process.schedules import schedule as schedule_of

_NAME = "AbsorbingProcess"


class AbsorbingProcess:
    """Masked diffusion over `num_states` clean states S.

    `mask_id` is the state that means "masked": S by default, so that logits (.., S) hold clean classes only. A
    smaller one names a class inside the logits, as language models have it; it is then never drawn.
    """

    def __init__(self, num_states: int, schedule: str = "linear", mask_id: int | None = None) -> None:
        if num_states < 1:
            raise ValueError(f"AbsorbingProcess: num_states must be at least 1, got {num_states}")
        self._mask, self._mask_slope = schedule_of(_NAME, schedule)
        self._time = TIMES[schedule]
        if mask_id is not None and not 0 <= mask_id <= num_states:
            raise ValueError(
                f"AbsorbingProcess: mask_id must lie in 0..num_states = 0..{num_states}, got {mask_id}; "
                "leave it out for the id after the last state"
            )
        self.num_states = num_states
        self.schedule = schedule
        self.mask_id = num_states if mask_id is None else mask_id

    def __repr__(self) -> str:
        return f"AbsorbingProcess(num_states={self.num_states}, schedule={self.schedule!r}, mask_id={self.mask_id})"

    def alpha(self, t: Time) -> Tensor:
        """P(clean at t), float64, of the shape of t."""
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Time) -> Tensor:
        """m(t) = 1 - alpha(t), float64, of the shape of t."""
        return self._mask(arguments.time(_NAME, "t", t))

    def time_of(self, m: Tensor) -> Tensor:
        """The t at which m(t) = m, float64, of the shape of m in [0, m(1)]."""
        return self._time(m.double())

    def unmask_prob(self, t: Time, s: Time) -> Tensor:
        """P(clean at s | masked at t) = (alpha(s) - alpha(t)) / (1 - alpha(t)), float64. Exactly 1 for s = 0.

        Raises ValueError unless 0 <= s < t <= 1. Tensors on another device than the CPU are not read back for that.
        """
        t, s = arguments.time(_NAME, "t", t), arguments.time(_NAME, "s", s)
        arguments.falling(_NAME, t, s)
        m_t, m_s = self._mask(t), self._mask(s)
        return (m_t - m_s) / m_t

    def elbo_weight(self, t: Time) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), float64: the likelihood bound is its integral over t in (0, 1] against the
        expected sum over masked positions of -log p(x_0^d | x_t). Infinite at t = 0."""
        t = arguments.time(_NAME, "t", t)
        return self._mask_slope(t) / self._mask(t)

    def prior(self, shape: Sequence[int], keys: Tensor) -> Tensor:
        """x_1 (B, D): masks, on the keys' device. The keys are asked for because other processes draw their prior."""
        shape = arguments.prior_shape(_NAME, shape, keys)
        return torch.full(shape, self.mask_id, dtype=torch.int64, device=keys.device)

    def corrupt(self, x_0: Tensor, t: Time, keys: Tensor, *, stream: int = 0) -> Tensor:
        """x_t ~ q(x_t | x_0): x_0 (B, D) with each position masked with probability m(t).

        Equal keys and stream give equal coins at every t, so what is masked at t is masked at every later time.
        """
        arguments.states(f"{_NAME}.corrupt", "x_0", x_0, keys)
        m = arguments.per_sample(f"{_NAME}.corrupt", "t", self.mask_prob(t), x_0)
        coins = random.uniform(keys, x_0.shape[1], stream=stream)
        return torch.where(coins < m[:, None], self.mask_id, x_0)

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

        top_p: below 1 tokens are drawn from the nucleus of their row. A row of logits without a distribution (NaN, all
        -inf) leaves -1 where it was to be unmasked. Of a Hidden only the rows that are unmasked are made, a few at a
        time; a Logistic is made whole.
        """
        arguments.states(f"{_NAME}.step", "x_t", x_t, keys)
        arguments.logits(f"{_NAME}.step", logits, x_t, self.num_states)
        unmask = arguments.per_sample(f"{_NAME}.step", "t and s", self.unmask_prob(t, s), x_t)
        x_s: Any = ops.absorbing_step(
            logits if isinstance(logits, ops.Hidden) else rows.whole(logits),
            x_t,
            keys,
            unmask_prob=unmask,
            mask_id=self.mask_id,
            draws=draws,
            stream=stream,
            temperature=temperature,
            top_p=top_p,
        )
        return x_s

    def unmasked(self, x_t: Tensor, t: Time, s: Time, keys: Tensor, *, stream: int = 0) -> Tensor:
        """(B, D) bool: where `step` with these keys draws a token. It is so whatever the logits."""
        arguments.states(f"{_NAME}.unmasked", "x_t", x_t, keys)
        unmask = arguments.per_sample(f"{_NAME}.unmasked", "t and s", self.unmask_prob(t, s), x_t)
        return (x_t == self.mask_id) & (random.uniform(keys, x_t.shape[1], stream=stream) < unmask[:, None])

    def posterior(self, x_t: Tensor, logits: Logits, t: Time, s: Time) -> Tensor:
        """The law of `step`, exactly: float64 (B, D, N) over the N = max(S, mask_id + 1) states. For tests."""
        arguments.logits(f"{_NAME}.posterior", logits, x_t, self.num_states)
        unmask = arguments.per_sample(f"{_NAME}.posterior", "t and s", self.unmask_prob(t, s), x_t)
        p = rows.whole(self.carry_over(rows.whole(logits).double(), x_t)).softmax(-1)
        p = torch.nn.functional.pad(p, (0, max(self.mask_id + 1 - self.num_states, 0)))
        stay = torch.where(x_t == self.mask_id, 1 - unmask[:, None], 0.0)
        here = torch.nn.functional.one_hot(x_t, p.shape[-1])
        return (1 - stay)[..., None] * p + stay[..., None] * here

    def weight(self, x_t: Tensor) -> Tensor:
        """(B, D) float32: 1 at masked positions, 0 at clean ones."""
        return (x_t == self.mask_id).to(torch.float32)

    def carry_over(self, logits: Logits, x: Tensor) -> Logits:
        """Logits (..., D, S): at clean positions of x (..., D) the state itself is certain; no mask is predicted.

        A Hidden stays one, told what is certain: its logits are not made.
        """
        arguments.logits(f"{_NAME}.carry_over", logits, x, self.num_states)
        if isinstance(logits, ops.Hidden):
            return self._carried_over(logits, x)
        states = torch.arange(self.num_states, device=x.device)
        clean = (x != self.mask_id)[..., None]
        possible = torch.where(clean, states == x[..., None], states != self.mask_id)
        return rows.whole(logits).masked_fill(clean, 0.0).masked_fill(~possible, -torch.inf)

    def _carried_over(self, logits: ops.Hidden, x: Tensor) -> ops.Hidden:
        bias = logits.bias
        if self.mask_id < self.num_states:
            bias = logits.weight.new_zeros(self.num_states) if bias is None else bias
            is_mask = torch.arange(self.num_states, device=bias.device) == self.mask_id
            bias = bias.masked_fill(is_mask, -torch.inf)
        certain = torch.where(x == self.mask_id, -1, x)
        return logits._replace(bias=bias, certain=certain)
