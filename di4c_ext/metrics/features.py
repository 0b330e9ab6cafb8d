"""The feature space of a small classifier trained on the labels of the training images.

Networks trained on ImageNet say little about 8x8 digits, so the images' own labels make the space: a two-layer
network, whose last hidden layer (32 features, after the ReLU) is the space. It sees training images only; its
accuracy on the held-out ones stands beside every distance measured in it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from di4c_ext import checkpoints
from di4c_ext.data import ImageTokens

NUM_FEATURES = 32
HIDDEN, STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 1500, 128, 2e-3, 1e-2


class Classifier(nn.Module):
    """tokens (N, D) -> logits of the labels; `features` gives the last hidden layer (N, 32)."""

    def __init__(self, length: int, num_states: int, num_labels: int) -> None:
        super().__init__()
        self.scale = 1 / max(num_states - 1, 1)
        self.body = nn.Sequential(nn.Linear(length, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_FEATURES), nn.ReLU())
        self.head = nn.Linear(NUM_FEATURES, num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(tokens.float() * self.scale))

    @torch.no_grad()
    def features(self, tokens: Tensor) -> Tensor:
        return self.body(tokens.float() * self.scale)

    @torch.no_grad()
    def accuracy(self, data: ImageTokens) -> float:
        """Share of the images of `data` whose label is the most probable."""
        if data.labels is None:
            raise ValueError(f"{data.name}: no labels to compare with")
        return float((self(data.tokens).argmax(-1) == data.labels).double().mean())


def classifier(train: ImageTokens, cache: Path | None = None, *, steps: int = STEPS) -> Classifier:
    """The classifier of these training images, from the cache folder where it was kept, else trained (seconds)."""
    if train.labels is None:
        raise ValueError(f"{train.name}: a feature space needs labels; give an .npz with an array named 'labels'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(train.length, train.num_states, int(train.labels.max()) + 1)
    file = None if cache is None else cache / f"classifier-{_key(train, steps)}.safetensors"
    if not _is_kept(model, file):
        _fit(model, train.tokens, train.labels, steps)
        if file is not None:
            checkpoints.keep_state(model, file)
    return model.eval().requires_grad_(False)


def _is_kept(model: Classifier, file: Path | None) -> bool:
    """Fills the model from the cache; a damaged file counts as none, it takes seconds to make anew."""
    if file is None or not file.is_file():
        return False
    try:
        checkpoints.load_state(model, file)
    except ValueError:
        return False
    return True


def _fit(model: Classifier, tokens: Tensor, labels: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        rows = torch.randint(len(tokens), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _key(train: ImageTokens, steps: int) -> str:
    recipe = f"{train.fingerprint()} {HIDDEN} {NUM_FEATURES} {steps} {BATCH} {LEARNING_RATE} {WEIGHT_DECAY}"
    return hashlib.sha256(f"{recipe} torch-{torch.__version__}".encode()).hexdigest()[:16]
