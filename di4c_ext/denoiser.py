"""What a denoiser is, and how one is called where no gradient is wanted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# denoiser(x_t, t, latents=None) -> logits of the clean states, a Tensor or a short form of one (ops.Logits).
#   x_t     (B, D) int64, the noised state; with latents also (B, L, D), each latent its own
#   t       (B,) floating, 1 = noise, 0 = data
#   latents None for a teacher -> logits (B, D, S); (B, C) -> (B, D, S); (B, L, C) -> (B, L, D, S)
# Classes, prompts and other conditions are bound by the caller (functools.partial).
Denoiser = Callable[..., Any]
# latents(keys (B,), L) -> (B, L, C), the L latents of each key.
Latents = Callable[[Tensor, int], Tensor]


@contextmanager
def inference(denoiser: Denoiser, device: torch.device, *, dropout: bool = False) -> Iterator[None]:
    """Evaluation mode, no gradient, and an autocast context of its own.

    Dropout is off inside unless asked for, by which modes stay as they are: one dropout mask per pass is shared by all
    positions and would act as a latent nobody asked for. The autocast cache is off as well: a weight cast under no_grad
    and kept there would be handed to the next forward of the same region without its gradient. Modes are put back as
    they were, module by module. A partial is looked through; a denoiser that hides its module otherwise (a closure)
    keeps the mode it came with.
    """
    while isinstance(denoiser, partial):
        denoiser = denoiser.func
    modules = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    trained = [module for module in modules if module.training and not dropout]
    kind = device.type
    autocast = torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
    for module in trained:
        module.training = False
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module in trained:
            module.training = True
