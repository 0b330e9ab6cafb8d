"""Masked language models at their random start, with the vocabulary of a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from transformers import set_seed

from di4c_ext.models.from_config import is_family, new_model
from di4c_ext.task import Encoder
from di4c_ext.text_sources import Characters, Tokens
from di4c_ext.text_teachers import new_masked_lm

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def teacher(name: str, cutter: Any, consent: bool = False, seed: int = 0, **overrides: Any) -> Any:
    return new_masked_lm(Encoder(name, {}, seed, overrides), cutter, "linear", consent)


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen2"])
def test_a_family_with_the_tokenizers_own_vocabulary(family: str) -> None:
    sizes = {**SMALL, **({"num_key_value_heads": 2} if family == "qwen2" else {})}
    made = teacher(family, Tokens(language.tokenizer()), **sizes)
    inner = made.config.backbone_config
    assert (inner.vocab_size, inner.pad_token_id) == (language.S, language.SPECIAL["pad"])
    assert (made.config.num_states, made.config.mask_id) == (language.S, language.SPECIAL["mask"])
    assert not made.training and not made.config.is_student
    x = torch.full((2, 7), language.SPECIAL["mask"])
    p = made(x, None).softmax(-1)
    assert p.shape == (2, 7, language.S) and not p[..., [language.SPECIAL["mask"], language.SPECIAL["pad"]]].any()
    again, other = (teacher(family, Tokens(language.tokenizer()), seed=seed, **sizes) for seed in (0, 1))
    assert torch.equal(again(x, None), made(x, None)) and not torch.equal(other(x, None), made(x, None))


def test_characters_get_a_mask_and_a_padding_of_their_own() -> None:
    made = teacher("bert", Characters(), **SMALL)
    inner = made.config.backbone_config
    assert (inner.vocab_size, inner.pad_token_id, made.config.mask_id, made.config.num_states) == (29, 28, 27, 29)
    embeddings = made.get_input_embeddings()
    assert embeddings.weight[0].any(), "the space is a token like all others"
    p = made(torch.full((1, 5), 27), None).softmax(-1)
    assert not p[..., 27:].any() and bool((p[..., :27] > 0).all())


def test_the_config_of_a_folder_or_file_without_its_weights(tmp_path: Path) -> None:
    folder = language.save("bert", tmp_path / "bert")
    set_seed(0)
    trained = teacher(str(folder), Tokens(language.tokenizer()), num_hidden_layers=1)
    assert trained.config.backbone_config.num_hidden_layers == 1 and trained.config.backbone_config.hidden_size == 32
    at_start = trained.get_input_embeddings().weight.std().item()
    assert at_start == pytest.approx(0.02, rel=0.2), "not the weights that lie there"
    file = teacher(str(folder / "config.json"), Tokens(language.tokenizer()), num_hidden_layers=1)
    assert torch.equal(file.get_input_embeddings().weight, trained.get_input_embeddings().weight)


def test_code_of_its_own_wants_consent(tmp_path: Path) -> None:
    folder = str(language.save("llada", tmp_path / "llada"))
    cutter = Tokens(language.tokenizer())
    with pytest.raises(ValueError, match="this config is made of code of its own"):
        teacher(folder, cutter, width=8)
    made = teacher(folder, cutter, consent=True, width=8)
    assert made.get_input_embeddings().weight.shape == (language.S, 8)


def test_what_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bort"}))
    assert is_family("bert") and not is_family("bart-large") and not is_family(str(tmp_path))
    cases: list[tuple[str, Any, dict[str, Any], str]] = [
        ("bert", Characters(), {"num_hidden_layer": 1}, "bert has no setting 'num_hidden_layer'; did you mean"),
        ("bert", Characters(), {"hidden_size": 15, "num_attention_heads": 2}, "no model of this config, 28 tokens"),
        ("vit", Characters(), {}, "is no language model that transformers opens"),
        ("berd", Characters(), {}, r"--config_name berd: no config that opens .*; did you mean 'bert'"),
        (str(tmp_path), Characters(), {}, "no config that opens"),
        ("roberta", Characters(), {**SMALL, "max_position_embeddings": 20}, "give a tokenizer with a padding token"),
    ]
    for name, cutter, overrides, message in cases:
        with pytest.raises(ValueError, match=message):
            new_model(name, overrides, cutter.num_tokens, cutter.mask_id, None, False)
