"""A feature space named by the user: a tiny image classifier of transformers, saved as anyone would."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from di4c_ext import data
from di4c_ext.metrics.extractor import Extractor
from di4c_ext.metrics.judge import Judge


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("networks") / "resnet"
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder)
    told = {"size": {"shortest_edge": 24}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def colours(layout: str) -> data.ImageTokens:
    return data.from_arrays(np.random.default_rng(0).integers(0, 8, (130, 24, 24, 3)), num_states=8, layout=layout)


def test_is_the_network_on_normalised_images(network: Path) -> None:
    from transformers import ResNetForImageClassification

    images = colours("CHW")
    seen = Extractor(str(network), images).seen(images.tokens)
    model = ResNetForImageClassification.from_pretrained(network).eval()
    pixels = images.images().permute(0, 3, 1, 2).float() / 7
    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.5]))
    with torch.no_grad():
        out = model((pixels - mean) / std, output_hidden_states=True)
    torch.testing.assert_close(seen.probabilities, out.logits.softmax(-1))
    torch.testing.assert_close(seen.features, out.hidden_states[-1].mean((2, 3)))
    again = Extractor(str(network), colours("HWC")).seen(colours("HWC").tokens)
    torch.testing.assert_close(again.features, seen.features)


def test_grey_images_of_another_size(network: Path) -> None:
    grey = data.from_arrays(np.random.default_rng(0).integers(0, 8, (5, 8, 8)), num_states=8)
    extractor = Extractor(str(network), grey)
    assert extractor.pixels(grey.tokens).shape == (5, 3, 8, 8)
    seen, colours = extractor.seen(grey.tokens), grey.images()[..., None].expand(-1, -1, -1, 3).numpy()
    again = data.from_arrays(colours, num_states=8)
    assert seen.features.shape == (5, 8)
    torch.testing.assert_close(Extractor(str(network), again).seen(again.tokens).features, seen.features)


def test_takes_the_place_of_the_labels_own(network: Path) -> None:
    train, heldout = data.split(data.load("digits"), 1 / 6)
    train, heldout = train.subset(torch.arange(60)), heldout.subset(torch.arange(40))
    judge = Judge(train, heldout, None, 20, str(network))
    assert judge.accuracy is None and "extractor_score" in judge.floors and "label_score" not in judge.floors
    assert judge.measure(train.tokens)["frechet_features"] > 0


def test_refuses_what_is_no_classifier(network: Path, tmp_path: Path) -> None:
    images = colours("CHW")
    with pytest.raises(ValueError, match=r"--eval_feature_extractor .*: no image classifier of transformers"):
        Extractor(str(tmp_path), images)
    (tmp_path / "config.json").write_text((network / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is not opened
    with pytest.raises(ValueError, match="safetensors"):
        Extractor(str(tmp_path), images)
