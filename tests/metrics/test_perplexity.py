"""Generative perplexity by a causal model of two layers, against the same sums written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from di4c_ext.metrics.perplexity import CausalLM, Perplexity, generative_perplexity, open_causal_lm

EOS = language.SPECIAL["sep"]


def _model(context: int = 24) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=language.S, max_position_embeddings=context, **sizes))
    language.stir(model)
    return model.eval()


@pytest.fixture(scope="module")
def judge() -> CausalLM:
    tokenizer = language.tokenizer()
    tokenizer.eos_token = "[SEP]"
    return CausalLM("tiny", _model(), tokenizer)


def _nats(model: Any, ids: list[int]) -> list[float]:
    """-log p of each token after the first, one sequence at a time."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(log_p[i, token]) for i, token in enumerate(ids[1:])]


def test_ids_are_averaged_sample_by_sample(judge: CausalLM) -> None:
    ids = torch.randint(5, language.S, (5, 9), generator=torch.Generator().manual_seed(1))
    found = generative_perplexity(ids, judge, "ids", batch_size=2)
    means = [sum(_nats(judge.model, row)) / 8 for row in ids.tolist()]
    assert found.value == pytest.approx(math.exp(sum(means) / 5), rel=1e-5)
    assert found.counts.tolist() == [8] * 5


def test_text_is_cut_anew_and_every_token_weighs_the_same(judge: CausalLM) -> None:
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w3 w3 w3 w1"]
    ids = [[5 + int(word[1:]) for word in text.split()] for text in texts]
    nats = [_nats(judge.model, row) for row in ids]
    for batch_size in (1, 2, 16):
        found = generative_perplexity(texts, judge, batch_size=batch_size)
        assert found.counts.tolist() == [6, 1, 3]
        assert found.nats.tolist() == pytest.approx([sum(row) for row in nats], rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(map(sum, nats)) / 10), rel=1e-5)


def test_of_end_tokens_the_first_of_a_chunk_counts(judge: CausalLM) -> None:
    text = "w1 w2 [SEP] w3 [SEP] [SEP] w4"
    ids = [6, 7, EOS, 8, EOS, EOS, 9]
    nats = _nats(judge.model, ids)
    counted = [nats[i - 1] for i in (1, 2, 3, 6)]
    found = generative_perplexity([text], judge)
    assert found.counts.tolist() == [4]
    assert float(found.nats) == pytest.approx(sum(counted), rel=1e-5)


def test_long_text_is_judged_by_chunks_that_know_nothing_of_each_other(judge: CausalLM) -> None:
    words = [f"w{i % 50}" for i in range(53)]  # 24 + 24 + 5
    ids = [5 + i % 50 for i in range(53)]
    wanted = [_nats(judge.model, ids[i : i + 24]) for i in (0, 24, 48)]
    found = generative_perplexity([" ".join(words), "w7"], judge)
    assert found.counts.tolist() == [23 + 23 + 4, 0]
    assert float(found.nats[0]) == pytest.approx(sum(map(sum, wanted)), rel=1e-5)


def test_interval_holds_the_value_and_closes_with_the_samples() -> None:
    g = torch.Generator().manual_seed(0)
    widths = []
    for n in (20, 500):
        nats = 40 + 5 * torch.randn(n, generator=g, dtype=torch.float64)
        found = Perplexity(nats, torch.full((n,), 10), "retokenized")
        low, high = found.interval()
        assert low < found.value < high and (low, high) == found.interval()
        widths.append(high - low)
        if n == 500:  # against the normal law of the mean of the logarithms
            spread = 1.96 * float(nats.std()) / 10 / n**0.5
            assert math.log(high / low) == pytest.approx(2 * spread, rel=0.15)
    assert widths[1] < widths[0] / 3
    with pytest.raises(ValueError, match="level must lie in"):
        found.interval(level=1.0)


def test_what_cannot_be_judged_is_refused(judge: CausalLM) -> None:
    ids = torch.full((2, 4), 6)
    cases: list[tuple[Any, CausalLM, Any, str]] = [
        (["w1 w2"], judge, "gpt2", "protocol must be one of"),
        (ids, judge, "retokenized", "takes texts"),
        (["w1 w2"], judge, "ids", r"takes ids \(N, D\)"),
        (ids + language.S, judge, "ids", "the judge 'tiny' has 61"),
        (ids.repeat(1, 9), judge, "ids", "36 ids a sample, the judge 'tiny' reads 24"),
        (["w1 w2"], CausalLM("bare", judge.model), "retokenized", "has no tokenizer"),
        (["w1", "w2"], judge, "retokenized", "no token that counts"),
        ([], judge, "retokenized", "0 samples"),
    ]
    for samples, model, protocol, message in cases:
        with pytest.raises(ValueError, match=message):
            generative_perplexity(samples, model, protocol)


def test_a_saved_judge_opens(judge: CausalLM, tmp_path: Path) -> None:
    judge.model.save_pretrained(tmp_path / "lm")
    judge.tokenizer.save_pretrained(tmp_path / "lm")
    opened = open_causal_lm(tmp_path / "lm")
    texts = ["w1 w2 w3", "w5 w9"]
    assert generative_perplexity(texts, opened).value == pytest.approx(generative_perplexity(texts, judge).value)
    assert opened.context == 24 and not opened.model.training
    assert open_causal_lm(tmp_path / "lm", "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="--eval_dtype 'half': must be one of float32, bfloat16"):
        open_causal_lm(tmp_path / "lm", "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"--eval_causal_lm '.*nothing': no causal language model that opens"):
        open_causal_lm(tmp_path / "nothing")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        open_causal_lm(tmp_path)
    with pytest.raises(ValueError, match="no causal language model that opens"):
        open_causal_lm(tmp_path / "a.gguf")
