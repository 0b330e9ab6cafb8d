"""The training step and the sampler of the published image-token system, beside the same written the published way.

D = 256 codes of S = 1025 states (mask included, as published), L latents and as many targets. Where the network is a
stand-in, a head of H = 8 and nothing before it, noise, teacher's steps, draws, losses and the gradient of the logits
are all there is: time and memory beyond the network's own. Promised at B = 2, L = 32: 400 MB at most. For time with a
network there is the published one with 2 of its 24 layers and fewer latents; attention drops nothing there, because on
a CPU torch makes the probabilities where it does. `tokens_step.py` measures single steps, each in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import published_tokens as published
import pytest
import torch
from measuring import shape_name
from torch import Tensor, nn

from di4c_ext import random
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import TokenConfig, TokenDenoiser
from di4c_ext.models.latent import draw_latents
from di4c_ext.process import ConfidenceProcess
from di4c_ext.sampler import sample_confidence

LENGTH, STATES = 256, 1025
MASK = STATES - 1
CLASSES = 1000
FULL = (2, 32)  # B, L
WITH_NETWORK = (1, 4)
LAYERS = 2
ALONE, DRAWN = 16, 2  # images sampled together, from a constant and by a network
GUIDANCE = 3.0
GROWTH_LIMIT = 400e6
FASTER = {"step": 5, "sampling": 5}
WAYS = ["di4c", "torch, published"]


class StandIn(nn.Module):
    """A head of H = 8 alone: denoiser(x_t, t, latents=None, **told) -> logits, of what it sees, where, and the latent.

    x_t (B, D) or (B, L, D), latents (B, C) or (B, L, C), logits (B, D, S) or (B, L, D, S).
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        codes, places, pull, weight = (
            nn.Parameter(torch.randn(n, 8, generator=generator)) for n in (STATES, LENGTH, 1, STATES)
        )
        self.codes, self.places, self.pull, self.weight = codes, places, pull, weight

    def forward(self, x_t: Tensor, t: Tensor | None = None, latents: Tensor | None = None, **told: Tensor) -> Tensor:
        e = nn.functional.embedding(x_t, self.codes) + self.places
        if latents is not None:
            e = e[:, None] if latents.dim() > x_t.dim() else e
            e = e + (latents @ self.pull)[..., None, :]
        return nn.functional.linear(e, self.weight)


class Setting(NamedTuple):
    """Networks, data, and the published way to call a network, in training or not."""

    student: nn.Module
    teacher: nn.Module
    x_0: Tensor
    labels: Tensor
    num_latents: int
    called: Callable[[Any, bool], published.Denoise]


