"""The feature space of a small classifier trained on the labels of the training images.

Networks trained on ImageNet say little about 8x8 digits or grey clothes, so the images' own labels make the space: the
last hidden layer, after its ReLU, of a two-layer network (32 features) or, from 16 pixels a side, of a small
convolutional one (64). It sees training images only; its accuracy on the held-out ones stands beside every distance
measured in it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from di4c_ext import checkpoints
from di4c_ext.data import ImageTokens, as_images
from di4c_ext.lazy_rows import Rows

HIDDEN, STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 1500, 128, 2e-3, 1e-2
CONVOLVED = 16  # pixels a side from which the classifier is convolutional
WIDTHS = (32, 64)  # feature maps of its first layer and of the others, each of which halves the size to at most 8
AT_ONCE = 2000  # images looked at together, which bounds the memory


class Seen(NamedTuple):
    """What a network makes of N images: features (N, F), and probabilities of the labels (N, Y) where it gives any."""

    features: Tensor
    probabilities: Tensor | None


def weights_digest(model: nn.Module) -> str:
    """Hex digest of all of a module's parameters and buffers, by name."""
    told = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        told.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def num_features(shape: tuple[int, ...]) -> int:
    """F, for images (height, width[, channels])."""
    return 64 if min(shape[:2]) >= CONVOLVED else 32


class Classifier(nn.Module):
    """tokens (N, D) of images like these -> logits of the labels (N, Y); `seen` gives the last hidden layer too."""

    def __init__(self, images: ImageTokens, num_labels: int) -> None:
        super().__init__()
        self.scale = 1 / max(images.num_states - 1, 1)
        self.shape, self.layout = images.shape, images.layout
        size = num_features(images.shape)
        self.is_convolutional = size == 64
        if self.is_convolutional:
            self.body = _convolutions(images.shape, size)
        else:
            self.body = nn.Sequential(nn.Linear(images.length, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size), nn.ReLU())
        self.head = nn.Linear(size, num_labels)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self._scaled(tokens)))

    @torch.no_grad()
    def seen(self, tokens: Rows) -> Seen:
        features = torch.cat([self.body(self._scaled(some)) for some in tokens.split(AT_ONCE)])
        return Seen(features, self.head(features).softmax(-1))

    def features(self, tokens: Rows) -> Tensor:
        return self.seen(tokens).features

    @property
    def identity(self) -> str:
        """Hangs on the weights; equal ones see equal features."""
        return f"labels {weights_digest(self)}"

    @torch.no_grad()
    def accuracy(self, data: ImageTokens) -> float:
        """Share of the images of `data` whose label is the most probable."""
        if data.labels is None:
            raise ValueError(f"{data.name}: no labels to compare with")
        found = torch.cat([self(some).argmax(-1) for some in data.tokens.split(AT_ONCE)])
        return float((found == data.labels).double().mean())

    def _scaled(self, tokens: Tensor) -> Tensor:
        """What the network takes, in [0, 1]: (N, D), or maps (N, C, height, width)."""
        if not self.is_convolutional:
            return tokens.float() * self.scale
        images = as_images(tokens, self.shape, self.layout).float() * self.scale
        return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)


def classifier(train: ImageTokens, cache: Path | None = None, *, steps: int = STEPS) -> Classifier:
    """The classifier of these training images, from the cache folder where it was kept, else trained (seconds)."""
    if train.labels is None:
        raise ValueError(f"{train.name}: a feature space needs labels; give an .npz with an array named 'labels'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(train, int(train.labels.max()) + 1)
    file = None if cache is None else cache / f"classifier-{_key(train, steps)}.safetensors"
    if not _is_kept(model, file):
        _fit(model, train.tokens, train.labels, steps)
        if file is not None:
            checkpoints.keep_state(model, file)
    return model.eval().requires_grad_(False)


def _convolutions(shape: tuple[int, ...], size: int) -> nn.Sequential:
    """Convolutions that halve the map until it is 8 pixels or less, twice at least, and a layer of `size` features."""
    height, width, channels = (*shape, 1)[:3]
    layers: list[nn.Module] = []
    for maps in (WIDTHS[0], *[WIDTHS[1]] * max((max(height, width) - 1).bit_length() - 4, 1)):
        layers += [nn.Conv2d(channels, maps, 3, stride=2, padding=1), nn.ReLU()]
        height, width, channels = -(-height // 2), -(-width // 2), maps
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(height * width * channels, size), nn.ReLU())


def _is_kept(model: Classifier, file: Path | None) -> bool:
    """Fills the model from the cache; a damaged file counts as none, it takes seconds to make anew."""
    if file is None or not file.is_file():
        return False
    try:
        checkpoints.load_state(model, file)
    except ValueError:
        return False
    return True


def _fit(model: Classifier, tokens: Rows, labels: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(steps):
        rows = torch.randint(len(tokens), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _key(train: ImageTokens, steps: int) -> str:
    size = num_features(train.shape)
    body = f"{HIDDEN} {size}" if size == 32 else f"{WIDTHS} {size}"
    recipe = f"{train.fingerprint()} {body} {steps} {BATCH} {LEARNING_RATE} {WEIGHT_DECAY}"
    return hashlib.sha256(f"{recipe} torch-{torch.__version__}".encode()).hexdigest()[:16]
