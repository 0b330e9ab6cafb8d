"""The judge of text: its floors, its figures, and that it tells text from noise and from repetition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from di4c_ext import text
from di4c_ext.metrics import text_judge
from di4c_ext.metrics.perplexity import CausalLM, Perplexity
from di4c_ext.metrics.text_judge import TextJudge

TEXT = "the people of our country and their government have made great progress in peace this year"
WORDS = TEXT.split()
FIGURES = {"ngram_perplexity", "entropy", "pooled_entropy", "distinct_2", "self_bleu"}


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[text.TextTokens, text.TextTokens]:
    g = torch.Generator().manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("text")
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (60,), generator=g).tolist()) for _ in range(80)]
    (folder / "lines.txt").write_text("\n\n".join(lines))
    told = {"length": 32, "tokenizer": "characters", "document_separator": "\n\n", "heldout_fraction": 0.3}
    name = str(folder / "lines.txt")
    return text.load(name, side="train", **told), text.load(name, side="heldout", **told)


def test_floors_are_those_of_real_text(sides: tuple[text.TextTokens, text.TextTokens]) -> None:
    train, heldout = sides
    judge = TextJudge(train, heldout, 40)
    assert judge.floor_size == 40 and judge.sizes == {"train": len(train), "heldout": len(heldout)}
    assert set(judge.floors) == FIGURES
    noise = torch.randint(27, (40, 32), generator=torch.Generator().manual_seed(1))
    dull = train.tokens[:1].repeat(40, 1)
    real, of_noise, of_dull = judge.floors, judge.measure(noise), judge.measure(dull)
    assert of_noise["ngram_perplexity"] > 5 * real["ngram_perplexity"] > 5 > of_dull["ngram_perplexity"]
    assert of_noise["entropy"] > real["entropy"] and of_noise["distinct_2"] > real["distinct_2"]
    assert of_dull["self_bleu"] == pytest.approx(1.0) and of_dull["distinct_2"] < real["distinct_2"] / 2
    assert TextJudge(train, heldout).floor_size == len(heldout)


def test_the_causal_model_reads_the_first_samples_as_text(
    sides: tuple[text.TextTokens, text.TextTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, heldout = sides
    read: list[list[str]] = []

    def judged(texts: list[str], model: CausalLM) -> Perplexity:
        read.append(texts)
        return Perplexity(torch.full((len(texts),), 20.0).double(), torch.full((len(texts),), 10), "retokenized")

    monkeypatch.setattr(text_judge, "generative_perplexity", judged)
    judge = TextJudge(train, heldout, 20, CausalLM("some", None), num_judged=5)
    found = judge.measure(train.tokens[:9])
    assert read[1] == train.text(train.tokens[:5]) and len(read[0]) == 5
    assert set(found) == FIGURES | {"perplexity", "perplexity_low", "perplexity_high"}
    assert found["perplexity"] == pytest.approx(7.389, rel=1e-3) == found["perplexity_low"]


def test_too_little_is_refused(sides: tuple[text.TextTokens, text.TextTokens]) -> None:
    train, heldout = sides
    with pytest.raises(ValueError, match="1 held-out blocks; raise --heldout_fraction"):
        TextJudge(train, heldout.subset(torch.arange(1)))
    with pytest.raises(ValueError, match="--eval_num_judged 0"):
        TextJudge(train, heldout, num_judged=0)
