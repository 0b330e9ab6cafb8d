"""The Gaussian target-rate generator and its exponential: continuous-time jumps over S ordered states.

With k = |i - j| and v(k) = exp(-(k - 1)^2 / rate_sigma^2), the outer of two states being the one farther from the
middle (the smaller where i + j < S, else the larger),

    R[outer, inner] = v(k),   R[inner, outer] = v(k) pi(outer) / pi(inner),   R[i, i] = -sum_j R[i, j]
    pi(i) ~ exp(-(i + 1 - S // 2)^2 / (2 q_sigma^2))

so that pi(i) R[i, j] = pi(j) R[j, i]: pi stays. The generator of Campbell et al., "A continuous time framework for
discrete denoising models" (NeurIPS 2022).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_DEGREE = 16  # terms of the exponential's series
_ERROR = 1e-14  # of the spectrum's entries, none of which exceeds 1
_SMALLEST = 1e-6  # of entries that are then right to eight digits
FLOOR = 1e-150  # no entry is less: a product of two is still a number


class Spectrum(NamedTuple):
    """exp(tau R) = left @ diag(exp(tau w)) @ right."""

    w: Tensor
    left: Tensor
    right: Tensor


class TargetRate:
    """R for one set of constants on one device; ask `target_rate` for it, which keeps what was made.

    rate (S, S), stationary pi (S,): float64.
    """

    def __init__(self, rate: Tensor, stationary: Tensor, device: torch.device) -> None:
        root = stationary.sqrt()
        symmetric = root[:, None] * rate / root
        w, u = torch.linalg.eigh((symmetric + symmetric.mT) / 2)
        fastest = -rate.diagonal().amin()
        jump = torch.eye(len(rate), dtype=torch.float64) + rate / fastest  # of the chain of jumps, entries >= 0
        powers = [torch.eye(len(rate), dtype=torch.float64)]
        for _ in range(4):
            powers.append(powers[-1] @ jump)
        self._fastest = fastest.item()
        self._device = device
        self.rate, self.stationary, self._powers = (
            rate.to(device),
            stationary.to(device),
            torch.stack(powers).to(device),
        )
        w = w.clamp(max=0)
        w[-1] = 0  # pi is what stays
        self._spectrum = Spectrum(w.to(device), (u / root[:, None]).to(device), (u.mT * root).to(device))
        self._long = self._first_long(stationary.amin().item())

    def exponential(self, tau: Tensor, longest: float | None = None) -> Tensor:
        """tau (N,) float64 >= 0 -> exp(tau R) (N, S, S), every entry to about ten digits, however small it is.

        The spectrum's errors are of 1e-15, and q(x_t | x_0) is 1e-48 for states far apart and times
        near the data: a posterior divides by it. So as long as there are such entries the exponential is taken by
        sums and products of numbers >= 0 alone (a series in the jumps' chain, then squarings), in which no digit is
        lost; later it is the spectrum's. Entries below 1e-150 count as that, but for tau = 0.

        longest: no tau is more. None to look, which on another device than the CPU stops the host.
        """
        if tau.numel() == 0:
            return self.rate.new_empty(0, *self.rate.shape)
        longest = tau.amax().item() if longest is None else longest
        tau = tau.to(self._device)
        q = self._by_squaring(tau.clamp(max=self._long), min(longest, self._long))
        if longest > self._long:
            q = torch.where((tau > self._long)[:, None, None], self._by_spectrum(tau), q)
        return torch.where((tau > 0)[:, None, None], q.clamp(min=FLOOR), q)

    def laws(self, tau: Tensor) -> Tensor:
        """exp(tau R) to draw from: by one matrix product, to 1e-14; what is less counts as 0."""
        q = self._by_spectrum(tau.to(self._device))
        return q.masked_fill(q < _ERROR, 0.0)

    def _by_spectrum(self, tau: Tensor) -> Tensor:
        w, left, right = self._spectrum
        return (left * torch.exp(tau[:, None] * w)[:, None, :]) @ right

    def _by_squaring(self, tau: Tensor, longest: float) -> Tensor:
        """exp(h R)^(2^n) with 2^n h = tau. The series for exp(h R) takes 15 jumps of the 2^n h together: with h not
        more than half a jump's time, 0.5^16 / 16! = 7e-19 is left out; and all states are within reach."""
        for_time = math.ceil(math.log2(max(2 * self._fastest * longest, 1)))
        squarings = max(for_time, math.ceil(math.log2(len(self.rate) / (_DEGREE - 1))), 0)
        h = tau * (self._fastest / 2**squarings)
        steps = torch.arange(_DEGREE, dtype=torch.float64, device=h.device)
        terms = torch.exp(torch.special.xlogy(steps, h[:, None]) - torch.lgamma(steps + 1) - h[:, None])
        blocks = torch.einsum("nbk,kij->bnij", terms.view(-1, _DEGREE // 4, 4), self._powers[:4])
        q = blocks[-1]
        for block in reversed(blocks[:-1].unbind()):
            q = q @ self._powers[4] + block
        for _ in range(squarings):
            q = q @ q
        return q

    def _first_long(self, smallest_at_rest: float) -> float:
        """A time from which on all entries exceed _SMALLEST; infinite where those of pi do not."""
        if smallest_at_rest <= 2 * _SMALLEST:
            return math.inf
        tau = 1 / self._fastest
        while self._by_spectrum(torch.tensor([tau], dtype=torch.float64, device=self._device)).amin() < _SMALLEST:
            tau *= 2
        return tau


@lru_cache(maxsize=16)
def target_rate(num_states: int, rate_sigma: float, q_sigma: float, device: torch.device) -> TargetRate:
    """R for these constants, made once for each device."""
    with torch.inference_mode(False):
        return TargetRate(*_generator(num_states, rate_sigma, q_sigma), device)


@lru_cache(maxsize=16)
def transition(num_states: int, rate_sigma: float, q_sigma: float, device: torch.device, tau: float) -> Tensor:
    """exp(tau R) (1, S, S), kept: a sampler asks for the same few batch after batch. Not to be written to."""
    rate = target_rate(num_states, rate_sigma, q_sigma, device)
    with torch.inference_mode(False):
        return rate.exponential(torch.full((1,), tau, dtype=torch.float64, device=device), tau)


def _generator(num_states: int, rate_sigma: float, q_sigma: float) -> tuple[Tensor, Tensor]:
    """R (S, S) and pi (S,), float64."""
    state = torch.arange(num_states, dtype=torch.float64)
    log_pi = -((state + 1 - num_states // 2) ** 2) / (2 * q_sigma**2)
    row, column = state[:, None], state[None, :]
    jump = torch.exp(-(((row - column).abs() - 1) ** 2) / rate_sigma**2)
    inwards = torch.where(row + column < num_states, row < column, row > column)
    rate = torch.where(inwards, jump, jump * torch.exp(log_pi[None, :] - log_pi[:, None]))
    rate.fill_diagonal_(0)
    rate -= rate.sum(1).diag()
    return rate, log_pi.softmax(0)
