"""A feature space that the user names: an image classifier of the transformers library.

The features are what the network's last linear layer reads, the probabilities the softmax of what it gives. Images are
resized to the network's own size and normalised as its preprocessor_config.json says.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from di4c_ext.data import ImageTokens, as_images
from di4c_ext.lazy_rows import Rows
from di4c_ext.metrics.features import Seen

AT_ONCE = 100  # images looked at together
_SIZE, _HALF = 224, [0.5, 0.5, 0.5]  # where a network does not say


class Extractor:
    """`seen` of tokens (N, D), images like these, by the network in a folder or of a name known to transformers."""

    def __init__(self, name: str, images: ImageTokens) -> None:
        from transformers import AutoModelForImageClassification

        try:
            model: Any = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--eval_feature_extractor {name!r}: no image classifier of transformers with safetensors weights "
                f"({reason})"
            ) from error
        self.model = model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
        self.top = _last_linear(self.model, name)
        self.shape, self.layout, self.num_states = images.shape, images.layout, images.num_states
        told = _preprocessing(name)
        self.size = _side(told.get("size"), getattr(self.model.config, "image_size", _SIZE))
        self.mean, self.std = (
            torch.tensor(told.get(key) or _HALF, device=self.model.device)[:, None, None]
            for key in ("image_mean", "image_std")
        )

    @torch.no_grad()
    def seen(self, tokens: Rows) -> Seen:
        """Features (N, F) and probabilities (N, Y), on the CPU."""
        features: list[Tensor] = []
        handle = self.top.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].flatten(1).cpu()))
        try:
            logits = [self.model(self._pixels(some)).logits.float().cpu() for some in tokens.split(AT_ONCE)]
        finally:
            handle.remove()
        return Seen(torch.cat(features), torch.cat(logits).softmax(-1))

    def _pixels(self, tokens: Tensor) -> Tensor:
        """(N, 3, size, size) as the network wants them; grey images have three equal channels."""
        images = as_images(tokens, self.shape, self.layout).to(self.mean.device).float() / max(self.num_states - 1, 1)
        maps = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(maps, (self.size, self.size), mode="bilinear", antialias=True)
        return (resized.expand(-1, 3, -1, -1) - self.mean) / self.std


def _last_linear(model: nn.Module, name: str) -> nn.Linear:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features != model.config.num_labels:  # type: ignore[union-attr]
        raise ValueError(f"--eval_feature_extractor {name!r}: does not end in a linear layer of its labels")
    return linear[-1]


def _preprocessing(name: str) -> dict[str, Any]:
    """What preprocessor_config.json says; nothing where there is none."""
    from transformers.utils import cached_file

    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return {}
    with open(file, encoding="utf-8") as handle:
        told: dict[str, Any] = json.load(handle)
    return told


def _side(told: Any, default: Any) -> int:
    """Pixels a side, of the forms in which transformers writes a size."""
    if isinstance(told, dict):
        told = told.get("height") or told.get("shortest_edge")
    found = told or default
    return int(found[0] if isinstance(found, list | tuple) else found)
