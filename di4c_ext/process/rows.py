"""Rows of logits, in whatever form they come, as the probabilities that a step mixes."""

import math

import torch
from torch import Tensor

from di4c_ext.ops import Logistic, Logits


def whole(logits: Logits) -> Tensor:
    """The logits (B, D, S) themselves."""
    return logits if isinstance(logits, Tensor) else logits.logits()


def wide(logits: Logits) -> Tensor:
    """The same in float32, or float64 where they are."""
    made = whole(logits)
    return made if made.dtype == torch.float64 else made.float()


def some(logits: Logits, piece: slice) -> Logits:
    """The logits (B, D, S) of some positions."""
    if isinstance(logits, Tensor):
        return logits[:, piece]
    if isinstance(logits, Logistic):
        return logits._replace(mean=logits.mean[:, piece], log_scale=logits.log_scale[:, piece])
    return logits.mapped(lambda x: x[:, piece])


def beyond(start: Tensor, end: Tensor, scale: float | Tensor) -> Tensor:
    """start + scale (end - start) of logits alike in shape, anew. A state that either rules out stays ruled out."""
    out = (end - start).mul_(scale).add_(start)
    return out.masked_fill_(torch.isneginf(start) | torch.isneginf(end), -math.inf)


def probabilities(logits: Logits, temperature: float) -> Tensor:
    """softmax(logits / temperature) (B, D, S) float64, one-hot where `sample_categorical` is certain: at temperature 0
    and in rows with a +inf, whose first largest class it takes. NaN for a row without a distribution."""
    if isinstance(logits, Logistic):
        logits = Logistic(logits.mean.double(), logits.log_scale.double(), logits.num_states)
    x = whole(logits).double()
    largest = x.amax(-1, keepdim=True)
    certain = torch.isposinf(largest) if temperature > 0 else largest > -math.inf
    first = torch.nn.functional.one_hot((x == largest).int().argmax(-1), x.shape[-1])
    return torch.where(certain, first, (x / (temperature or 1.0)).softmax(-1))
