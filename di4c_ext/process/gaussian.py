"""Discretised Gaussian diffusion over S ordered states (grey levels): jumps of a few levels, ever faster with time.

Each position jumps by itself with the rates beta(t) R of `target_rate.py`, beta(t) = b ln(kappa) kappa^t, so that

    q(x_t | x_s) = exp((I(t) - I(s)) R)[x_s, x_t],   I(t) = b (kappa^t - 1)

and x_1 is all but distributed as pi, a broad Gaussian about the middle. The step from t down to s draws x_0 from the
denoiser and then x_s from the posterior

    q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0)

or, in one draw, x_s from its mean over x_0: p(x_s | x_t) = q(x_t | x_s) sum_x0 p(x_0) / q(x_t | x_0) q(x_s | x_0).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import Logits, checks
from di4c_ext.ops.reference import prefix_masses, sample_rows
from di4c_ext.process import arguments, rows
from di4c_ext.process.base import AnyLogits, Time
from di4c_ext.process.coins import coins
from di4c_ext.process.target_rate import TargetRate, target_rate, transition

_NAME = "GaussianProcess"
_CPU = torch.device("cpu")
_PIECE = 1 << 22  # float64 numbers to a piece of what is made of S numbers a position, or S^2 a time


class StepTables(NamedTuple):
    """left[n, x_t, x_s] right[n, x_0, x_s] + base[n, x_t, x_0] is the posterior times a number: (N, S, S) float64."""

    left: Tensor
    right: Tensor
    base: Tensor | None


class GaussianProcess:
    """Discretised Gaussian diffusion over `num_states` ordered states S >= 2.

    The constants are the published ones for 256 levels. Fewer levels want narrower ones and less of a time_base, since
    a jump takes them farther: 3, 64 and 0.3 mix 32 levels as the published constants mix 256.

    rate_sigma, q_sigma: widths of a jump and of pi, in states. time_exponential kappa > 1, time_base b > 0.
    epsilon, cutoff: 0, for the process as it is defined. The published programs set entries of q below 1e-8 to 0
    (cutoff=1e-8) and then take (q(x_t|x_s) + epsilon)(q(x_s|x_0) + epsilon) / (q(x_t|x_0) + epsilon) + epsilon with
    epsilon=1e-9 for the posterior: that is what these two do.
    """

    def __init__(
        self,
        num_states: int = 256,
        *,
        rate_sigma: float = 6.0,
        q_sigma: float = 512.0,
        time_exponential: float = 100.0,
        time_base: float = 3.0,
        epsilon: float = 0.0,
        cutoff: float = 0.0,
    ) -> None:
        if num_states < 2:
            raise ValueError(f"{_NAME}: num_states must be at least 2, got {num_states}")
        for name, value, least in (
            ("rate_sigma", rate_sigma, 0),
            ("q_sigma", q_sigma, 0),
            ("time_exponential", time_exponential, 1),
            ("time_base", time_base, 0),
        ):
            if not least < value < math.inf:
                raise ValueError(f"{_NAME}: {name} must be greater than {least} and finite, got {value}")
        if not 0 <= cutoff < 1 or not 0 <= epsilon < 1:
            raise ValueError(f"{_NAME}: epsilon and cutoff must lie in [0, 1), got {epsilon} and {cutoff}")
        if cutoff > 0 and epsilon == 0:
            raise ValueError(
                f"{_NAME}: cutoff = {cutoff} without epsilon leaves some x_0 no posterior; "
                "take epsilon = 1e-9 with it, or neither"
            )
        self.num_states = num_states
        self.rate_sigma, self.q_sigma = float(rate_sigma), float(q_sigma)
        self.time_exponential, self.time_base = float(time_exponential), float(time_base)
        self.epsilon, self.cutoff = float(epsilon), float(cutoff)

    def __repr__(self) -> str:
        return (
            f"GaussianProcess(num_states={self.num_states}, rate_sigma={self.rate_sigma}, q_sigma={self.q_sigma}, "
            f"time_exponential={self.time_exponential}, time_base={self.time_base}, epsilon={self.epsilon}, "
            f"cutoff={self.cutoff})"
        )

    # ---- the forward process ----

    @property
    def rate(self) -> Tensor:
        """R (S, S) float64: from row to column. At time t the rates are beta(t) R."""
        return self._rate(_CPU).rate.clone()

    @property
    def stationary(self) -> Tensor:
        """pi (S,) float64, the law of x_1."""
        return self._rate(_CPU).stationary.clone()

    def beta(self, t: Time) -> Tensor:
        """b ln(kappa) kappa^t, float64, of the shape of t."""
        return self.time_base * math.log(self.time_exponential) * self.time_exponential ** arguments.time(_NAME, "t", t)

    def interval(self, t: Time, s: Time = 0.0) -> Tensor:
        """I(t) - I(s), the integral of beta, float64; no digit is lost where t and s are close."""
        t, s = arguments.time(_NAME, "t", t, dims=2), arguments.time(_NAME, "s", s, dims=2)
        log_kappa = math.log(self.time_exponential)
        return self.time_base * torch.exp(log_kappa * s) * torch.expm1(log_kappa * (t - s))

    def transition(self, t: Time, s: Time = 0.0, device: torch.device | str | None = None) -> Tensor:
        """q(x_t | x_s), float64, rows x_s: (S, S) for numbers, (B, S, S) for times (B,); s <= t.

        On the device of the times, or another. Equal times share the memory of one matrix.
        """
        tau = self.interval(t, s)
        if tau.device.type == "cpu" and bool((tau < 0).any()):
            raise ValueError(f"{_NAME}.transition: s must not be after t, got t = {t}, s = {s}; swap them")
        tables, which = self._transitions(tau, torch.device(device or tau.device))
        if tau.ndim == 0:
            return tables[0].clone()
        return tables.clone().expand(*tau.shape, -1, -1) if which is None else tables[which]

    def prior(self, shape: Sequence[int], keys: Tensor) -> Tensor:
        """x_1 (B, D) ~ pi, position by position, on the keys' device."""
        _, length = arguments.prior_shape(_NAME, shape, keys)
        bits, _ = coins(f"{_NAME}.prior", keys, 1, length, 0)
        prefix = prefix_masses(self._rate(keys.device).stationary[None])
        return sample_rows(prefix, torch.zeros_like(bits), bits)[:, 0]

    def corrupt(self, x_0: Tensor, t: Time, keys: Tensor, *, draws: int | None = None, stream: int = 0) -> Tensor:
        """x_t ~ q(x_t | x_0), (B, D), or (B, draws, D): independent draws from one x_0 (B, D).

        t is a number, (B,), or with draws (B, draws): each draw at its own time. A state of probability 0 is never
        drawn, nor is one below 1e-14. Nothing of S numbers a position is made: a draw looks log2 S times at a row of q.
        """
        caller = f"{_NAME}.corrupt"
        arguments.states(caller, "x_0", x_0, keys)
        arguments.known_states(caller, "x_0", x_0, self.num_states)
        number = arguments.draws(caller, draws)
        tau = self.interval(arguments.times_of_draws(caller, t, x_0, draws))
        prefix, which = self._prefixes(tau, x_0.device)
        row = x_0[:, None].expand(-1, number, -1)
        if which is not None:
            row = row + self.num_states * (which if which.ndim == 2 else which[:, None])[..., None]
        bits, _ = coins(caller, keys, number, x_0.shape[1], stream)
        x_t = sample_rows(prefix, row, bits)
        return x_t[:, 0] if draws is None else x_t

    # ---- the step back ----

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
        """x_s (B, D), or (B, draws, D): x_0 from the logits (B, D, S), then x_s from the posterior given both.

        Two draws a position and nothing of S numbers: logits may be a Logistic or Hidden, never held whole. At s = 0
        x_s is x_0. A row of logits without a distribution (NaN, all -inf) leaves -1.
        """
        self._check("step", x_t, logits, keys)
        tables = self._step_tables("step", t, s, x_t)
        x_0: Any = ops.sample_categorical(logits, keys, draws=draws, stream=stream, temperature=temperature)
        return ops.sample_product(tables.left, tables.right, x_t, x_0, keys, base=tables.base, stream=stream)

    @torch.no_grad()
    def step_marginal(
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
        """A draw of the same law as `step`'s from p(x_s | x_t) itself: one to a position, a matrix product before it.

        The law is float64, its logarithm float32; some positions at a time, so that little of it is held at once.
        """
        self._check("step_marginal", x_t, logits, keys)
        checks.temperature(f"{_NAME}.step_marginal", temperature)
        tables = self._step_tables("step_marginal", t, s, x_t)
        pieces = []
        length = x_t.shape[1]
        size = max(_PIECE // max(x_t.shape[0] * self.num_states, 1), 1)
        for first in range(0, max(length, 1), size):
            piece = slice(first, first + size)
            law = self._law(x_t[:, piece], rows.some(logits, piece), tables, temperature)
            drawn: Any = ops.sample_categorical(
                law.log().float(), keys, draws=draws, stream=stream, first_position=first
            )
            pieces.append(drawn)
        return torch.cat(pieces, -1)

    def posterior(self, x_t: Tensor, logits: Logits, t: Time, s: Time) -> Tensor:
        """The law of `step` and `step_marginal`, exactly: float64 (B, D, S). For tests."""
        self._check("posterior", x_t, logits)
        return self._law(x_t, logits, self._step_tables("posterior", t, s, x_t), 1.0)

    def weight(self, x_t: Tensor) -> Tensor:
        """(B, D) float32 of ones: no position tells its x_0."""
        return torch.ones(x_t.shape, dtype=torch.float32, device=x_t.device)

    def carry_over(self, logits: AnyLogits, x: Tensor) -> AnyLogits:
        """The logits (..., D, S) as they are: nothing that x tells is certain."""
        arguments.logits(f"{_NAME}.carry_over", logits, x, self.num_states)
        return logits

    # ---- tables ----

    def _law(self, x_t: Tensor, logits: Logits, tables: StepTables, temperature: float) -> Tensor:
        """p(x_s | x_t) (B, D, S): the sum over x_0 of p(x_0) w(x_s | x_t, x_0) / Z(x_t, x_0), Z the sum of w."""
        left, right, base = tables
        total = left @ right.mT
        if base is not None:
            total = total + self.num_states * base
        shared = left.shape[0] == 1
        sample = 0 if shared else torch.arange(x_t.shape[0], device=x_t.device)[:, None]
        share = rows.probabilities(logits, temperature) / total[sample, x_t]
        law = left[sample, x_t] * (share @ (right[0] if shared else right))
        return law if base is None else law + (share * base[sample, x_t]).sum(-1, keepdim=True)

    def _step_tables(self, method: str, t: Time, s: Time, x_t: Tensor) -> StepTables:
        caller = f"{_NAME}.{method}"
        later, earlier = arguments.time(_NAME, "t", t), arguments.time(_NAME, "s", s)
        arguments.falling(_NAME, later, earlier)
        arguments.one_a_sample(caller, "t", later, x_t)
        arguments.one_a_sample(caller, "s", earlier, x_t)
        later, earlier = torch.broadcast_tensors(later, earlier)
        looked_at = later.device.type == earlier.device.type == "cpu" and later.numel() > 0
        if later.ndim and looked_at and bool(((later == later[0]) & (earlier == earlier[0])).all()):
            later, earlier = later[0], earlier[0]  # one table for all samples

        def tables(t: Tensor, s: Tensor | float) -> Tensor:
            found, which = self._transitions(self.interval(t, s), x_t.device)
            return found.expand(later.numel(), -1, -1) if which is None else found[which]

        left, right = tables(later, earlier).mT, tables(earlier, 0.0)
        if self.epsilon == 0:
            return StepTables(left, right, None)
        e = self.epsilon
        return StepTables(left + e, right + e, e * (tables(later, 0.0).mT + e))

    def _rate(self, device: torch.device) -> TargetRate:
        return target_rate(self.num_states, self.rate_sigma, self.q_sigma, device)

    def _transitions(self, tau: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """q for tau of any shape: the matrices of its values (U, S, S), and which each is; None where there is one."""
        values, which = _distinct(tau, device)
        return self._matrices(values, device), which

    def _matrices(self, tau: Tensor, device: torch.device) -> Tensor:
        """tau (U,) -> q (U, S, S)."""
        on_cpu = tau.device.type == "cpu"
        if tau.shape[0] == 1 and on_cpu:
            q = transition(self.num_states, self.rate_sigma, self.q_sigma, device, tau.item())
        else:
            q = self._rate(device).exponential(tau, None if on_cpu else self.interval(1.0).item())
        return self._cut(q)

    def _prefixes(self, tau: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The rows of q for tau's values, as `sample_rows` takes them (U S, P), and which of the U each tau is."""
        values, which = _distinct(tau, device)
        some = max(_PIECE // self.num_states**2, 1)
        prefix = [prefix_masses(self._cut(self._rate(device).laws(piece))) for piece in values.split(some)]
        return torch.cat(prefix).flatten(0, 1), which

    def _cut(self, q: Tensor) -> Tensor:
        return torch.where(q < self.cutoff, 0.0, q) if self.cutoff > 0 else q

    # ---- arguments ----

    def _check(self, method: str, x_t: Tensor, logits: Logits, keys: Tensor | None = None) -> None:
        caller = f"{_NAME}.{method}"
        arguments.states(caller, "x_t", x_t, keys)
        arguments.known_states(caller, "x_t", x_t, self.num_states)
        arguments.logits(f"{_NAME}.{method}", logits, x_t, self.num_states)


def _distinct(tau: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The values of tau (U,), and which of them each is, of its shape on `device`; None where there is one.

    Where looking at them would stop the host, all count as different.
    """
    if tau.numel() == 1:
        return tau.reshape(1), None
    if tau.device.type != "cpu":
        return tau.flatten(), torch.arange(tau.numel(), device=device).view(tau.shape)
    values, which = tau.unique(return_inverse=True)
    return values, None if values.numel() == 1 else which.to(device)
