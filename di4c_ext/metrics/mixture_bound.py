"""A bound on the likelihood of what a few ancestral steps make, for teachers and mixture students of masked diffusion.

The sampler of k steps has the law p_k(x_0) = E over paths; with x_t ~ q(x_t | x_0), one path of coins, and R_i the
positions that the step from t_i to t_{i+1} unmasks,

    -log p_k(x_0) <= E [ -sum_i log E_lambda prod_{d in R_i} p^d(x_0^d | x_{t_i}; lambda) ]

for the coins of q, begun from all masks, are those of the sampler, and cancel. A teacher, whose product has no lambda,
pays here for all that the positions of one step owe to each other; a mixture pays less. The mean over lambda is
estimated by importance sampling with L latents drawn from their law: -log of an estimate is at least, in the mean, -log
of what it estimates (Jensen), so the value stays a bound and falls towards the above as L grows. A student whose latent
is a chain (`models.chain`) tells that mean exactly, and the value is the above itself. At k = 1 the first bound is an
equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.denoiser import Denoiser, Latents, inference
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import times
from di4c_ext.systems import latents_of

_COINS, _LATENTS, _CHOICES = range(3)  # sub-keys of a draw


@dataclass(frozen=True)
class FewSteps:
    """What is bounded, and how well.

    num_steps: k, evaluations of the sampler. latents: keys (B,), L -> (B, L, C) of a student, None for a teacher.
    num_latents: L. num_terms: of the k terms of the sum so many are made, one of each run of neighbours, which stands
    for its run: the mean is that of the whole sum. None: all of them. log_prob: (x_t, t, x_s) -> (B,), the logarithm of
    the mixture's probability of all that x_s knows and x_t does not, of a student that can tell it exactly, which then
    needs no latents.
    """

    num_steps: int
    latents: Latents | None = None
    num_latents: int = 64
    num_terms: int | None = None
    log_prob: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_latents", "num_terms"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"FewSteps: {name} must be at least 1, got {value}")

    @classmethod
    def of(
        cls, model: MixtureDenoiser, num_steps: int, num_latents: int = 64, num_terms: int | None = None
    ) -> FewSteps:
        """Those of a teacher or student: with drawn latents, or exactly where the student can tell."""
        if not getattr(model.config, "has_chain", False):
            return cls(num_steps, latents_of(model.config), num_latents, num_terms)
        return cls(num_steps, num_terms=num_terms, log_prob=lambda x_t, t, x_s: model(x_t, t, x_s=x_s))

    def chosen(self, keys: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The numbers of the steps whose terms are made, (B,) int64 each, and for how many steps each stands."""
        count = min(self.num_terms or self.num_steps, self.num_steps)
        draws = random.uniform(random.fold_in(keys, _CHOICES), count)
        for j in range(count):
            first, past = j * self.num_steps // count, (j + 1) * self.num_steps // count
            yield first + (draws[:, j] * (past - first)).long(), past - first


def few_step_bound(denoiser: Denoiser, process: AbsorbingProcess, x_0: Tensor, keys: Tensor, steps: FewSteps) -> Tensor:
    """One-draw estimate (B,) float64 of the bound of x_0 (B, D) in nats a sample; its mean over keys is the bound."""
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    grid = times(steps.num_steps).to(x_0.device)
    # Against equal coins what is masked at s is masked at t; at 1 all is, as where the sampler begins.
    coins = random.uniform(random.fold_in(keys, _COINS), x_0.shape[1]) * process.mask_prob(1.0).to(x_0.device)
    for i, count in steps.chosen(keys):
        t = grid[i]
        masked, later = (coins < process.mask_prob(time)[:, None] for time in (t, grid[i + 1]))
        revealed = (masked & ~later).float()
        if not bool(revealed.any()):
            continue
        x_t = torch.where(masked, process.mask_id, x_0)
        if steps.log_prob is not None:
            x_s = torch.where(later, process.mask_id, x_0)
            total -= count * steps.log_prob(x_t, t.float(), x_s).double()
            continue
        if steps.latents is None:
            made = denoiser(x_t, t.float())
            logits = made.mapped(lambda x: x[:, None]) if isinstance(made, ops.Hidden) else made[:, None]
        else:
            drawn = random.fold_in(random.fold_in(keys, _LATENTS), i)
            logits = denoiser(x_t, t.float(), latents=steps.latents(drawn, steps.num_latents))
        joint, _ = ops.mixture_log_prob(logits, x_0[:, None], revealed)
        total -= count * joint[:, 0].double()
    return total


def few_step_bounds(
    denoiser: Denoiser,
    process: AbsorbingProcess,
    x_0: Tensor,
    keys: Tensor,
    steps: FewSteps,
    *,
    draws: int = 1,
    batch_size: int = 16,
) -> Tensor:
    """(N,) float64: the mean of `few_step_bound` over `draws` draws, for each of x_0 (N, D), in evaluation mode.

    Raises ValueError for no samples, or no draws.
    """
    if len(x_0) < 1 or draws < 1:
        raise ValueError(f"few_step_bounds: {len(x_0)} samples and {draws} draws; both must be at least 1")
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    with inference(denoiser, x_0.device):
        for draw in range(draws):
            for rows in torch.arange(len(x_0), device=x_0.device).split(batch_size):
                total[rows] += few_step_bound(denoiser, process, x_0[rows], random.fold_in(keys[rows], draw), steps)
    return total / draws
