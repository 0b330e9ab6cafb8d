"""The published files of masked diffusion language models: MDLM's, SDTT's and Di4C's.

    open_language("kuleshov-group/mdlm-owt")                                        the hub's model.safetensors
    open_language("jdeschena/sdtt", revision="baselines_kld_step_60000")            a revision of it
    open_language("sdtt6-di4c2.ckpt", is_student=True, weights="raw")               a Lightning checkpoint

All hold the same network under names that differ in what stands before them: `backbone.`, once or twice, and
`_orig_mod.` where it was compiled. Its size is told by the shapes; what shapes do not tell (the longest sequence, the
dropout, whether it sees the time) by the hub's config.json, by the caller, or it is as published. A Lightning
checkpoint has its moving average beside the weights, as a list without names in the order of the parameters. The
published results are those of the live weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_ext.models.base import role
from di4c_ext.models.checkpoint import check_state, named_average, number, read_checkpoint, state_of
from di4c_ext.models.dit import DiTDenoiser
from di4c_ext.models.dit_blocks import Rotary
from di4c_ext.models.dit_config import DiTConfig
from di4c_ext.models.unet_checkpoint import Weights
from di4c_ext.names import check_names

_BUFFER = "rotary_emb.inv_freq"  # in the state, but no parameter and so not in the average
_EMBEDDING = "vocab_embed.embedding"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_BEFORE = re.compile(r"(?:^|(?<=\.))(?:backbone|_orig_mod)\.")
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_TOLD_BY_HUB = {"model_length": "length", "dropout": "dropout", "time_conditioning": "time_conditioning"}
TOLD_BY_SHAPES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "cond_dim", "mlp_ratio", "is_student"),
    *("latent_form", "latent_dim", "latent_embed_dim", "latent_hidden_size"),
)


class LanguageFile(NamedTuple):
    """What one file holds: live weights by their bare names, their average in the same order, and how far it was."""

    raw: dict[str, Any]
    average: Any
    decay: float | None
    updates: int | None
    step: int | None

    @property
    def is_student(self) -> bool:
        return any(DiTDenoiser.is_latent_name(name) for name in self.raw)

    def config(self, **settings: Any) -> DiTConfig:
        """The size of the network by the shapes of its weights; `settings` as in `DiTConfig` for all else.

        Raises ValueError for weights that tell no size, and for settings that are not open.
        """
        check_names("settings of the network", settings, DiTConfig.__init__, TOLD_BY_SHAPES)
        vocab_size, hidden_size = self._shape(_EMBEDDING, 2)
        pairs = self._shape(_BUFFER, 1)[0]
        if not pairs or hidden_size % (2 * pairs):
            raise ValueError(f"{_BUFFER} has {pairs} numbers, which is no half of a head of width {hidden_size}")
        blocks = {int(name.split(".")[1]) for name in self.raw if re.match(r"blocks\.\d+\.", name)}
        told: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_layers": max(blocks, default=0) + 1,
            "num_heads": hidden_size // (2 * pairs),
            "cond_dim": self._shape("sigma_map.mlp.0.weight", 2)[0],
            "mlp_ratio": self._shape("blocks.0.mlp.0.weight", 2)[0] // hidden_size,
            "is_student": self.is_student,
        }
        if self.is_student:
            inner, shown = self._shape("latent_projection.0.weight", 2)
            told |= {"latent_hidden_size": inner, "latent_embed_dim": shown}
        return DiTConfig(**told, **settings)

    def _shape(self, name: str, dims: int) -> tuple[int, ...]:
        value = self.raw.get(name)
        if not isinstance(value, Tensor) or value.ndim != dims:
            raise ValueError(f"the weights are not the model's: {name} is missing or no tensor of {dims} dimensions")
        return tuple(value.shape)


def is_language_file(contents: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's dict looks like one of these, of whatever size."""
    return any(_BEFORE.sub("", str(name)) == _EMBEDDING for name in state_of(contents, "state_dict"))


def language_file(contents: Mapping[str, Any]) -> LanguageFile:
    """A checkpoint's dict taken apart; nothing is checked yet but that no name comes twice."""
    raw: dict[str, Any] = {}
    for key, value in state_of(contents, "state_dict").items():
        name = _BEFORE.sub("", str(key))
        if name in raw:
            raise ValueError(f"two tensors are called {name} but for what stands before it; keep one of them")
        raw[name] = value
    ema = contents.get("ema")
    average = ema if isinstance(ema, Mapping) else {}
    return LanguageFile(
        raw,
        average.get("shadow_params"),
        number(float, average.get("decay")),
        number(int, average.get("num_updates")),
        number(int, contents.get("global_step")),
    )


