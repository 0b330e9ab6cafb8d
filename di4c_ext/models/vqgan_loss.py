"""Training a small VQ autoencoder: how well images come back, and code and encoder drawn together.

    loss = |x - x_hat| + |sg(z) - e|^2 + beta |z - sg(e)|^2,    means over elements, sg: taken as a constant

(arXiv 1711.00937), with L1 or L2 for the images. The published autoencoder was trained with a perceptual loss (LPIPS)
and a critic (a GAN loss) on top; the networks of neither are at hand here, and small grey images do without.

A code that no image chooses gets no gradient and stays where it is. `restart_codes` puts such codes on what the
encoder says of some place of the last images; called on the first batch it is the code-book's start, called now and
then it keeps the whole of it in use.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from di4c_ext import random
from di4c_ext.models.vqgan import VQModel, VQOutput

Norm = Literal["l1", "l2"]


class VQLoss(NamedTuple):
    """Scalars, `loss` with a graph, and how often each code was chosen."""

    loss: Tensor
    reconstruction: Tensor
    commitment: Tensor  # |z - e|^2, of which the code's and the encoder's share differ in their gradient alone
    perplexity: Tensor  # exp of the entropy of the codes' frequencies: how many are in use
    usage: Tensor  # (num_codes,) int64


def vq_loss(output: VQOutput, images: Tensor, num_codes: int, *, norm: Norm = "l1", beta: float = 0.25) -> VQLoss:
    """The loss of `VQModel(images)`; beta weighs the encoder's pull towards its codes. Raises ValueError for others."""
    if norm not in get_args(Norm):
        raise ValueError(f"vq_loss: norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"vq_loss: beta must be finite and >= 0, got {beta!r}")
    distance = functional.l1_loss if norm == "l1" else functional.mse_loss
    reconstruction = distance(output.images, images.to(output.images.dtype))
    z, codes = output.z, output.quantized
    commitment = functional.mse_loss(z, codes.detach())
    loss = reconstruction + functional.mse_loss(codes, z.detach()) + beta * commitment
    usage = output.codes.flatten().bincount(minlength=num_codes)
    share = usage / usage.sum()
    perplexity = torch.special.entr(share).sum().exp()
    return VQLoss(loss, reconstruction.detach(), commitment.detach(), perplexity, usage)


@torch.no_grad()
def restart_codes(model: VQModel, z: Tensor, usage: Tensor, seed: int, at_least: int = 1) -> int:
    """Puts codes used less than `at_least` times on places of z (N, E, h, w), each on one of its own; how many.

    usage (num_codes,) may be summed over many batches. Where there are more such codes than places the rest waits.
    """
    places = z.detach().flatten(2).mT.flatten(0, 1)
    idle = (usage < at_least).nonzero()[:, 0][: len(places)]
    order = random.uniform(random.keys(seed, 1), len(places))[0].argsort().to(places.device)
    weight = model.quantize.embedding.weight
    weight[idle] = places[order[: len(idle)]].to(weight.dtype)
    return len(idle)
