"""The checkpoint files of the published image-token system: the MaskGIT teacher and the Di4C student.

Both are a dict {'iter', 'global_epoch', 'model_state_dict', 'optimizer_state_dict'}; the weights have no prefix, or
`module.` where DDP's module was saved, and there is no moving average. The optimiser's state is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from di4c_ext.models.checkpoint import load_exactly, state_of
from di4c_ext.models.token_config import TokenConfig
from di4c_ext.models.token_transformer import TokenDenoiser

_OPENS = "model_state_dict"


class TokenFile(NamedTuple):
    """What one file holds: weights by the denoiser's names, and how far training had come."""

    weights: dict[str, Any]
    iteration: int | None
    epoch: int | None

    @property
    def is_student(self) -> bool:
        return any(TokenDenoiser.is_latent_name(name) for name in self.weights)


def is_token_file(contents: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's dict looks like the image-token system's, of whatever size."""
    names = {str(name).removeprefix("module.") for name in state_of(contents, _OPENS)}
    return {"tok_emb.weight", "pos_emb"} <= names


def token_file(contents: Mapping[str, Any]) -> TokenFile:
    """A checkpoint's dict taken apart; nothing is checked yet but that no name comes twice."""
    weights: dict[str, Any] = {}
    for key, value in state_of(contents, _OPENS).items():
        name = "net." + str(key).removeprefix("module.")
        if name in weights:
            raise ValueError(f"two tensors are called {name.removeprefix('net.')}, once with DDP's prefix; keep one")
        weights[name] = value
    iteration, epoch = (contents.get(name) for name in ("iter", "global_epoch"))
    return TokenFile(
        weights, iteration if isinstance(iteration, int) else None, epoch if isinstance(epoch, int) else None
    )


def grid_of(file: TokenFile) -> int:
    """The side of the square grid that the file's positions make, 16 or 32 as published; ValueError for no square."""
    positions = file.weights.get("net.pos_emb")
    if not isinstance(positions, Tensor) or positions.ndim != 3:
        raise ValueError("pos_emb is no tensor (1, D + 1, H), the positions of a grid and the class")
    length = positions.shape[1] - 1
    side = math.isqrt(max(length, 0))
    if side < 1 or side * side != length:
        raise ValueError(
            f"pos_emb {tuple(positions.shape)} has {length} positions beside the class, which make no square grid; "
            "name it, --model_config '{\"grid\": [height, width]}'"
        )
    return side


def load_tokens(file: TokenFile, config: TokenConfig) -> TokenDenoiser:
    """The denoiser in a file; raises ValueError naming every weight that is not as `config` wants it."""
    if file.is_student and not config.is_student:
        extra = [name for name in file.weights if TokenDenoiser.is_latent_name(name)]
        raise ValueError(
            f"holds a student, a teacher is wanted: {extra[0].removeprefix('net.')} and {len(extra) - 1} more are "
            "weights no teacher has"
        )
    if config.is_student and not file.is_student:
        raise ValueError(
            "holds a teacher, a student is wanted: it has no weights for a latent. Convert it as a teacher and make a "
            "student of that with TokenDenoiser.from_teacher"
        )
    return load_exactly(lambda: TokenDenoiser(config), file.weights)
