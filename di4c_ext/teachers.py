"""The teacher of a run: new for its images and process, in the cache, or from a folder and held against both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

import di4c_ext
from di4c_ext import checkpoints, data, random
from di4c_ext.arguments import as_dict
from di4c_ext.augment import AUGMENTATION_DIM
from di4c_ext.codes import ImageCodes
from di4c_ext.config import TIME_MIN, PretrainConfig
from di4c_ext.metrics.denoising import mean_denoising_cross_entropy
from di4c_ext.metrics.likelihood import mean_likelihood_bound
from di4c_ext.models import CompactConfig, CompactDenoiser, TokenConfig, TokenDenoiser, UNetConfig, UNetDenoiser
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.names import check_names
from di4c_ext.process import LEVEL_PROCESSES, PROCESSES, AbsorbingProcess
from di4c_ext.systems import image_shape_of, load_model, num_classes_of, process_of

# The settings a teacher's weights depend on, beside its data; `distill` has each of them with `teacher_` in front.
RECIPE = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "ema_decay",
    "augment_share",
    "model_config",
    "seed",
)
LEVELS_RECIPE = ("time_min",)  # and what a process of levels takes on top
CODES_RECIPE = ("label_dropout",)  # and what one of codes
_NUMERICS = ("channels_last", "bf16", "fp16")  # of which a U-Net's weights depend as well
_MASKED, _LEVELS = 2000, 1000  # images of each side at most on which a masked denoiser, one of levels is measured


def network_of(process: Mapping[str, Any]) -> type[CompactDenoiser] | type[UNetDenoiser] | type[TokenDenoiser]:
    """The class of the network that is trained for a process."""
    if process["name"] == "confidence":
        return TokenDenoiser
    return UNetDenoiser if process["name"] in LEVEL_PROCESSES else CompactDenoiser


def new_teacher(train: data.ImageTokens, config: PretrainConfig, process: Mapping[str, Any]) -> MixtureDenoiser:
    """An untrained teacher for these images and this process; its weights are a function of config.seed.

    Raises ValueError for settings that the network does not have, or that the process leaves without a meaning.
    """
    settings = as_dict("model_config", config.model_config)
    make = {UNetDenoiser: _new_unet, TokenDenoiser: _new_tokens, CompactDenoiser: _new_compact}[network_of(process)]
    try:
        return make(train, config, process, settings)
    except TypeError as error:  # a setting of the wrong kind
        raise ValueError(f"--model_config {json.dumps(settings)}: {error}") from error


def _new_compact(
    train: data.ImageTokens, config: PretrainConfig, process: Mapping[str, Any], settings: dict[str, Any]
) -> CompactDenoiser:
    fixed = ("num_states", "length", "mask_id", "augmentation_dim", "schedule", "is_student")
    check_names("--model_config", settings, CompactConfig.__init__, (*fixed, "latent_dim", "latent_hidden_size"))
    if config.time_min != TIME_MIN:
        raise ValueError(
            f"--time_min {config.time_min}: is for --process gaussian or uniform; the bound that absorbing diffusion "
            "trains by has no times, leave it out"
        )
    set_seed(config.seed)
    return CompactDenoiser(
        CompactConfig(
            num_states=train.num_states,
            length=train.length,
            augmentation_dim=AUGMENTATION_DIM if config.augment_share else 0,
            schedule=process["schedule"],
            image_shape=list(train.shape),
            **settings,
        )
    )


def _new_unet(
    train: data.ImageTokens, config: PretrainConfig, process: Mapping[str, Any], settings: dict[str, Any]
) -> UNetDenoiser:
    fixed = ("num_states", "num_channels", "image_size", "process", "is_student")
    latent = ("latent_dim", "latent_law", "latent_scale")
    check_names("--model_config", settings, UNetConfig.__init__, (*fixed, *latent))
    if config.augment_share:
        raise ValueError(f"--augment_share {config.augment_share:g}: the U-Net cannot be told of alterations; give 0")
    height, width, *channels = train.shape
    made = UNetConfig(
        num_states=train.num_states,
        num_channels=channels[0] if channels else 1,
        image_size=[height, width],
        process=process,
        **settings,
    )
    set_seed(config.seed)
    return UNetDenoiser(made)


def _new_tokens(
    train: data.ImageTokens, config: PretrainConfig, process: Mapping[str, Any], settings: dict[str, Any]
) -> TokenDenoiser:
    fixed = ("num_codes", "num_classes", "grid", "schedule", "codebook", "is_student")
    latent = ("latent_form", "latent_dim", "latent_law", "latent_scale", "latent_gate")  # which from_teacher takes
    check_names("--model_config", settings, TokenConfig.__init__, (*fixed, *latent))
    _check_unused(config, "of levels, not of codes")
    if config.augment_share:
        raise ValueError(f"--augment_share {config.augment_share:g}: alters pixels, codes have none; give 0")
    codes = _codes(train)
    made = TokenConfig(
        num_codes=codes.num_states,
        num_classes=codes.num_classes,
        grid=codes.shape,
        schedule=process.get("schedule", "arccos"),
        codebook=codes.codebook,
        **settings,
    )
    set_seed(config.seed)
    return TokenDenoiser(made)


def _codes(images: data.ImageTokens) -> ImageCodes:
    if not isinstance(images, ImageCodes):
        raise ValueError(
            f"--process confidence: works on codes, {images.name!r} are pixels; name a model by --vq_model"
        )
    return images


def _check_unused(config: PretrainConfig, why: str) -> None:
    if config.time_min != TIME_MIN:
        raise ValueError(f"--time_min {config.time_min}: is for a process {why}; leave it out")


def recipe_of(config: PretrainConfig, more: Sequence[str] = ()) -> dict[str, str]:
    """The settings that a teacher's weights depend on, in words; more: names beside those of every teacher."""
    told = {name: str(getattr(config, name)) for name in (*RECIPE, *more)}
    if config.world_size > 1:  # the batch is that of all processes
        told["per_device_train_batch_size"] = str(config.per_device_train_batch_size * config.world_size)
    return told