def load_language(file: LanguageFile, config: DiTConfig, weights: Weights, is_student: bool | None) -> DiTDenoiser:
    """The denoiser in a file; raises ValueError naming every weight that is not as `config` wants it.

    is_student: what is expected, None for either.
    """
    if is_student is not None and is_student != file.is_student:
        held, wanted = role(file.is_student), role(is_student)
        latent = [name for name in file.raw if DiTDenoiser.is_latent_name(name)]
        raise ValueError(
            f"holds a {held}, a {wanted} is wanted: "
            + (
                f"{latent[0]} and {len(latent) - 1} more are weights no teacher has; without them it would be another "
                "network than was trained"
                if latent
                else "it has no weights for a latent. Open it as a teacher and make a student of that with "
                "DiTDenoiser.from_teacher"
            )
        )
    with torch.device("meta"):
        wanted_state = DiTDenoiser(config).backbone.state_dict()
    check_state("live weights", wanted_state, file.raw)
    _check_frequencies(file.raw[_BUFFER], config)
    state = file.raw
    if file.average is not None:
        names = [name for name in file.raw if name != _BUFFER]
        average = named_average("shadow_params", file.average, names) | {_BUFFER: file.raw[_BUFFER]}
        check_state("moving average", wanted_state, average)
        state = average if weights == "ema" else state
    elif weights == "ema":
        raise ValueError("holds no moving average (ema); take the live weights, raw")
    model = DiTDenoiser(config)
    model.backbone.load_state_dict(state)
    return model.eval()


def open_language(
    source: str | Path,
    *,
    revision: str | None = None,
    weights: Weights = "raw",
    is_student: bool | None = None,
    **settings: Any,
) -> DiTDenoiser:
    """A published teacher or student, in evaluation mode, on the CPU; nothing in its file is executed.

    Args:
        source: a file, a folder that holds one, or a repository of the hub ('jdeschena/sdtt'), of which revision is
            taken.
        weights: 'raw' or 'ema', the live weights or their moving average, which files of the hub do not have.
        is_student: what is expected, None for either: weights of a latent are never dropped.
        settings: of `DiTConfig`, what shapes do not tell: length, dropout, mask_id, schedule, time_conditioning and the
            latent's law and scale.

    Raises:
        ValueError: naming the source and every weight that is missing, unknown or of another shape.
    """
    path = find_published(source, revision)
    try:
        file = language_file(read_checkpoint(path))
        config = file.config(**told_beside(path) | settings)
        return load_language(file, config, weights, is_student)
    except ValueError as error:
        told = str(error)
        raise error if told.startswith(str(path)) else ValueError(f"{source}: {told}") from error


def find_published(source: str | Path, revision: str | None = None) -> Path:
    """The file meant by a file, a folder or, where neither is there, a repository of the hub, which is fetched."""
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _FILES)
        if len(found) != 1:
            held = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"{path}: one file of weights is wanted, it has {held}; name the file")
        return found[0]
    if path.exists() or path.suffix in _FILES or not _HUB.fullmatch(str(source)):
        if revision is not None:
            raise ValueError(f"{source}: revision {revision!r} goes with a repository of the hub, not with a file")
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        weights = Path(hf_hub_download(str(source), _WEIGHTS, revision=revision))
        with suppress(EntryNotFoundError):  # the network is then as published where shapes do not tell
            hf_hub_download(str(source), _CONFIG, revision=revision)
        return weights
    except Exception as error:  # no network, no repository, no revision: each has a class of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source}: no such file, and {_WEIGHTS} of a repository of that name could not be fetched: {first}"
        ) from error


def told_beside(file: Path) -> dict[str, Any]:
    """Settings that the config.json of a repository of the hub tells beside its weights, none where there is none."""
    beside = file.with_name(_CONFIG)
    if file.name != _WEIGHTS or not beside.is_file():
        return {}
    try:
        held = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside}: no JSON ({error}); copy it again, or remove it") from error
    if not isinstance(held, dict):
        raise ValueError(f"{beside}: holds a {type(held).__name__}, settings by name are wanted")
    if held.get("model_type") == DiTConfig.model_type:
        raise ValueError(f"{file.parent}: is a converted model; open it with DiTDenoiser.from_pretrained")
    return {ours: held[theirs] for theirs, ours in _TOLD_BY_HUB.items() if theirs in held}


def _check_frequencies(held: Tensor, config: DiTConfig) -> None:
    """The rotations a file was trained with are those that the network makes."""
    wanted = Rotary(config.hidden_size // config.num_heads).frequencies(torch.device("cpu"))
    error = ((held.double() - wanted) / wanted).abs().max().item()
    if not error <= 16 * torch.finfo(held.dtype).eps:
        raise ValueError(f"{_BUFFER} are not the frequencies 10000^(-2j / head_dim): {error:.1e} from them, relatively")
