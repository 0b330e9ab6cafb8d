"""Uniform-state diffusion: a position is the data's, or lost and then any of the S states.

With alpha(t) the probability that a position is not lost (`schedules.py`) and alpha(t|s) = alpha(t) / alpha(s),

    q(x_t | x_s) = alpha(t|s) [x_t = x_s] + (1 - alpha(t|s)) / S

independently per position. A denoiser of this process predicts x_0^d from the *other* positions of x_t (that is how
such teachers are trained: whether x_t^d itself is lost is for the process to weigh), and then

    p(x_s | x_t) = q(x_t | x_s) (alpha(s) p(x_s) + (1 - alpha(s)) / S) / Z,   Z = alpha(t) p(x_t) + (1 - alpha(t)) / S

is exact. It is three masses: x_t stays, with alpha(t|s) (alpha(s) p(x_t) + (1 - alpha(s)) / S) / Z; a state drawn from
p, with (1 - alpha(t|s)) alpha(s) / (S Z); one drawn at random, with (1 - alpha(t|s)) (1 - alpha(s)) / (S Z).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import Logits
from di4c_ext.ops.reference.philox import multiply_high, unit_double
from di4c_ext.process import arguments, rows
from di4c_ext.process.base import AnyLogits, Time
from di4c_ext.process.coins import coins
from di4c_ext.process.schedules import schedule as schedule_of

_NAME = "UniformProcess"


class _Times(NamedTuple):
    """Of each sample, (B,) float64."""

    alpha_t: Tensor
    alpha_s: Tensor
    lost_t: Tensor  # 1 - alpha(t)
    lost_s: Tensor
    lost_between: Tensor  # 1 - alpha(t|s)


class UniformProcess:
    """Uniform-state diffusion over `num_states` states S >= 2; schedules as the absorbing process has them."""

    def __init__(self, num_states: int, schedule: str = "linear") -> None:
        if num_states < 2:
            raise ValueError(f"{_NAME}: num_states must be at least 2, got {num_states}")
        self._lost, _ = schedule_of(_NAME, schedule)
        self.num_states = num_states
        self.schedule = schedule

    def __repr__(self) -> str:
        return f"UniformProcess(num_states={self.num_states}, schedule={self.schedule!r})"

    def alpha(self, t: Time) -> Tensor:
        """P(not lost at t), float64, of the shape of t."""
        return 1 - self._lost(arguments.time(_NAME, "t", t))

    def prior(self, shape: Sequence[int], keys: Tensor) -> Tensor:
        """x_1 (B, D): any states, on the keys' device."""
        _, length = arguments.prior_shape(_NAME, shape, keys)
        return self._any_state(coins(f"{_NAME}.prior", keys, 1, length, 0)[1])[:, 0]

    def corrupt(self, x_0: Tensor, t: Time, keys: Tensor, *, draws: int | None = None, stream: int = 0) -> Tensor:
        """x_t ~ q(x_t | x_0), (B, D), or (B, draws, D): independent draws from one x_0 (B, D).

        t is a number, (B,), or with draws (B, draws): each draw at its own time. Equal keys and stream give equal
        coins at every t: what is lost at t is lost, and to the same state, at every later time.
        """
        caller = f"{_NAME}.corrupt"
        arguments.states(caller, "x_0", x_0, keys)
        arguments.known_states(caller, "x_0", x_0, self.num_states)
        lost = self._lost(arguments.times_of_draws(caller, t, x_0, draws))
        if lost.ndim < 2:
            lost = arguments.per_sample(caller, "t", lost, x_0)[:, None]
        coin, noise = coins(caller, keys, arguments.draws(caller, draws), x_0.shape[1], stream)
        keep = unit_double(coin) >= lost.to(x_0.device)[..., None]
        x_t = torch.where(keep, x_0[:, None], self._any_state(noise))
        return x_t[:, 0] if draws is None else x_t

    @torch.no_grad()
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
        stream: int = 0,
    ) -> Tensor:
        """x_s (B, D), or (B, draws, D): independent steps t -> s from one row of logits (B, D, S) each.

        One read of the logits and one draw from p, then the coin that says which of the three masses it is. At s = 0
        nothing is drawn at random. A row of logits without a distribution (NaN, all -inf) leaves -1. A Logistic or
        Hidden is made whole.
        """
        caller = f"{_NAME}.step"
        arguments.states(caller, "x_t", x_t, keys)
        arguments.known_states(caller, "x_t", x_t, self.num_states)
        arguments.logits(f"{_NAME}.step", logits, x_t, self.num_states)
        at = self._times("step", t, s, x_t)
        x = rows.whole(logits)
        number = arguments.draws(caller, draws)
        result: Any = ops.sample_categorical(
            x, keys, draws=number, stream=stream, temperature=temperature, return_log_prob=True
        )
        drawn, log_prob = result
        here = x_t[:, None].expand_as(drawn)
        p_here = _probability(x, here, drawn, log_prob.double(), temperature)

        keep, noise = self._masses(p_here, _Times(*(v[:, None, None] for v in at)))
        coin, word = coins(caller, keys, number, x_t.shape[1], stream)
        u = unit_double(coin)
        x_s = torch.where(u < keep, here, torch.where(u >= 1 - noise, self._any_state(word), drawn))
        x_s = torch.where(drawn < 0, drawn, x_s)
        return x_s[:, 0] if draws is None else x_s

    def posterior(self, x_t: Tensor, logits: Logits, t: Time, s: Time) -> Tensor:
        """The law of `step`, exactly: float64 (B, D, S). For tests."""
        arguments.logits(f"{_NAME}.posterior", logits, x_t, self.num_states)
        at = _Times(*(v[:, None, None] for v in self._times("posterior", t, s, x_t)))
        p = rows.whole(logits).double().softmax(-1)
        here = torch.nn.functional.one_hot(x_t, self.num_states)
        jump = at.lost_between / self.num_states
        weights = ((1 - at.lost_between) * here + jump) * (at.alpha_s * p + at.lost_s / self.num_states)
        return weights / weights.sum(-1, keepdim=True)

    def weight(self, x_t: Tensor) -> Tensor:
        """(B, D) float32 of ones: no position tells its x_0."""
        return torch.ones(x_t.shape, dtype=torch.float32, device=x_t.device)

    def carry_over(self, logits: AnyLogits, x: Tensor) -> AnyLogits:
        """The logits (..., D, S) as they are: nothing that x tells is certain."""
        arguments.logits(f"{_NAME}.carry_over", logits, x, self.num_states)
        return logits

    def _any_state(self, bits: Tensor) -> Tensor:
        """64 random bits each -> one of the S states each."""
        return multiply_high(bits, torch.full_like(bits, self.num_states))

    def _times(self, method: str, t: Time, s: Time, x: Tensor) -> _Times:
        caller = f"{_NAME}.{method}"
        t, s = arguments.time(_NAME, "t", t), arguments.time(_NAME, "s", s)
        arguments.falling(_NAME, t, s)
        lost_t, lost_s = (
            self._lost(arguments.per_sample(caller, name, value, x)) for name, value in (("t", t), ("s", s))
        )
        return _Times(1 - lost_t, 1 - lost_s, lost_t, lost_s, (lost_t - lost_s) / (1 - lost_s))

    def _masses(self, p: Tensor, at: _Times) -> tuple[Tensor, Tensor]:
        """The masses of staying at x_t and of a state at random, given p(x_t)."""
        total = at.alpha_t * p + at.lost_t / self.num_states
        keep = (1 - at.lost_between) * (at.alpha_s * p + at.lost_s / self.num_states)
        return keep / total, at.lost_between * at.lost_s / self.num_states / total


def _probability(x: Tensor, here: Tensor, drawn: Tensor, log_prob: Tensor, temperature: float) -> Tensor:
    """p(here) of rows x (B, D, S), by what a draw (B, n, D) tells of the row's normaliser: no second read of it."""
    if temperature == 0:
        return (drawn == here).double()
    at_here, at_drawn = (
        x.gather(-1, state.clamp(min=0).transpose(1, 2)).transpose(1, 2).double() for state in (here, drawn)
    )
    # In a row with a +inf its first is certain, and nothing else.
    lower = torch.where(torch.isposinf(at_drawn), -torch.inf, (at_here - at_drawn) / temperature + log_prob)
    return torch.where(drawn == here, log_prob, lower).exp()
