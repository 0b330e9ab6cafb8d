"""A whole training step but for the optimiser's: noise, teacher, targets, student, loss, gradient of the parameters.

At the digits' size with the networks of `make distill`, where the networks take their part, and at the size of the
published image tokens with a table in a network's place, where nothing but draws and losses is left. Ours fused (as it
comes), ours with the losses one by one, plain torch that shares what it can, and the published way: one race per
target in a loop, the teacher repeated, a chain for every term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import plain
import pytest
import torch
from cases import COMPILED, DIGITS
from measuring import shape_name
from torch import Tensor, nn

from di4c_ext import random
from di4c_ext.loss import Di4CObjective
from di4c_ext.models.latent import draw_latents
from di4c_ext.process import AbsorbingProcess

LATENT = 16
SETTINGS: dict[str, Any] = {"data": 1.0, "window": 0.3, "full_noise_share": 0.25, "step_max": 0.05}
WAYS = ["di4c", "di4c, unfused", "torch", "torch, published"]


@dataclass(frozen=True)
class Setting:
    """The two networks, the data, and how many latents and targets."""

    student: nn.Module
    teacher: Callable[..., Tensor]
    x_0: Tensor
    keys: Tensor
    objective: Di4CObjective
    process: AbsorbingProcess


class Table(nn.Module):
    """As much of a network as costs nothing: logits by the shape of what is asked for, those of the student learnt."""

    def __init__(self, teacher: Tensor, student: Tensor, target: Tensor) -> None:
        super().__init__()
        self.at_t = nn.Parameter(student)
        self.register_buffer("at_u", target)
        self.register_buffer("product", teacher)

    def forward(self, x: Tensor, t: Tensor, latents: Tensor | None = None) -> Tensor:
        if latents is None:
            return self.product
        return self.at_t if x.dim() == 2 else self.at_u


@lru_cache(maxsize=1)
def _digits(device: torch.device) -> Setting:
    from di4c_ext.models.compact import CompactConfig, CompactDenoiser

    torch.manual_seed(0)
    B, L, D, S = DIGITS
    sizes = {"num_states": S, "length": D, "hidden_size": 512, "num_blocks": 3}
    teacher = CompactDenoiser(CompactConfig(**sizes)).to(device).eval()
    student = CompactDenoiser(CompactConfig(**sizes, is_student=True, latent_dim=LATENT)).to(device)
    objective = Di4CObjective(num_latents=L, num_targets=8, **SETTINGS)
    return _setting(student, teacher, (B, D, S), objective, device)


@lru_cache(maxsize=1)
def _tokens(device: torch.device) -> Setting:
    B, L, D, S = COMPILED
    g = torch.Generator(device).manual_seed(0)
    logits = [torch.randn(sizes, generator=g, device=device) for sizes in ((B, D, S), COMPILED, COMPILED)]
    table = Table(*logits)
    return _setting(table, table, (B, D, S), Di4CObjective(num_latents=L, **SETTINGS), device)


def _setting(student, teacher, sizes, objective, device) -> Setting:
    B, D, S = sizes
    x_0 = torch.randint(0, S, (B, D), generator=torch.Generator().manual_seed(1)).to(device)
    return Setting(student, teacher, x_0, random.keys(0, B, device), objective, AbsorbingProcess(S))


def _latents(keys: Tensor, n: int) -> Tensor:
    return draw_latents(keys, n, LATENT)


def _times(s: Setting) -> tuple[Tensor, Tensor]:
    """One sample in four inside the window, where a product is distilled, the others spread over (0.3, 1]."""
    B = s.x_0.shape[0]
    t = torch.linspace(0.2, 1, B, dtype=torch.float64, device=s.x_0.device)
    return t, t - 0.05


def _ours(s: Setting, fused: bool) -> Tensor:
    objective = replace(s.objective, fused=fused)
    parts = objective(s.student, s.teacher, s.process, s.x_0, s.keys, latents=_latents, times=_times(s))
    return parts["loss"]


def _plain(s: Setting, published: bool) -> Tensor:
    """The same loss of fresh draws of torch's own generator; the linear schedule masks with probability t."""
    x_0, L, mask = s.x_0, s.objective.num_latents, s.process.mask_id
    K, (t, u) = s.objective.num_targets or L, (time.float() for time in _times(s))
    x_t = torch.where(torch.rand(x_0.shape, device=x_0.device) < t[:, None], mask, x_0)
    rate = ((t - u) / t)[:, None, None]
    with torch.no_grad():
        teacher = s.teacher(x_t, t)
        if published:
            x_u = torch.stack([plain.absorbing_step(teacher, x_t, rate, mask) for _ in range(K)], 1)
        else:
            many = teacher[:, None].expand(-1, K, -1, -1).flatten(1, 2)
            x_u = plain.absorbing_step(many, x_t.repeat(1, K), rate, mask).view(-1, K, x_t.shape[1])
        target = s.student(x_u, u, latents=torch.randn(len(x_0), K, LATENT, device=x_0.device))
        clean = nn.functional.one_hot(x_u.clamp(max=target.shape[-1] - 1), target.shape[-1]).log().to(target.dtype)
        target = torch.where((x_u == mask)[..., None], target, clean)
        samples = torch.stack([plain.race(one) for one in target.unbind(1)], 1) if published else plain.race(target)
    logits = s.student(x_t, t, latents=torch.randn(len(x_0), L, LATENT, device=x_0.device))
    form = plain.published_objective if published else plain.mixture_objective
    # A class that the target excludes is 0 log 0; torch's form of it wants a finite logarithm.
    target = target.clamp(min=-1e4)
    weight, inside = (x_t == mask).float(), t <= s.objective.window
    distillation, to_teacher, to_target, of_data, of_samples = form(
        logits, teacher, x_0, samples, target, weight, inside
    )
    data = s.objective.data_weight(t) * of_data
    return (distillation + to_teacher + to_target - data - of_samples.mean(1) * ~inside).mean()


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("network", ["compact network", "table"])
def test_step(meter, device, network, by):
    s = _digits(device) if network == "compact network" else _tokens(device)
    parameters = list(s.student.parameters())
    ways: dict[str, Callable[[], Tensor]] = {
        "di4c": lambda: _ours(s, True),
        "di4c, unfused": lambda: _ours(s, False),
        "torch": lambda: _plain(s, False),
        "torch, published": lambda: _plain(s, True),
    }
    sizes = DIGITS if network == "compact network" else COMPILED
    meter(
        f"training step, {network}, {shape_name(*sizes)} float32",
        by,
        lambda: torch.autograd.grad(ways[by](), parameters, allow_unused=True),
        may_fail=by.startswith("torch"),
        graph=False,
    )
