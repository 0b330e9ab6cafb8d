"""Models of a problem so small that every sequence can be written down, and a judge whose figures are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from di4c_ext.metrics.bootstrap import bootstrap_figures
from di4c_ext.models import CompactConfig, CompactDenoiser

STATES, LENGTH = 3, 4


def toy(is_student: bool = False, scale: float = 0.5, **settings: Any) -> CompactDenoiser:
    """A compact network of 2 x 2 pixels, weights of normal law and a seed of their own."""
    config = {"num_states": STATES, "length": LENGTH, "hidden_size": 8, "num_blocks": 1, "image_shape": [2, 2]}
    if is_student:
        config |= {"is_student": True, "latent_dim": 4, "latent_hidden_size": 8}
    model = CompactDenoiser(CompactConfig(**config | settings)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, scale, generator=generator)
    return model


def pair() -> dict[str, Any]:
    return {"teacher": toy(), "student": toy(is_student=True)}


class CountingJudge:
    """Measures "zeros", the share of state 0, and "entropy", the share of different samples; of models a "nelbo"."""

    def __init__(self) -> None:
        self.floors = {"zeros": 0.3, "entropy": 1.0}
        self.sizes = {"train": 9, "heldout": 3}
        self.bounded: list[int] = []

    def measure(self, samples: Tensor, num_bootstraps: int = 0, seed: int = 0) -> dict[str, float]:
        def figures(chosen: Tensor) -> dict[str, float]:
            some = samples[chosen]
            return {
                "zeros": float((some == 0).float().mean()),
                "entropy": len(set(map(tuple, some.tolist()))) / len(some),
            }

        every = torch.arange(len(samples))
        ends = bootstrap_figures(figures, len(samples), num_bootstraps, seed) if num_bootstraps else {}
        return figures(every) | ends

    def of_model(self, model: Any, num_steps: int, num_bootstraps: int = 0, seed: int = 0) -> dict[str, float]:
        self.bounded.append(num_steps)
        return {"nelbo": 2.0 + model.config.is_student + 1 / num_steps}
