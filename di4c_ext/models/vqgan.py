"""The published VQ autoencoder (of the taming-transformers family): images to a grid of codes, and back.

Names, shapes and order of the weights are the published ones, so their checkpoints load as they are (`python -m
di4c_ext.convert`). The published network was trained with a perceptual and an adversarial loss, whose networks
(`loss.*` in its file) say nothing about codes or images and are not part of this one; how a small one is trained
without them is told in `models/vqgan_loss.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from di4c_ext.models.base import refuse_shapes
from di4c_ext.models.token_config import TokenConfig
from di4c_ext.models.unet_blocks import wide
from di4c_ext.models.vqgan_blocks import Decoder, Encoder
from di4c_ext.models.vqgan_config import VQConfig


class Quantizer(nn.Module):
    """The code-book: which code is nearest to what the encoder says, and what a code stands for."""

    def __init__(self, num_codes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, embed_dim)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """z (N, E, h, w) -> (N, h w) int64, the codes at the least squared Euclidean distance |e|^2 - 2 e.z (+ |z|^2).

        In float32 at least, whatever autocast says.
        """
        dtype = wide(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            codes = self.embedding.weight.to(dtype)
            rows = z.to(dtype).flatten(2).mT.flatten(0, 1)
            distance = torch.addmm(codes.square().sum(1), rows, codes.mT, alpha=-2)
            return distance.argmin(1).view(z.shape[0], z.shape[2] * z.shape[3])

    def look_up(self, codes: Tensor, grid: list[int]) -> Tensor:
        """codes (N, h w) -> (N, E, h, w)."""
        return self.embedding(codes).mT.unflatten(2, grid)


class VQOutput(NamedTuple):
    """What the network says of images (N, C, H, W), for a loss."""

    images: Tensor  # (N, C, H, W), rebuilt from the codes
    codes: Tensor  # (N, D) int64
    z: Tensor  # (N, E, h, w), before
    quantized: Tensor  # (N, E, h, w), and after the nearest codes took its place


class VQModel(PreTrainedModel):
    """encode(images) -> codes, decode(codes) -> images; model(images) -> VQOutput, with a graph, to train it.

    images (N, channels, height, width) floating in [-1, 1], codes (N, D) int64 in 0..num_codes - 1, row by row.
    Gradients pass the choice of codes as though it were the identity.
    """

    config_class = VQConfig
    config: VQConfig
    base_model_prefix = ""
    main_input_name = "images"

    def __init__(self, config: VQConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.num_codes, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each layer's own start; codes near zero, where `vqgan_loss.restart_codes` takes them from."""
        if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            bound = 1 / module.num_embeddings
            nn.init.uniform_(module.weight, -bound, bound)

    def forward(self, images: Tensor) -> VQOutput:
        self._check_images(images)
        z = self.quant_conv(self.encoder(images.to(self.dtype)))
        codes = self.quantize.nearest(z)
        quantized = self.quantize.look_up(codes, self.config.grid)
        passed = z + (quantized - z).detach()
        return VQOutput(self.decoder(self.post_quant_conv(passed)), codes, z, quantized)

    def encode(self, images: Tensor, batch_size: int = 8) -> Tensor:
        """images (N, C, H, W) -> codes (N, D) on the model's device, `batch_size` images at a time, without a graph.

        Raises ValueError for images of another size and TypeError for those that are not floating.
        """
        self._check_images(images)
        with self._as_saved():
            pieces = [self._codes(piece) for piece in images.split(_size(batch_size))]
        return torch.cat(pieces)

    def decode(self, codes: Tensor, batch_size: int = 8) -> Tensor:
        """codes (N, D) -> images (N, C, H, W) on the model's device, `batch_size` at a time, without a graph.

        They lie about [-1, 1] and are not clamped. Raises ValueError for codes that are not in the code-book, among
        them a mask that is left, and for another number of positions than the grid has.
        """
        config = self.config
        if codes.is_floating_point() or codes.dtype == torch.bool:
            raise TypeError(f"VQModel.decode: codes must be integers, got {codes.dtype}")
        if codes.ndim != 2 or codes.shape[1] != config.length:
            raise ValueError(
                f"VQModel.decode: codes must be (N, D) with D = {config.length}, a grid of "
                f"{' x '.join(map(str, config.grid))}, got {tuple(codes.shape)}"
            )
        outside = codes[(codes < 0) | (codes >= config.num_codes)]
        if outside.numel():
            left = "; that is the mask, so positions are left to be sampled" if outside[0] == config.num_codes else ""
            raise ValueError(f"VQModel.decode: codes must be 0..{config.num_codes - 1}, got {outside[0].item()}{left}")
        with self._as_saved():
            pieces = [self._images(piece) for piece in codes.split(_size(batch_size))]
        return torch.cat(pieces)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell code-books apart; the same for one kept in float32 or bfloat16."""
        weight = self.quantize.embedding.weight.detach().to("cpu", torch.bfloat16).view(torch.uint8)
        return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]

    def check_denoiser(self, config: TokenConfig) -> None:
        """Raises ValueError naming all in which a token network's config does not fit these codes."""
        own = {"num_codes": self.config.num_codes, "grid": list(self.config.grid)}
        if config.codebook is not None:
            own["codebook"] = self.fingerprint()
        asked = {name: getattr(config, name) for name in own}
        faults = [f"{name} {asked[name]}, here {value}" for name, value in own.items() if asked[name] != value]
        if faults:
            raise ValueError(
                f"VQModel: the token network was trained on the codes of another VQ model: {'; '.join(faults)}; "
                "open the one it was trained with"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but tensors that are not exactly the model's are a ValueError naming them."""
        want_info = kwargs.pop("output_loading_info", False)
        if "config" not in kwargs:
            kind = VQConfig.get_config_dict(pretrained_model_name_or_path)[0].get("model_type")
            if kind != VQConfig.model_type:
                raise ValueError(f"{pretrained_model_name_or_path}: holds a network {kind!r}, a VQ model is wanted")
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # shapes that differ are refused here
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        refuse_shapes(str(pretrained_model_name_or_path), info["mismatched_keys"])
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:
            raise ValueError(
                f"{pretrained_model_name_or_path}: the weights are not those of this VQ model: "
                f"missing {missing or 'none'}, unexpected {unexpected or 'none'}"
            )
        return (model, info) if want_info else model

    def _codes(self, images: Tensor) -> Tensor:
        return self.quantize.nearest(self.quant_conv(self.encoder(images.to(self.device, self.dtype))))

    def _images(self, codes: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantize.look_up(codes.to(self.device).long(), self.config.grid)))

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """No graph, no dropout, and the weights' own precision: an image has one row of codes, whoever asks."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            self.train(training)

    def _check_images(self, images: Tensor) -> None:
        shape = self.config.image_shape
        if not images.is_floating_point():
            raise TypeError(
                f"VQModel: images must be floating, in [-1, 1], got {images.dtype}; of bytes make x.float() / 127.5 - 1"
            )
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"VQModel: images must be (N, C, H, W) with C, H, W = {', '.join(map(str, shape))}, "
                f"got {tuple(images.shape)}"
            )


def _size(batch_size: int) -> int:
    if batch_size < 1:
        raise ValueError(f"VQModel: batch_size must be at least 1, got {batch_size}")
    return batch_size