def cache_name(fingerprint: str, told: str, recipe: Mapping[str, Any]) -> Path:
    """The folder of the cache for a teacher of this data, process and recipe, under these versions."""
    versions = f"di4c_ext {di4c_ext.__version__} torch {torch.__version__}"
    key = hashlib.sha256(f"{fingerprint} {told} {json.dumps(recipe)} {versions}".encode()).hexdigest()
    return checkpoints.cache_folder() / f"teacher-{key[:16]}"


def cached_teacher(train: data.ImageTokens, config: PretrainConfig, process: Mapping[str, Any]) -> Path:
    """Where the cache keeps the teacher of these images and settings, whether it is there or not."""
    recipe = recipe_of(config)
    told = process["schedule"] if process["name"] == "absorbing" else json.dumps(process, sort_keys=True)
    if process["name"] == "confidence":
        told = process.get("schedule", "arccos")  # the other constants are those of a student's training
        recipe = recipe_of(config, (*CODES_RECIPE, "bf16", "fp16"))
    elif process["name"] != "absorbing":
        recipe = recipe_of(config, (*LEVELS_RECIPE, *_NUMERICS))
    return cache_name(train.fingerprint(), told, recipe)


def load_teacher(folder: Path, train: data.ImageTokens, process: Mapping[str, Any]) -> MixtureDenoiser:
    """A teacher from disk, held against the data and what was said of the process; ValueError naming what is amiss.

    Constants of the process that `process` leaves out are the teacher's own.
    """
    teacher = load_model(folder, is_student=False)
    config = teacher.config
    check_process(folder, process_of(config), process)
    if not isinstance(teacher, network_of(process)):
        raise ValueError(
            f"teacher {folder}: is a {type(teacher).__name__}, for images under --process {process['name']} a "
            f"{network_of(process).__name__} is wanted"
        )
    if not isinstance(teacher, TokenDenoiser) and config.num_states != train.num_states:
        raise ValueError(
            f"teacher {folder}: has S = {config.num_states} states, the data {train.name!r} has {train.num_states}; "
            "give the teacher of this data, or data of its states (--num_states)"
        )
    if isinstance(teacher, TokenDenoiser):
        check_codes(f"teacher {folder}", config, _codes(train))
        return teacher
    shape = " x ".join(map(str, train.shape))
    if config.length != train.length:
        raise ValueError(
            f"teacher {folder}: has D = {config.length} positions, an image of {train.name!r} has {train.length} "
            f"({shape}); give the teacher of this data, or data of its size (--image_size)"
        )
    if isinstance(teacher, UNetDenoiser) and image_shape_of(config) != train.shape:
        own = " x ".join(map(str, image_shape_of(config)))
        raise ValueError(
            f"teacher {folder}: is for images of {own}, those of {train.name!r} are {shape}; "
            "give the teacher of this data, or data of its size (--image_size)"
        )
    return teacher


