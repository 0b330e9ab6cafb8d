"""Training a VQ autoencoder on images, by `python -m di4c_ext.pretrain --kind vq`: the loss is `models.vqgan_loss`'s.

Every restart_steps steps, in the first half of training, codes that a batch does not use are put on places that its
images do have; before the first step that is all of them, and the start of the code-book. Which ones hangs on that
step's batch alone, so a resumed training is the one that never stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import set_seed

from di4c_ext import checkpoints, codes, data, non_finite, pictures
from di4c_ext.arguments import as_dict
from di4c_ext.config import PretrainConfig
from di4c_ext.models import VQConfig, VQModel
from di4c_ext.models.vqgan_loss import Norm, restart_codes, vq_loss
from di4c_ext.names import check_names
from di4c_ext.trainer import Augment, KeyedTrainer, Parts

SHOWN = 16  # held-out images in the picture
MEASURED = 2000  # held-out images of which the figures are


@dataclass
class VQArguments:
    """The loss of a VQ autoencoder."""

    reconstruction_norm: str = field(default="l1", metadata={"help": "how far images are from theirs: l1 or l2"})
    commitment_weight: float = field(default=0.25, metadata={"help": "the encoder's pull towards its codes"})
    restart_steps: int = field(
        default=50, metadata={"help": "steps between two restarts of idle codes, in the first half; 0: the first only"}
    )

    def __post_init__(self) -> None:
        if self.reconstruction_norm not in get_args(Norm):
            known = ", ".join(get_args(Norm))
            raise ValueError(f"--reconstruction_norm {self.reconstruction_norm!r}: must be one of {known}")
        if not 0 <= self.commitment_weight < float("inf"):
            raise ValueError(f"--commitment_weight {self.commitment_weight}: must be finite and >= 0")
        if self.restart_steps < 0:
            raise ValueError(f"--restart_steps {self.restart_steps}: must be at least 0")


class VQTrainer(KeyedTrainer):
    """Trains a `VQModel` on images; logs how well they come back and how many codes are in use."""

    def __init__(
        self,
        model: VQModel,
        *,
        images: data.ImageTokens,
        vq: VQArguments,
        augment: Augment | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, process=None, train_dataset=images, phase="vq", **kwargs)
        if self.args.world_size > 1:
            raise ValueError(
                f"--kind vq: {self.args.world_size} processes would each restart codes of their own; start one"
            )
        self.images, self.vq, self.augment = images, vq, augment
        self._restarted = -1

    def loss_parts(self, model: nn.Module, x_0: Tensor, keys: Tensor, labels: Tensor | None = None) -> Parts:
        if self.augment is not None:
            x_0, _ = self.augment(x_0, keys)
        inputs = codes.as_input(x_0, self.images)
        self._restart(inputs)
        num_codes = self.model.config.num_codes
        told = vq_loss(model(inputs), inputs, num_codes, norm=self._norm(), beta=self.vq.commitment_weight)
        return {
            "loss": told.loss,
            "reconstruction": told.reconstruction,
            "commitment": told.commitment,
            "perplexity": told.perplexity,
            "codes_used": (told.usage > 0).sum().float(),
        }

    def replay(self, file: Path) -> str:
        # The weights that were kept are those after a restart.
        self._restarted = int(non_finite.read(file)[1].get("step", 0)) - 1
        return super().replay(file)

    def _norm(self) -> Norm:
        return "l1" if self.vq.reconstruction_norm == "l1" else "l2"

    @torch.no_grad()
    def _restart(self, inputs: Tensor) -> None:
        """Before a step that is due, in its first micro-batch."""
        step = self.state.global_step
        due = step == 0 or (
            self.vq.restart_steps and step % self.vq.restart_steps == 0 and 2 * step <= self.args.max_steps
        )
        if not due or step == self._restarted:
            return
        self._restarted = step
        model: Any = self.model
        z = model.quant_conv(model.encoder(inputs))
        counted = model.quantize.nearest(z).flatten().bincount(minlength=model.config.num_codes)
        restart_codes(model, z, counted if step else torch.zeros_like(counted), seed=self.args.seed + step)


def new_vq(train: data.ImageTokens, config: PretrainConfig) -> VQModel:
    """An untrained VQ model for these images, its weights a function of config.seed; ValueError for bad settings."""
    settings = as_dict("model_config", config.model_config)
    check_names("--model_config", settings, VQConfig.__init__, ("image_size", "num_channels"))
    height, width, channels = (*train.shape, 1)[:3]
    try:
        made = VQConfig(image_size=[height, width], num_channels=channels, **settings)
    except TypeError as error:  # a setting of the wrong kind
        raise ValueError(f"--model_config {json.dumps(settings)}: {error}") from error
    if config.augment_share:
        raise ValueError(f"--augment_share {config.augment_share:g}: is for a teacher; leave it out")
    set_seed(config.seed)
    return VQModel(made)


def reconstructions(model: VQModel, images: data.ImageTokens, file: Path) -> dict[str, float]:
    """Writes a picture of originals above what their codes give back; returns figures of up to 2,000 of the images.

    error is the mean distance of a pixel in shares of the whole range; codes_used and perplexity are of their codes.
    """
    some = images.subset(torch.arange(min(MEASURED, len(images))))
    tokens = model.encode(codes.as_input(some.tokens[:], some), 64)
    rebuilt = codes.Decoder(model, images.num_states)(tokens)
    originals = some.images().flatten(1)
    rows = [("originals", originals[:SHOWN]), ("from codes", rebuilt[:SHOWN])]
    scale = max(1, pictures.scale_for(images.shape))
    pixels = pictures.labelled_grid(rows, images.shape, images.num_states, columns=SHOWN, scale=scale)
    pictures.save(pixels, file, scale=1)
    error = (rebuilt.double() - originals.double()).abs().mean() / max(images.num_states - 1, 1)
    return {"error": float(error), **codes.usage(tokens, model.config.num_codes)}


def save_vq(model: VQModel, folder: Path) -> None:
    """The model into a folder of its own, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.save_model(model, folder)
