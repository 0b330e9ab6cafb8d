"""Models made of code of their own: run with the user's consent alone, and saved with that code beside them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig


def refuse(where: str, what: str) -> ValueError:
    """The error for code that nobody agreed to run."""
    return ValueError(
        f"{where}: this {what} is made of code of its own, which would run on this machine; "
        "read that code, and if you trust it give trust_remote_code=True, to a command --trust_remote_code true (again "
        "to one that resumes a run)"
    )


def auto_class_of(where: str, config: PreTrainedConfig, known: tuple[str, ...]) -> tuple[str, bool]:
    """The first class of transformers that opens this config as a token predictor, and whether by remote code.

    `known` holds the classes' names in the order of preference.
    """
    for name in known[:2]:  # AutoModel has no head in transformers itself, only where code of its own says so
        if type(config) in getattr(transformers, name)._model_mapping:
            return name, False
    remote = getattr(config, "auto_map", None) or {}
    for name in known:
        if name in remote:
            return name, True
    raise ValueError(
        f"{where}: a {config.model_type!r} is no language model that transformers opens by {' or '.join(known)}; "
        "give a model with a head over its tokens"
    )


def admit(where: str | os.PathLike[str], backbone_config: dict[str, Any], auto_class: str) -> None:
    """Makes the classes in a folder's own code known to transformers; runs that code.

    Args:
        where: folder or hub name whose files hold the code. backbone_config: the config that names its classes.

    Raises:
        ValueError: naming the class that the config does not tell.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    remote = backbone_config.get("auto_map") or {}
    for name in ("AutoConfig", auto_class):
        if name not in remote:
            raise ValueError(f"{where}: backbone_config.auto_map tells no {name}; save the student again")
    config_class: Any = get_class_from_dynamic_module(remote["AutoConfig"], str(where))
    model_class = get_class_from_dynamic_module(remote[auto_class], str(where))
    AutoConfig.register(backbone_config["model_type"], config_class, exist_ok=True)
    getattr(transformers, auto_class).register(config_class, model_class, exist_ok=True)


def save_code(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copies the files that define the model's class and its config's, with what they import beside them."""
    from transformers.dynamic_module_utils import custom_object_save

    Path(folder).mkdir(parents=True, exist_ok=True)
    for part in (model, model.config):
        custom_object_save(part, folder)


def without_origin(config: PreTrainedConfig) -> None:
    """auto_map as it reads in a folder that holds the code itself: without the name of another repository."""
    remote = getattr(config, "auto_map", None)
    if remote:
        config.auto_map = {name: str(value).split("--")[-1] for name, value in remote.items()}
