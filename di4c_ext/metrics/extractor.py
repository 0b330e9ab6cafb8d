"""A feature space that the user names: what `networks.open_network` opens looks at tokens as the pictures they are."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.data import ImageTokens, as_images
from di4c_ext.lazy_rows import Rows
from di4c_ext.metrics.features import Seen
from di4c_ext.metrics.networks import open_network

AT_ONCE = 100  # images looked at together


class Extractor:
    """`seen` of tokens (N, D), images like these, by the network of this name; see `networks.open_network`."""

    def __init__(self, name: str, images: ImageTokens, trust_remote_code: bool = False) -> None:
        self.name = name
        self._network = open_network(name, trust_remote_code)
        self.shape, self.layout, self.num_states = images.shape, images.layout, images.num_states
        self.identity = self._network.identity

    @torch.no_grad()
    def seen(self, tokens: Rows) -> Seen:
        """Features (N, F) float32 and, of a network that gives logits, probabilities (N, Y), on the CPU."""
        from tqdm.auto import tqdm

        features, probabilities = [], []
        num_batches = -(-len(tokens) // AT_ONCE)
        for some in tqdm(tokens.split(AT_ONCE), self.name, num_batches, leave=False, disable=None, unit="batch"):
            read, logits = self._network.see(self.pixels(some))
            features.append(read.float().cpu())
            if logits is not None:
                probabilities.append(logits.float().softmax(-1).cpu())
        return Seen(torch.cat(features), torch.cat(probabilities) if probabilities else None)

    def pixels(self, tokens: Tensor) -> Tensor:
        """(N, 3, height, width), RGB in [0, 1]; grey images have three equal channels."""
        images = as_images(tokens, self.shape, self.layout).to(self._network.device).float()
        maps = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return (maps / max(self.num_states - 1, 1)).expand(-1, 3, -1, -1)
