from __future__ import annotations

from pathlib import Path

import pytest
import torch

from di4c_ext import data
from di4c_ext.metrics.features import NUM_FEATURES, classifier


@pytest.fixture(scope="module")
def digits() -> tuple[data.ImageTokens, data.ImageTokens]:
    return data.split(data.load("digits"), 1 / 6)


def test_tells_held_out_digits_apart(digits: tuple[data.ImageTokens, data.ImageTokens]) -> None:
    train, heldout = digits
    model = classifier(train)
    assert model.accuracy(heldout) > 0.94
    assert model.features(heldout.tokens).shape == (len(heldout), NUM_FEATURES)


def test_cache_gives_the_same_network_and_a_bad_file_is_replaced(
    digits: tuple[data.ImageTokens, data.ImageTokens], tmp_path: Path
) -> None:
    train, heldout = digits
    first = classifier(train, tmp_path, steps=5)
    (file,) = tmp_path.iterdir()
    again = classifier(train, tmp_path, steps=5)
    assert torch.equal(first.features(heldout.tokens), again.features(heldout.tokens))
    file.write_bytes(file.read_bytes()[:100])
    third = classifier(train, tmp_path, steps=5)
    assert torch.equal(first.features(heldout.tokens), third.features(heldout.tokens))
    assert file.stat().st_size > 100


def test_needs_labels() -> None:
    images = data.from_arrays(torch.zeros(4, 2, 2).long().numpy(), num_states=2)
    with pytest.raises(ValueError, match="needs labels"):
        classifier(images)
