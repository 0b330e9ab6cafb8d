"""The checkpoint file of the published VQ autoencoder, as Lightning writes one.

A dict whose 'state_dict' holds the weights; beside them the perceptual network and the critic it was trained with
(`loss.*`), which are left out as the optimisers' states are. There is no moving average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from di4c_ext.models.checkpoint import load_exactly, state_of
from di4c_ext.models.vqgan import VQModel
from di4c_ext.models.vqgan_config import VQConfig

_LOSS = "loss."


class VQFile(NamedTuple):
    """What one file holds: the autoencoder's weights, the names of its loss's, and how far training had come."""

    weights: dict[str, Any]
    left_out: list[str]
    step: int | None


def is_vqgan_file(contents: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's dict looks like a VQ autoencoder's, of whatever size."""
    return "quantize.embedding.weight" in state_of(contents, "state_dict")


def vqgan_file(contents: Mapping[str, Any]) -> VQFile:
    """A checkpoint's dict taken apart; nothing is checked yet."""
    state = {str(name): value for name, value in state_of(contents, "state_dict").items()}
    step = contents.get("global_step")
    return VQFile(
        {name: value for name, value in state.items() if not name.startswith(_LOSS)},
        [name for name in state if name.startswith(_LOSS)],
        step if isinstance(step, int) else None,
    )


def load_vqgan(file: VQFile, config: VQConfig) -> VQModel:
    """The autoencoder in a file; raises ValueError naming every weight that is not as `config` wants it."""
    return load_exactly(lambda: VQModel(config), file.weights)
