"""Absorbing (masked) diffusion: a position is clean or masked, and once masked stays so.

Time runs from 1 (all masked) to 0 (data). With alpha(t) = P(clean at t) and m(t) = 1 - alpha(t), independently per
position,

    q(x_t | x_0):  masked with probability m(t), else x_0
    p(x_s | x_t):  clean positions stay; a masked one is unmasked with probability (m(t) - m(s)) / m(t), its token
                   then drawn from the denoiser; s < t

Two literatures name the schedules. Image tokens give the mask ratio m(r) in terms of progress r = 1 - t; language
models give the total noise sigma(t) = -log alpha(t).

    name         m(t)                     the literature's form
    linear       t                        m(r) = 1 - r
    cosine       sin(pi t / 2)            m(r) = cos(pi r / 2)
    arccos       (2 / pi) arccos(1 - t)   m(r) = (2 / pi) arccos(r)
    log_linear   (1 - eps) t              sigma(t) = -log(1 - (1 - eps) t), eps = 1e-3

log_linear keeps sigma(1) finite by leaving a fraction eps of the data clean at t = 1; its reverse step, started from
masks alone, is that of linear to the last digit, for the factor cancels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.process.base import Time

_EPS = 1e-3  # of the log-linear schedule

# name: (m(t), m'(t)), both of float64 tensors. m rather than alpha: near the data it is m that keeps its digits, and
# m(0) = 0 exactly is what makes the last step unmask everything.
_MASK: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "log_linear": (lambda t: (1 - _EPS) * t, lambda t: torch.full_like(t, 1 - _EPS)),
    "linear": (lambda t: t, torch.ones_like),
    "cosine": (lambda t: torch.sin(t * (math.pi / 2)), lambda t: torch.cos(t * (math.pi / 2)) * (math.pi / 2)),
    "arccos": (lambda t: torch.arccos(1 - t) / (math.pi / 2), lambda t: (2 / math.pi) / torch.sqrt(t * (2 - t))),
}
SCHEDULES = tuple(_MASK)


class AbsorbingProcess:
    """Masked diffusion over `num_states` clean states S.

    `mask_id` is the state that means "masked": S by default, so that logits (.., S) hold clean classes only. A
    smaller one names a class inside the logits, as language models have it; it is then never drawn.
    """

    def __init__(self, num_states: int, schedule: str = "linear", mask_id: int | None = None) -> None:
        if num_states < 1:
            raise ValueError(f"AbsorbingProcess: num_states must be at least 1, got {num_states}")
        if schedule not in _MASK:
            raise ValueError(f"AbsorbingProcess: unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
        if mask_id is not None and not 0 <= mask_id <= num_states:
            raise ValueError(
                f"AbsorbingProcess: mask_id must lie in 0..num_states = 0..{num_states}, got {mask_id}; "
                "leave it out for the id after the last state"
            )
        self.num_states = num_states
        self.schedule = schedule
        self.mask_id = num_states if mask_id is None else mask_id
        self._mask, self._mask_slope = _MASK[schedule]

    def __repr__(self) -> str:
        return f"AbsorbingProcess(num_states={self.num_states}, schedule={self.schedule!r}, mask_id={self.mask_id})"

    def alpha(self, t: Time) -> Tensor:
        """P(clean at t), float64, of the shape of t."""
        return 1 - self.mask_prob(t)

    def mask_prob(self, t: Time) -> Tensor:
        """m(t) = 1 - alpha(t), float64, of the shape of t."""
        return self._mask(_checked("t", t))

    def unmask_prob(self, t: Time, s: Time) -> Tensor:
        """P(clean at s | masked at t) = (alpha(s) - alpha(t)) / (1 - alpha(t)), float64. Exactly 1 for s = 0.

        Raises ValueError unless 0 <= s < t <= 1. Tensors on another device than the CPU are not read back for that.
        """
        t, s = _checked("t", t), _checked("s", s)
        if t.device.type == s.device.type == "cpu" and not bool((s < t).all()):
            raise ValueError(
                "AbsorbingProcess: a step goes from t down to a smaller s, got "
                f"t = {_short(t)}, s = {_short(s)}; swap them or space the times out"
            )
        m_t, m_s = self._mask(t), self._mask(s)
        return (m_t - m_s) / m_t

    def elbo_weight(self, t: Time) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), float64: the likelihood bound is its integral over t in (0, 1] against the
        expected sum over masked positions of -log p(x_0^d | x_t). Infinite at t = 0."""
        t = _checked("t", t)
        return self._mask_slope(t) / self._mask(t)

    def prior(self, shape: Sequence[int], keys: Tensor) -> Tensor:
        """x_1 (B, D): masks, on the keys' device. The keys are asked for because other processes draw their prior."""
        if len(shape) != 2 or shape[0] != keys.shape[0]:
            raise ValueError(
                f"AbsorbingProcess.prior: shape must be (B, D) with one key a sample, "
                f"got {tuple(shape)} and keys {tuple(keys.shape)}"
            )
        return torch.full(tuple(shape), self.mask_id, dtype=torch.int64, device=keys.device)

    def corrupt(self, x_0: Tensor, t: Time, keys: Tensor, *, stream: int = 0) -> Tensor:
        """x_t ~ q(x_t | x_0): x_0 (B, D) with each position masked with probability m(t).

        Equal keys and stream give equal coins at every t, so what is masked at t is masked at every later time.
        """
        _check_states("corrupt", "x_0", x_0, keys)
        m = _per_sample("corrupt", "t", self.mask_prob(t), x_0)
        coins = random.uniform(keys, x_0.shape[1], stream=stream)
        return torch.where(coins < m[:, None], self.mask_id, x_0)

    def step(
        self,
        x_t: Tensor,
        logits: Tensor,
        t: Time,
        s: Time,
        keys: Tensor,
        *,
        draws: int | None = None,
        temperature: float = 1.0,
        stream: int = 0,
    ) -> Tensor:
        """x_s (B, D), or (B, draws, D): independent steps t -> s from one row of logits (B, D, S) each.

        A row of logits without a distribution (NaN, all -inf) leaves -1 where it was to be unmasked.
        """
        _check_states("step", "x_t", x_t, keys)
        self._check_logits("step", logits, x_t)
        unmask = _per_sample("step", "t and s", self.unmask_prob(t, s), x_t)
        x_s: Any = ops.absorbing_step(
            logits,
            x_t,
            keys,
            unmask_prob=unmask,
            mask_id=self.mask_id,
            draws=draws,
            stream=stream,
            temperature=temperature,
        )
        return x_s

    def posterior(self, x_t: Tensor, logits: Tensor, t: Time, s: Time) -> Tensor:
        """The law of `step`, exactly: float64 (B, D, N) over the N = max(S, mask_id + 1) states. For tests."""
        self._check_logits("posterior", logits, x_t)
        unmask = _per_sample("posterior", "t and s", self.unmask_prob(t, s), x_t)
        p = self.carry_over(logits.double(), x_t).softmax(-1)
        p = torch.nn.functional.pad(p, (0, max(self.mask_id + 1 - self.num_states, 0)))
        stay = torch.where(x_t == self.mask_id, 1 - unmask[:, None], 0.0)
        here = torch.nn.functional.one_hot(x_t, p.shape[-1])
        return (1 - stay)[..., None] * p + stay[..., None] * here

    def weight(self, x_t: Tensor) -> Tensor:
        """(B, D) float32: 1 at masked positions, 0 at clean ones."""
        return (x_t == self.mask_id).to(torch.float32)

    def carry_over(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits (..., D, S): at clean positions of x (..., D) the state itself is certain; no mask is predicted."""
        self._check_logits("carry_over", logits, x)
        states = torch.arange(self.num_states, device=x.device)
        clean = (x != self.mask_id)[..., None]
        possible = torch.where(clean, states == x[..., None], states != self.mask_id)
        return logits.masked_fill(clean, 0.0).masked_fill(~possible, -torch.inf)

    def _check_logits(self, method: str, logits: Tensor, x: Tensor) -> None:
        if logits.shape != (*x.shape, self.num_states):
            raise ValueError(
                f"AbsorbingProcess.{method}: logits must be {(*x.shape, self.num_states)}, the states' shape and then "
                f"S = {self.num_states}, got {tuple(logits.shape)}"
            )


def _checked(name: str, t: Time) -> Tensor:
    """A time as a float64 tensor, () or (B,). Its range is checked where that waits for no device."""
    time = torch.as_tensor(t, dtype=torch.float64)
    if time.ndim > 1:
        raise ValueError(f"AbsorbingProcess: {name} must be a number or (B,), got shape {tuple(time.shape)}")
    if time.device.type == "cpu" and not bool(((time >= 0) & (time <= 1)).all()):
        raise ValueError(f"AbsorbingProcess: {name} must lie in [0, 1], 1 = noise, 0 = data; got {_short(time)}")
    return time


def _per_sample(method: str, name: str, value: Tensor, x: Tensor) -> Tensor:
    """(B,) on the states' device; a number is filled in there rather than copied over."""
    if value.ndim == 0 and value.device.type == "cpu":
        return torch.full((x.shape[0],), value.item(), dtype=value.dtype, device=x.device)
    if value.ndim and value.shape[0] != x.shape[0]:
        raise ValueError(
            f"AbsorbingProcess.{method}: {name} must be a number or ({x.shape[0]},), one a sample, "
            f"got {tuple(value.shape)}"
        )
    return value.to(x.device).expand(x.shape[0])


def _check_states(method: str, name: str, x: Tensor, keys: Tensor) -> None:
    if x.ndim != 2 or x.dtype != torch.int64:
        raise ValueError(f"AbsorbingProcess.{method}: {name} must be int64 (B, D), got {x.dtype} {tuple(x.shape)}")
    if keys.shape != (x.shape[0],):
        raise ValueError(
            f"AbsorbingProcess.{method}: keys must be ({x.shape[0]},), one a sample of {name}, got {tuple(keys.shape)}"
        )


def _short(value: Tensor) -> str:
    listed = value.flatten()[:4].tolist()
    return str(listed[0]) if value.ndim == 0 else f"{listed}{'...' if value.numel() > 4 else ''}"
