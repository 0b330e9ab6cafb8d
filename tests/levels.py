"""A process and denoisers over few levels, small enough to write every law of a pixel sampler down."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tiny import index, product_law, sequences
from torch import Tensor

from di4c_ext import random
from di4c_ext.ops import Logistic, sample_categorical


class Chain:
    """A Markov chain over S levels, each position alone: rate R beta(t) with beta(t) = 6 t."""

    def __init__(self, num_states: int) -> None:
        self.num_states = num_states
        distance = (torch.arange(num_states)[:, None] - torch.arange(num_states)).abs().double()
        rate = torch.exp(-distance) * torch.linspace(1, 0.5, num_states).double()
        self.rate = rate - torch.diag(rate.sum(1))
        self.calls: list[tuple[float, float]] = []

    def beta(self, t: float) -> float:
        return 6 * t

    def transition(self, t: float, s: float = 0.0) -> Tensor:
        return torch.linalg.matrix_exp(self.rate * 3 * (t**2 - s**2))

    def posterior(self, t: float, s: float) -> Tensor:
        """(x_t, x_0, x_s)."""
        joint = self.transition(s)[None] * self.transition(t, s).T[:, None]
        return joint / joint.sum(-1, keepdim=True)

    def prior(self, shape: tuple[int, int], keys: Tensor) -> Tensor:
        return (random.uniform(keys, shape[1]) * self.num_states).long()

    def step(self, x_t, logits, t, s, keys, *, temperature=1.0, stream=0):
        self.calls.append((t, s))
        keys = random.fold_in(keys, torch.arange(2)[:, None])
        x_0 = sample_categorical(logits, keys[0], temperature=temperature)
        x_s = sample_categorical(self.posterior(t, s)[x_t, x_0.clamp(min=0)].log(), keys[1])
        return torch.where(x_0 < 0, x_0, x_s)

    def step_marginal(self, x_t, logits, t, s, keys, *, temperature=1.0, stream=0):
        self.calls.append((t, s))
        p = (dense(logits).double() / temperature).softmax(-1)
        return sample_categorical((p[:, :, None] @ self.posterior(t, s)[x_t])[:, :, 0].log(), keys)


def dense(logits) -> Tensor:
    return logits if isinstance(logits, Tensor) else logits.logits()


class Table:
    """denoiser: a row of parameters for each of the S^D states, and with latents (B, 1) in 0..n-1 one for each of them.

    table (n, S^D, D, S) of logits, or (n, S^D, D, 2) of a Logistic's mean and log-scale.
    """

    def __init__(self, table: Tensor, num_states: int, logistic: bool = False) -> None:
        self.table, self.num_states, self.logistic = table, num_states, logistic
        self.calls: list[tuple[int, float]] = []
        self.seen: list[Tensor | None] = []

    def __call__(self, x_t: Tensor, t: Tensor, latents: Tensor | None = None) -> Tensor | Logistic:
        self.calls.append((len(x_t), t[0].item() if len(t) else 0.0))
        self.seen.append(latents)
        which = torch.zeros(len(x_t)).long() if latents is None else latents[:, 0].long()
        rows = self.table[which, index(x_t, self.num_states)]
        return Logistic(rows[..., 0], rows[..., 1], self.num_states) if self.logistic else rows


def table(components: int, num_states: int, length: int, seed: int, logistic: bool = False) -> Table:
    generator = torch.Generator().manual_seed(seed)
    size = num_states**length
    if logistic:
        rows = torch.randn(components, size, length, 2, generator=generator)
        return Table(torch.stack([rows[..., 0].tanh(), rows[..., 1]], -1), num_states, True)
    return Table(2 * torch.randn(components, size, length, num_states, generator=generator), num_states)


def step_law(process: Chain, logits: Tensor, t: float, s: float) -> Tensor:
    """(S^D, S^D) of one posterior step, from logits (S^D, D, S)."""
    states = sequences(process.num_states, logits.shape[1])
    given = process.posterior(t, s)[states]  # (S^D, D, x_0, x_s)
    return torch.stack([product_law(p) for p in (logits.double().softmax(-1)[:, :, None] @ given)[:, :, 0]])


def last_law(logits: Tensor, final: str = "argmax") -> Tensor:
    """(S^D, S^D) of the final denoising."""
    size, num_states = len(logits), logits.shape[-1]
    if final == "draw":
        return torch.stack([product_law(p) for p in logits.double().softmax(-1)])
    return torch.nn.functional.one_hot(index(logits.argmax(-1), num_states), size).double()


def enumerated(process: Chain, evaluations: list[Tensor], grid: list[float], final: str = "argmax") -> Tensor:
    """The law (S^D,) of sample_analytic from a uniform start; evaluations: a mixture of logits (n, S^D, D, S) each."""
    size = evaluations[0].shape[1]
    law = torch.full((size,), 1 / size, dtype=torch.float64)
    for i, mixture in enumerate(evaluations):
        if i + 1 < len(grid):
            laws = [step_law(process, logits, grid[i], grid[i + 1]) for logits in mixture]
        else:
            laws = [last_law(logits, final) for logits in mixture]
        law = law @ torch.stack(laws).mean(0)
    return law


def latents_of(components: int) -> Callable[[Tensor], Tensor]:
    """keys (B,) -> (B, 1), uniform over 0..components-1."""
    return lambda keys: (random.uniform(keys, 1) * components).floor().float()


def start(process: Chain, seed: int, n: int = 10_000, length: int = 2) -> tuple[Tensor, Tensor]:
    """x (n, length) at time 1, and the samples' keys."""
    keys = random.keys(seed, n)
    return process.prior((n, length), random.fold_in(keys, 1 << 20)), keys
