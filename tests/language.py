"""Masked language models small enough for a test, saved as a user's folder would be: 2 layers, 32 wide, 61 tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
WORDS = [f"w{i}" for i in range(56)]
S = len(SPECIAL) + len(WORDS)
FAMILIES = ("bert", "roberta", "modernbert", "dream", "llada")
_SIZES: dict[str, Any] = {
    "vocab_size": S,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": SPECIAL["pad"],
}

# A model like LLaDA: code of its own, no inputs_embeds, no mask token in its tokenizer, no task head of transformers.
_LLADA = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class TinyLladaConfig(PreTrainedConfig):
    model_type = "tiny_llada"

    def __init__(self, vocab_size=61, width=32, mask_token_id=4, max_sequence_length=24, **kwargs):
        self.vocab_size, self.width = vocab_size, width
        self.mask_token_id, self.max_sequence_length = mask_token_id, max_sequence_length
        super().__init__(**kwargs)


class TinyLlada(PreTrainedModel):
    config_class = TinyLladaConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.width)
        self.layer = nn.TransformerEncoderLayer(config.width, 2, 48, dropout=0.0, batch_first=True)
        self.ff_out = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def get_output_embeddings(self):
        return self.ff_out

    def forward(self, input_ids, attention_mask=None):
        ignored = None if attention_mask is None else attention_mask == 0
        return CausalLMOutput(logits=self.ff_out(self.layer(self.wte(input_ids), src_key_padding_mask=ignored)))
"""


def tokenizer(mask: bool = True) -> PreTrainedTokenizerFast:
    """One word a token; with or without a mask token that it knows to be one."""
    vocabulary = {**{f"[{name.upper()}]": i for name, i in SPECIAL.items()}}
    vocabulary |= {word: len(SPECIAL) + i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {f"{name}_token": f"[{name.upper()}]" for name in SPECIAL if mask or name != "mask"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def save(family: str, folder: Path) -> Path:
    """A model of this family with its tokenizer, all weights away from their start, in `folder`."""
    torch.manual_seed(0)
    if family == "llada":
        return _save_llada(folder)
    model: Any
    if family == "bert":
        model = BertForMaskedLM(BertConfig(**_SIZES))
    elif family == "roberta":
        model = RobertaForMaskedLM(RobertaConfig(**_SIZES))
    elif family == "modernbert":
        ids = {f"{name}_token_id": i for name, i in SPECIAL.items() if name in ("cls", "sep")}
        model = ModernBertForMaskedLM(ModernBertConfig(**_SIZES, **ids, local_attention=8))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, num_key_value_heads=2, mask_token_id=SPECIAL["mask"]))
    stir(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def stir(model: torch.nn.Module) -> None:
    """Moves every parameter away from its start."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def _save_llada(folder: Path) -> Path:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modeling_tiny_llada.py").write_text(_LLADA)
    config_class: Any = get_class_from_dynamic_module("modeling_tiny_llada.TinyLladaConfig", str(folder))
    model_class: Any = get_class_from_dynamic_module("modeling_tiny_llada.TinyLlada", str(folder))
    named = {"AutoConfig": "TinyLladaConfig", "AutoModel": "TinyLlada"}
    model = model_class(config_class(auto_map={name: f"modeling_tiny_llada.{kind}" for name, kind in named.items()}))
    stir(model)
    model.save_pretrained(folder)
    tokenizer(mask=False).save_pretrained(folder)
    return folder
