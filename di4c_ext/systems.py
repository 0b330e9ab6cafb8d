"""What the commands need to know of a model, told by its config: its process, its latents, and how it is opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from di4c_ext import checkpoints
from di4c_ext.data import Layout
from di4c_ext.denoiser import Latents
from di4c_ext.models import (
    CompactDenoiser,
    Di4CForMaskedLM,
    DiTDenoiser,
    TokenDenoiser,
    UNetDenoiser,
    draw_latents,
)
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.names import nearest
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess, Process, process_from

MODELS: dict[str, type[MixtureDenoiser]] = {  # by config.model_type
    "di4c_compact": CompactDenoiser,
    "di4c_unet": UNetDenoiser,
    "di4c_dit": DiTDenoiser,
    "di4c_tokens": TokenDenoiser,
    "di4c_masked_lm": Di4CForMaskedLM,
}


def process_of(config: Any, constants: Mapping[str, Any] | None = None) -> Process:
    """The process that a model of this config was trained for.

    constants: of the steps of a teacher of image tokens (`ConfidenceProcess`), which its network does not hang on.
    """
    if config.model_type == "di4c_tokens":
        return ConfidenceProcess(config.num_states, config.schedule, config.mask_id, **(constants or {}))
    if constants:
        raise ValueError(f"process_of: a {config.model_type} has its process's constants itself, got {constants}")
    if config.model_type == "di4c_unet":
        return process_from(config.process, config.num_states)
    return AbsorbingProcess(config.num_states, config.schedule, config.mask_id)


def latents_of(config: Any) -> Latents | None:
    """latents(keys (B,), L) -> (B, L, C) of a student; None for a teacher, which takes none."""
    if not config.is_student:
        return None
    return partial(draw_latents, latent_dim=config.latent_dim, law=getattr(config, "latent_law", "normal"))


def modality_of(config: Any) -> str:
    """ "text" or "image": what a network of this config makes."""
    return "text" if config.model_type in ("di4c_dit", "di4c_masked_lm") else "image"


def layout_of(config: Any) -> Layout:
    """The order of the D positions of a colour image, as the network has it."""
    return "CHW" if config.model_type == "di4c_unet" else "HWC"


def num_classes_of(config: Any) -> int:
    """How many classes the network is told of as `labels`; 0: none, it takes no labels."""
    return config.num_classes if config.model_type == "di4c_tokens" else 0


def image_shape_of(config: Any) -> tuple[int, ...]:
    """(height, width) of the network's images, or (height, width, channels) of colour ones."""
    if config.model_type == "di4c_unet":
        channels, height, width = config.shape
        return (height, width) if channels == 1 else (height, width, channels)
    return tuple(getattr(config, "image_shape", None) or (1, config.length))


def load_model(folder: str | Path, is_student: bool | None = None, trust_remote_code: bool = False) -> MixtureDenoiser:
    """A saved teacher or student of any system, in evaluation mode, on the CPU.

    is_student: what is expected, None for either. trust_remote_code: consent to run the code that a masked language
    model brings along. Raises ValueError naming the folder and what is wrong with it: a file that is missing or
    damaged, a network unknown here, the other of teacher and student, weights that do not fit, code that nobody
    agreed to.
    """
    folder = Path(folder)
    checkpoints.check_model(folder)
    held = json.loads((folder / checkpoints.CONFIG).read_text(encoding="utf-8"))
    kind = held.get("model_type") if isinstance(held, dict) else None
    if kind not in MODELS:
        raise ValueError(
            f"{folder}: {checkpoints.CONFIG} names the network {kind!r}{nearest(str(kind), MODELS)}; "
            f"known are {', '.join(MODELS)}"
        )
    consent = {"trust_remote_code": True} if trust_remote_code and kind == "di4c_masked_lm" else {}
    try:
        model: MixtureDenoiser = MODELS[kind].from_pretrained(folder, is_student=is_student, **consent)
    except ValueError as error:
        told = str(error)
        raise error if str(folder) in told else ValueError(f"{folder}: {told}") from error
    return model.eval()
