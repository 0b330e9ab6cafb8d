"""The image-token transformer refuses what does not fit it, and names it."""

from __future__ import annotations

import pytest
import torch
from token_models import SMALL, codes, tokens_by_formula
from torch import Tensor

from di4c_ext.models import TokenConfig, TokenDenoiser

B = 3


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (None, r"a student needs latents .* law=config\.latent_law"),
        (torch.zeros(B, 2), "latents must be"),
        (torch.zeros(B + 1, 1), "latents must be"),
        (torch.zeros(B), "latents must be"),
    ],
)
def test_latents_that_do_not_fit(labels, latents, message):
    student = tokens_by_formula(is_student=True)
    with pytest.raises(ValueError, match=message):
        student(codes(B, student.config), latents=latents, labels=labels)


def test_codes_that_do_not_fit(labels):
    model = tokens_by_formula()
    x_t = codes(B, model.config)
    with pytest.raises(ValueError, match=r"x_t must be .* D = 12, a grid of 3 x 4 tokens, got \(3, 16\)"):
        model(torch.zeros(B, 16, dtype=torch.int64), labels=labels)
    with pytest.raises(ValueError, match=r"x_t must be .*, got \(3, 3, 4, 1\)"):
        model(x_t.view(B, 3, 4, 1), labels=labels)
    with pytest.raises(TypeError, match=r"x_t must be integers, got torch.float32"):
        model(x_t.float(), labels=labels)
    for wrong in (13, 16, -1):  # above the mask lie the rows of the classes
        spoilt = x_t.clone()
        spoilt[1, 5] = wrong
        with pytest.raises(ValueError, match=rf"x_t must be codes 0\.\.11 or the mask 12, got {wrong}"):
            model(spoilt, labels=labels)


def test_labels_that_do_not_fit(labels):
    model = tokens_by_formula()
    x_t = codes(B, model.config)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"labels must be classes 0\.\.2, got {wrong}"):
            model(x_t, labels=torch.tensor([0, wrong, 1]))
    with pytest.raises(ValueError, match=r"labels \(B,\) are wanted, one of 3 classes .* drop_label=True"):
        model(x_t)
    with pytest.raises(ValueError, match=r"labels must be \(B,\) with B = 3, got \(2,\)"):
        model(x_t, labels=labels[:2])
    with pytest.raises(TypeError, match=r"labels must be integers, got torch.float32"):
        model(x_t, labels=labels.float())
    with pytest.raises(TypeError, match=r"labels must be a tensor of integers, got 2"):
        model(x_t, labels=2)
    for drop in (labels, torch.ones(2, dtype=torch.bool), "all"):
        with pytest.raises(ValueError, match=r"drop_label must be None, a bool or bools \(B,\) with B = 3, got"):
            model(x_t, labels=labels, drop_label=drop)


def test_a_grid_that_is_not_that_of_the_positions(tmp_path):
    tokens_by_formula().save_pretrained(tmp_path)
    config = TokenConfig.from_pretrained(tmp_path, grid=[4, 4])
    with pytest.raises(ValueError, match=r"net\.pos_emb is \(1, 13, 16\), \(1, 17, 16\) is wanted"):
        TokenDenoiser.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codes": 0}, "num_codes must be an integer of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"grid": [4, 4, 4]}, "grid"),
        ({"grid": 0}, "grid must be an integer of at least 1"),
        ({"num_heads": 3}, "num_heads must divide hidden_size 16, got 3"),
        ({"mlp_size": 2.5}, "mlp_size"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"embedding_std": 0.0}, "embedding_std"),
        ({"schedule": "arcos"}, "schedule must be one of .* got 'arcos'; did you mean 'arccos'"),
        ({"latent_form": "extra"}, "latent_form must be one of token, added, got 'extra'"),
        ({"latent_law": "gaussian"}, "latent_law"),
        ({"latent_dim": 2}, "one token, as published, is one number; got latent_dim 2"),
        ({"latent_embed_dim": 7}, "latent_embed_dim"),
        ({"latent_scale": float("inf")}, "latent_scale"),
        ({"latent_gate": -1.0}, "latent_gate"),
    ],
)
def test_config_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TokenConfig(**SMALL | settings)
