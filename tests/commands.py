"""What tests of the commands share: settings as the words of a command line, and networks that train in no time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Settings of each kind of network, for --model_config and --teacher_model_config.
COMPACT = {"hidden_size": 16, "num_blocks": 1}
UNET = {"base_channels": 4, "ch_mult": [1, 2], "num_res_blocks": 1, "attention_scales": [1], "time_embed_dim": 4}
VQ = {
    **{"num_codes": 12, "embed_dim": 4, "base_channels": 4, "ch_mult": [1, 1], "num_res_blocks": 1},
    **{"attention_scales": [], "z_channels": 4},
}
TOKENS = {
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_size": 8, "embedding_std": 0.3, "mask_logit": False},
    **{"latent_embed_dim": 4, "latent_hidden_size": 8},
}
DIT = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "cond_dim": 8, "dropout": 0.0}


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """--name value for each setting: JSON for a mapping, several words for a list, true or false in small letters."""
    return [word for name, value in settings.items() for word in (f"--{name}", *_values(value))]


def _values(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [json.dumps(value)]
    if isinstance(value, bool):
        return [str(value).lower()]
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