def _images(batch: int, num_latents: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(2)
    x_0, labels = (
        torch.randint(n, size, generator=generator) for n, size in ((MASK, (batch, LENGTH)), (CLASSES, (batch,)))
    )
    return x_0.to(device), labels.to(device), num_latents


@lru_cache(maxsize=1)
def standing_in(batch: int, num_latents: int, device: torch.device) -> Setting:
    """Without a network; the same every time."""
    student, teacher = (StandIn(seed).to(device) for seed in (0, 1))
    return Setting(
        student,
        teacher,
        *_images(batch, num_latents, device),
        lambda model, training: lambda x, labels, z=None: model(x, None, z),
    )


@lru_cache(maxsize=1)
def with_network(batch: int, num_latents: int, device: torch.device, **settings: Any) -> Setting:
    """With published networks of 2 layers, unless `settings` of `TokenConfig` say otherwise."""
    torch.manual_seed(0)
    dropped = 0.1 if device.type == "cuda" else 0.0
    config = TokenConfig(**{"num_layers": LAYERS, "attention_dropout": dropped} | settings)
    teacher = TokenDenoiser(config).eval().requires_grad_(False)
    student = TokenDenoiser.from_teacher(teacher).requires_grad_(True).train()
    return Setting(student.to(device), teacher.to(device), *_images(batch, num_latents, device), published.Network)


def latents(keys: Tensor, n: int) -> Tensor:
    return draw_latents(keys, n, 1, law="uniform", independent=True)


def ours(s: Setting, **settings: Any) -> Tensor:
    """The loss by the preset, of fresh draws of the samples' keys."""
    objective = Di4CObjective.preset("tokens", num_latents=s.num_latents, **settings)
    keys = random.keys(0, len(s.x_0), s.x_0.device)
    told = {"labels": s.labels}
    process = ConfidenceProcess(STATES, mask_id=MASK)
    return objective(s.student, s.teacher, process, s.x_0, keys, latents=latents, conditions=told)["loss"]


def published_way(s: Setting) -> Tensor:
    """The same loss of fresh draws of torch's own generator."""
    chances = published.Chances.drawn(len(s.x_0), s.num_latents, s.x_0.device)
    networks = s.called(s.student, True), s.called(s.student, False), s.called(s.teacher, False)
    return sum(published.terms(*networks, s.x_0, s.labels, chances, MASK)).mean()


LOSSES: dict[str, Callable[[Setting], Tensor]] = {"di4c": ours, "torch, published": published_way}


def _measure_step(meter: Any, by: str, s: Setting, what: str, **promised: Any) -> None:
    """Loss and gradient of a step of `s`; what is promised, our row promises."""
    parameters = list(s.student.parameters())
    batch = len(s.x_0)
    meter(
        f"token step, {what} {shape_name(batch, s.num_latents, LENGTH, STATES)} float32",
        by,
        lambda: torch.autograd.grad(LOSSES[by](s), parameters, allow_unused=True),
        may_fail=by != "di4c",
        graph=False,
        items=batch,
        **(promised if by == "di4c" else {}),
    )


@pytest.mark.parametrize("by", WAYS)
def test_tokens_step(meter, device, by):
    promised = {"at_least": {"torch, published": FASTER["step"]}, "growth_limit": GROWTH_LIMIT}
    _measure_step(meter, by, standing_in(*FULL, device), "no network", **promised)


@pytest.mark.parametrize("by", WAYS)
def test_tokens_step_with_network(meter, device, by):
    s = with_network(*WITH_NETWORK, device)
    _measure_step(meter, by, s, f"{LAYERS} layers", at_least={"torch, published": 1})


def our_samples(student: Callable[..., Tensor], labels: Tensor, num_steps: int) -> Tensor:
    """Codes (B, D) of the classes labels (B,), with guidance."""
    keys = random.keys(0, len(labels), labels.device)
    return sample_confidence(
        partial(student, labels=labels),
        ConfidenceProcess(STATES, mask_id=MASK),
        torch.full((len(labels), LENGTH), MASK, device=labels.device),
        num_steps,
        keys,
        latents=lambda key: latents(key, 1)[:, 0],
        unconditional=partial(student, drop_label=True),
        guidance=GUIDANCE,
    )


def published_samples(student: published.Denoise, labels: Tensor, num_steps: int) -> Tensor:
    return published.sample(student, labels, LENGTH, num_steps, mask_id=MASK, no_class=CLASSES, guidance=GUIDANCE)


@lru_cache(maxsize=1)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits (B, D, S) of a class, and of none."""
    both = torch.randn(2, ALONE, LENGTH, STATES, generator=torch.Generator().manual_seed(3)).mul_(2).to(device)
    return both[0], both[1]


def _measure_sampling(
    meter: Any, by: str, ways: dict[str, Callable[[], Tensor]], what: str, batch: int, faster: float
) -> None:
    """Codes of `batch` images by one of the ways; ours promises to be so many times faster."""
    meter(
        f"token sampling, {what} {shape_name(batch, LENGTH, STATES)} float32",
        by,
        ways[by],
        at_least={"torch, published": faster} if by == "di4c" else None,
        may_fail=by != "di4c",
        graph=False,
        items=batch,
    )


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("num_steps", [4, 8])
def test_sampler(meter, device, num_steps, by):
    conditional, without = _constants(device)
    labels = torch.arange(ALONE, device=device)
    both = torch.cat([conditional, without])

    def constant(x: Tensor, t: Tensor, latents: Any, labels: Any = None, drop_label: Any = None) -> Tensor:
        return without if drop_label else conditional

    ways: dict[str, Callable[[], Tensor]] = {
        "di4c": lambda: our_samples(constant, labels, num_steps),
        "torch, published": lambda: published_samples(lambda x, labels, z: both, labels, num_steps),
    }
    _measure_sampling(meter, by, ways, f"no network, {num_steps} steps", ALONE, FASTER["sampling"])


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("num_steps", [4, 8])
def test_sampling(meter, device, num_steps, by):
    s = with_network(*WITH_NETWORK, device)
    labels = torch.arange(DRAWN, device=device)
    ways: dict[str, Callable[[], Tensor]] = {
        "di4c": lambda: our_samples(s.student, labels, num_steps),
        "torch, published": lambda: published_samples(published.Network(s.student, False), labels, num_steps),
    }
    _measure_sampling(meter, by, ways, f"{LAYERS} layers, {num_steps} steps", DRAWN, 1)
