"""The checkpoint files of the published pixel system: the teacher of tauLDR and the student of Di4C.

A file is a dict {'model': state, 'optimizer': ..., 'n_iter': ...}. The state holds the live weights by name (with
`net.module.` in place of `net.` where it was written by DDP) and, after them, 'ema_decay', 'ema_num_updates' and
'ema_shadow_params': the moving average as a list without names, in the order of the parameters, which is that of the
state. The published teacher is evaluated with the average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from di4c_ext.models.checkpoint import REMEDY, check_state, named_average, number, state_of
from di4c_ext.models.unet import UNetDenoiser
from di4c_ext.models.unet_config import UNetConfig

Weights = Literal["ema", "raw"]
_AVERAGE = ("ema_decay", "ema_num_updates", "ema_shadow_params")


class PixelFile(NamedTuple):
    """What one file holds: live weights by name, their average in the same order, and how far training had come."""

    raw: dict[str, Any]
    average: Any
    decay: float | None
    updates: int | None
    iteration: int | None

    @property
    def is_student(self) -> bool:
        return any(UNetDenoiser.is_latent_name(name) for name in self.raw)


def is_pixel_file(contents: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's dict looks like the pixel system's, of whatever size."""
    return any(
        str(name).startswith("net.") and "downsampling_modules." in str(name) for name in state_of(contents, "model")
    )


def pixel_file(contents: Mapping[str, Any]) -> PixelFile:
    """A checkpoint's dict taken apart; nothing is checked yet but that no name comes twice."""
    state = state_of(contents, "model")
    raw: dict[str, Any] = {}
    for key, value in state.items():
        name = str(key)
        name = "net." + name.removeprefix("net.module.") if name.startswith("net.module.") else name
        if name in raw:
            raise ValueError(f"two tensors are called {name}, once with DDP's prefix; keep one of them")
        if name not in _AVERAGE:
            raw[name] = value
    return PixelFile(
        raw,
        state.get("ema_shadow_params"),
        number(float, state.get("ema_decay")),
        number(int, state.get("ema_num_updates")),
        number(int, contents.get("n_iter")),
    )


def load_pixels(file: PixelFile, config: UNetConfig, weights: Weights) -> UNetDenoiser:
    """The denoiser in a file; raises ValueError naming every weight that is not as `config` wants it."""
    if file.is_student and not config.is_student:
        extra = [name for name in file.raw if UNetDenoiser.is_latent_name(name)]
        raise ValueError(
            f"holds a student, a teacher is wanted: {extra[0]} and {len(extra) - 1} more are weights no teacher has"
        )
    if config.is_student and not file.is_student:
        raise ValueError(
            "holds a teacher, a student is wanted: it has no weights for a latent. Convert it as a teacher and make a "
            "student of that with UNetDenoiser.from_teacher"
        )
    with torch.device("meta"):
        wanted = UNetDenoiser(config).state_dict()
    check_state("live weights", wanted, file.raw, REMEDY)
    if file.average is not None:
        average = named_average("ema_shadow_params", file.average, list(file.raw))
        check_state("moving average", wanted, average, REMEDY)
    elif weights == "ema":
        raise ValueError("holds no moving average (ema_shadow_params); take the live weights, --weights raw")
    model = UNetDenoiser(config)
    model.load_state_dict(average if weights == "ema" else file.raw)
    return model.eval()