def check_codes(where: str, config: TokenConfig, codes: ImageCodes) -> None:
    """Raises ValueError naming all in which a token network's config does not fit a set of codes."""
    own = {"num_codes": codes.num_states, "grid": list(codes.shape), "num_classes": codes.num_classes}
    if config.codebook is not None:
        own["codebook"] = codes.codebook
    asked = {name: getattr(config, name) for name in own}
    faults = [f"{name} {asked[name]}, these {value}" for name, value in own.items() if asked[name] != value]
    if config.num_classes > codes.num_classes > 0:  # some classes have no image here
        faults = [fault for fault in faults if not fault.startswith("num_classes")]
    if faults:
        raise ValueError(
            f"{where}: was trained on other codes than those of {codes.name!r}: {'; '.join(faults)}; "
            "name the VQ model it was trained with by --vq_model"
        )


def check_process(folder: str | Path, own: Any, told: Mapping[str, Any]) -> None:
    """ValueError unless the teacher's own process is the one told of, as far as it was told of."""
    name = next(name for name, kind in PROCESSES.items() if type(own) is kind)
    if told["name"] != name:
        raise ValueError(
            f"teacher {folder}: was trained for {own!r}, this run is for --process {told['name']}; "
            f"give --process {name}, or another teacher"
        )
    constants = {key: value for key, value in told.items() if key not in ("name", "schedule")}
    if name == "confidence":  # these are of a student's training, only the schedule is the teacher's
        constants = {"schedule": told["schedule"]} if "schedule" in told else {}
    elif told.get("schedule", "linear") != "linear":  # what nobody need say
        constants["schedule"] = told["schedule"]
    different = [f"{key} = {value}" for key, value in constants.items() if getattr(own, key) != value]
    if different:
        raise ValueError(
            f"teacher {folder}: was trained for {own!r}, this run asks for {', '.join(different)}; "
            "leave the constants of the process out to take the teacher's"
        )


def conditions_of(config: Any, images: data.ImageTokens, device: torch.device) -> dict[str, Tensor]:
    """What a network of this config is told of these images: their labels, where it takes some."""
    if not num_classes_of(config) or images.labels is None:
        return {}
    return {"labels": images.labels.to(device)}


def bounds(
    teacher: MixtureDenoiser, train: data.ImageTokens, heldout: data.ImageTokens, time_min: float = TIME_MIN
) -> dict[str, float]:
    """What `bounds_name` says, in nats an image, on training and on held-out images, or many of them."""
    process = process_of(teacher.config)
    found = {}
    for name, images in (("train", train), ("heldout", heldout)):
        some = _measured(teacher.config, images)
        x_0 = some.tokens.long().to(teacher.device)
        keys = random.keys(0, len(x_0), device=teacher.device)
        if isinstance(process, AbsorbingProcess):
            found[name] = mean_likelihood_bound(
                teacher,
                process,
                x_0,
                keys,
                draws=4 if name == "train" else 16,
                conditions=conditions_of(teacher.config, some, teacher.device),
            )
        else:
            found[name] = mean_denoising_cross_entropy(teacher, process, x_0, keys, time_min=time_min)
    return found


def bounds_name(config: Any, time_min: float = TIME_MIN) -> str:
    """What `bounds` measures of a teacher of this config."""
    if isinstance(process_of(config), AbsorbingProcess):
        return "likelihood bound in nats an image"
    return f"denoising cross-entropy in nats an image, mean over t in [{time_min:g}, 1]"


def num_measured(config: Any, images: data.ImageTokens) -> int:
    """How many of the images `bounds` looks at."""
    return len(_measured(config, images))


def _measured(config: Any, images: data.ImageTokens) -> data.ImageTokens:
    return data.spread(images, _MASKED if isinstance(process_of(config), AbsorbingProcess) else _LEVELS)
