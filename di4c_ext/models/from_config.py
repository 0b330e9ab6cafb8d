"""A masked language model of transformers with weights that were never trained, for a vocabulary of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from di4c_ext.models import backbone, remote_code
from di4c_ext.names import nearest

FLAG = "--config_name"
_SPECIAL = ("bos", "eos", "cls", "sep", "unk", "mask")  # ids that some configs hold and some tokenizers have


def is_family(name: str) -> bool:
    """Whether a name is that of a family of transformers ("bert"), and no file or folder."""
    return name in CONFIG_MAPPING and not Path(name).exists()


def new_model(
    name: str, overrides: Mapping[str, Any], num_tokens: int, mask_id: int | None, tokenizer: Any, consent: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """A model at its random start, of torch's generator, in evaluation mode, and the fields of its description.

    Args:
        name: folder, config.json or hub name of a config, or a family, whose default config it then is.
        overrides: settings of the config by name. The vocabulary follows from the tokenizer, with a mask and a padding
            token at its end where it has none.
        num_tokens, mask_id: of the tokenizer, None where it has no mask. tokenizer: of transformers, or None.
        consent: to run code that the config names.

    Raises:
        ValueError: for a config that cannot be read or built, and overrides it does not know.
    """
    config = _config(name, consent)
    known = [key for key in config.to_dict() if key not in ("model_type", "architectures", "transformers_version")]
    for key in overrides:
        if key not in known:
            raise ValueError(f"--config_overrides: {config.model_type} has no setting {key!r}{nearest(key, known)}")
    mask = num_tokens if mask_id is None else mask_id
    size = max(num_tokens, mask + 1)
    pad = getattr(tokenizer, "pad_token_id", None)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
    told = {key: value for key, value in ids.items() if key in known}
    # Models keep padding at 0 and out of training: a token of the text must not be it.
    told |= {"vocab_size": size + (pad is None), "pad_token_id": size if pad is None else pad}
    kind = backbone.kind_of(name, config)
    if kind["remote_code"] and not consent:
        raise remote_code.refuse(name, "config")
    opener: Any = getattr(transformers, kind["auto_class"])
    try:
        config = type(config).from_dict(_held(config, overrides) | told | dict(overrides))
        model = opener.from_config(config, dtype=torch.float32, trust_remote_code=kind["remote_code"])
    except Exception as error:  # whatever a family's own code says of settings that do not fit
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{FLAG} {name}: no model of this config, {size} tokens and {dict(overrides)} can be built ({reason}); "
            "change --config_overrides, or give a tokenizer with a padding token"
        ) from error
    return model.eval(), kind | {"mask_id": mask, "num_tokens": num_tokens}


def _held(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config's settings; where the number of layers changes without those it holds layer by layer."""
    held = config.to_dict()
    layers = held.get("num_hidden_layers")
    if overrides.get("num_hidden_layers", layers) == layers:
        return held
    return {key: value for key, value in held.items() if not (isinstance(value, list) and len(value) == layers)}


def _config(name: str, consent: bool) -> PreTrainedConfig:
    if is_family(name):
        made: PreTrainedConfig = AutoConfig.for_model(name)
        return made
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=consent)
    except (OSError, ValueError, KeyError) as error:
        if not isinstance(error, OSError) and _has_code(name) and not consent:
            raise remote_code.refuse(name, "config") from error
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{FLAG} {name}: no config that opens ({reason}); give a folder, a config.json, a hub name, or a family of "
            f"transformers such as bert{nearest(name, list(CONFIG_MAPPING))}"
        ) from error
    return found


def _has_code(name: str) -> bool:
    held, _ = PreTrainedConfig.get_config_dict(name)
    return bool(held.get("auto_map"))
