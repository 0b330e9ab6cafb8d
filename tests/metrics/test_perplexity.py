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


def test_the_first_chunk_alone_as_published(judge: CausalLM) -> None:
    words = [f"w{i % 50}" for i in range(53)]  # 24 + 24 + 5
    found = generative_perplexity([" ".join(words), "w7 w8"], judge, "first_chunk")
    assert found.counts.tolist() == [23, 1]
    wanted = [sum(_nats(judge.model, ids)) for ids in ([5 + i for i in range(24)], [12, 13])]
    assert found.nats.tolist() == pytest.approx(wanted, rel=1e-5)
    short = ["w1 w2 w3", "w9 [SEP] w8 [SEP]"]  # which fit: as by the other
    both = [generative_perplexity(short, judge, protocol) for protocol in ("first_chunk", "retokenized")]
    assert torch.equal(both[0].nats, both[1].nats) and both[0].value == both[1].value


def test_a_part_of_the_samples_weighs_as_the_protocol_says() -> None:
    nats, counts = torch.tensor([10.0, 30.0, 12.0]).double(), torch.tensor([10, 10, 2])
    chosen = torch.tensor([0, 2, 2])
    assert Perplexity(nats, counts, "first_chunk").of(chosen) == pytest.approx(math.exp(34 / 14))
    assert Perplexity(nats, counts, "ids").of(chosen) == pytest.approx(math.exp((1 + 6 + 6) / 3))


def test_states_are_those_of_the_last_token_of_the_first_chunk(judge: CausalLM) -> None:
    texts = [" ".join(f"w{i % 50}" for i in range(30)), "w7", "", "w9 w8 w3"]
    found = generative_perplexity(texts, judge, batch_size=2, states=True)
    ids = [[5 + i for i in range(24)], [12], None, [14, 13, 8]]
    assert found.states is not None and found.states.shape == (4, 16) and not found.states[2].any()
    for row, own in zip(found.states, ids, strict=True):
        if own is not None:
            with torch.no_grad():
                wanted = judge.model.model(input_ids=torch.tensor([own])).last_hidden_state[0, -1]
            assert torch.allclose(row, wanted, atol=1e-5)
    assert found.counts.tolist() == [23 + 5, 0, 0, 2] and generative_perplexity(texts, judge).states is None
    assert not judge.model.get_output_embeddings()._forward_pre_hooks


def test_what_cannot_be_judged_is_refused(judge: CausalLM) -> None:
    ids = torch.full((2, 4), 6)
    cases: list[tuple[Any, CausalLM, Any, str]] = [
        (["w1 w2"], judge, "gpt2", "protocol must be one of retokenized, first_chunk, ids, got 'gpt2'"),
        (ids, judge, "retokenized", "takes texts"),
        (ids, judge, "first_chunk", "takes texts"),
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
