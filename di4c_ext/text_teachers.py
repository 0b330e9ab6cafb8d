"""The teachers of text: new for a tokenizer and a length, or opened from whatever holds one.

A teacher that is named may be a folder that this package wrote; a published file, folder or repository of MDLM, SDTT or
Di4C, of which nothing is executed; or any masked language model of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from di4c_ext import checkpoints
from di4c_ext.arguments import as_dict
from di4c_ext.config import TIME_MIN, PretrainConfig
from di4c_ext.models import Di4CForMaskedLM, DiTConfig, DiTDenoiser, from_config
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.models.dit_checkpoint import open_language
from di4c_ext.models.teacher import TeacherDescription
from di4c_ext.names import check_names
from di4c_ext.systems import MODELS, load_model, modality_of
from di4c_ext.task import Encoder, Named
from di4c_ext.text_sources import Cutter

# Files of weights alone, with nothing beside them that transformers would open.
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Logits of so many classes are the memory of a step: such models give hidden states and their head instead.
MANY_STATES = 8192


def new_dit(cutter: Cutter, length: int, config: PretrainConfig, process: Mapping[str, Any]) -> DiTDenoiser:
    """An untrained diffusion transformer for sequences of `length` tokens of `cutter`, a function of the seed."""
    settings = as_dict("model_config", config.model_config)
    fixed = ("vocab_size", "mask_id", "length", "schedule", "is_student", "latent_form", "latent_dim", "latent_law")
    latent = ("latent_scale", "latent_embed_dim", "latent_hidden_size", "latent_gate", "latent_rotary")
    check_names("--model_config", settings, DiTConfig.__init__, (*fixed, *latent))
    check_plain(config)
    vocab_size = cutter.num_tokens + (cutter.mask_id is None)
    try:
        made = DiTConfig(
            vocab_size=vocab_size,
            mask_id=cutter.mask_id,
            length=length,
            schedule=process["schedule"],
            **{"hidden_logits": vocab_size >= MANY_STATES, **settings},
        )
    except TypeError as error:  # a setting of the wrong kind
        raise ValueError(f"--model_config {json.dumps(settings)}: {error}") from error
    set_seed(config.seed)
    return DiTDenoiser(made)


def new_masked_lm(encoder: Encoder, cutter: Cutter, schedule: str, consent: bool) -> Di4CForMaskedLM:
    """A masked language model of transformers, to be trained: as it is, with a new head where it lacks one, or new."""
    settings, tokenizer = encoder.settings, getattr(cutter, "tokenizer", None)
    check_names("--model_config", settings, TeacherDescription)
    set_seed(encoder.seed)
    made: Any = encoder.source
    if encoder.config is not None:
        told = (cutter.num_tokens, cutter.mask_id, tokenizer)
        made, own = from_config.new_model(encoder.source, encoder.config, *told, consent)
        settings = own | settings
    model = Di4CForMaskedLM.as_teacher(
        made, tokenizer=tokenizer, schedule=schedule, new_head=True, trust_remote_code=consent, **settings
    )
    return cast(Di4CForMaskedLM, lean(model))


def check_plain(config: PretrainConfig) -> None:
    """ValueError for settings of a training that only images have."""
    if config.augment_share:
        raise ValueError(f"--augment_share {config.augment_share:g}: alters images; leave it out")
    if config.time_min != TIME_MIN:
        raise ValueError(
            f"--time_min {config.time_min}: is for --process gaussian or uniform; the bound that masked diffusion "
            "trains by has no times, leave it out"
        )


def open_text_teacher(
    named: Named, *, tokenizer: Any = None, schedule: str = "linear", consent: bool = False
) -> MixtureDenoiser:
    """A teacher of text, in evaluation mode, on the CPU; ValueError naming what is wrong with it.

    tokenizer: of a masked language model that has none beside it. schedule: for one that was trained for none.
    """
    source, revision = named.source, named.revision
    wanted = None if named.second_round else False
    if revision is not None and Path(source).exists():
        raise ValueError(f"--teacher_revision {revision}: is of a repository of the hub, {source} is here; leave it")
    if _is_ours(source):
        model = load_model(source, is_student=wanted, trust_remote_code=consent)
        if modality_of(model.config) != "text":
            raise ValueError(f"teacher {source}: is a {type(model).__name__}, of images; give one of text")
        return lean(model)
    if _is_published(source, revision):
        return lean(open_language(source, revision=revision, is_student=wanted))
    return lean(
        Di4CForMaskedLM.as_teacher(
            source,
            tokenizer=tokenizer,
            schedule=schedule,
            trust_remote_code=consent,
            load=None if revision is None else {"revision": revision},
        )
    )


def lean(model: MixtureDenoiser) -> MixtureDenoiser:
    """The model, giving hidden states in place of logits where it can and its classes are many."""
    if model.config.num_states < MANY_STATES or model.config.hidden_logits:
        return model
    if not isinstance(model, Di4CForMaskedLM):
        model.config.hidden_logits = True
        return model
    if model.config.is_student or model.teacher.head is None:
        return model
    try:
        return Di4CForMaskedLM.as_teacher(model, hidden_logits=True)
    except ValueError:  # another map follows the head, or the model does not call it
        return model


def description_of(config: Any, cutter: Cutter) -> TeacherDescription:
    """What the data are held against: a masked language model's own, or a transformer's by its config."""
    if not isinstance(config, DiTConfig):
        told: TeacherDescription = config.teacher
        return told
    is_masks_own = cutter.mask_id == config.mask_id and cutter.num_tokens == config.vocab_size
    return TeacherDescription(
        num_states=config.num_states,
        mask_id=config.mask_id,
        embeddings="backbone.vocab_embed",
        num_tokens=cutter.num_tokens if is_masks_own else config.num_states,
        max_positions=config.length,
    )


def is_masked_lm(source: str) -> bool:
    """Whether a folder holds a masked language model of transformers, as it came or in this package's wrapping."""
    told = _told(Path(source)) if Path(source).is_dir() else {}
    kind = told.get("model_type")
    return kind not in ("mdlm", DiTConfig.model_type) and (kind in CONFIG_MAPPING or "auto_map" in told)


def _is_ours(source: str) -> bool:
    """Whether a folder was written by this package, or is none at all: then that is what is said of it."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    return _told(folder).get("model_type") in MODELS


def _is_published(source: str, revision: str | None) -> bool:
    """Whether a file, a folder or a repository of the hub holds a published diffusion model of text."""
    path = Path(source)
    if path.is_file() or path.suffix in _FILES:
        return True
    if path.is_dir():
        told = _told(path)
        if not told and not any(file.suffix in _FILES for file in path.iterdir()):
            raise ValueError(f"{path}: holds no {checkpoints.CONFIG} and no weights; name the folder of a model")
    else:
        try:
            told, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        except OSError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{source}: no such file or folder, and no model of the hub that can be fetched: {first}"
            ) from error
    # Their repositories name a network that transformers does not know; what it does not know and has code is a model
    # of its own, to be opened by consent.
    kind = told.get("model_type")
    return kind == "mdlm" or (kind not in CONFIG_MAPPING and not told.get("auto_map"))


def _told(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, nothing where there is none."""
    file = folder / checkpoints.CONFIG
    if not file.is_file():
        return {}
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable JSON ({error}); copy it again or use another checkpoint") from error
    return held if isinstance(held, dict) else {}
