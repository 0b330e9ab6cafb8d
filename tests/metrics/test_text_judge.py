"""The judge of text: its floors, its figures, and that it tells text from noise and from repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from di4c_ext import random, text
from di4c_ext.metrics import text_judge
from di4c_ext.metrics.likelihood import mean_likelihood_bound
from di4c_ext.metrics.perplexity import CausalLM, Perplexity
from di4c_ext.metrics.text_judge import TextJudge
from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.systems import process_of

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
    read: list[tuple[Any, str]] = []

    def judged(samples: Any, model: CausalLM, protocol: Any, states: bool) -> Perplexity:
        read.append((samples, protocol))
        nats = torch.linspace(15, 25, len(samples)).double()
        return Perplexity(nats, torch.full((len(samples),), 10), protocol)

    monkeypatch.setattr(text_judge, "generative_perplexity", judged)
    judge = TextJudge(train, heldout, 20, CausalLM("some", None), num_judged=5)
    found = judge.measure(train.tokens[:9])
    assert read[1] == (train.text(train.tokens[:5]), "retokenized") and len(read[0][0]) == 5
    assert set(found) == FIGURES | {"perplexity"} and found["perplexity"] == pytest.approx(7.389, rel=1e-3)
    again = judge.measure(train.tokens[:9], num_bootstraps=50, seed=1)
    assert {name: again[name] for name in found} == found
    assert set(again) == {f"{name}{end}" for name in found for end in ("", "_low", "_high")}
    assert again["perplexity_low"] < found["perplexity"] < again["perplexity_high"]
    judge = TextJudge(train, heldout, 20, CausalLM("some", None), num_judged=5, protocol="ids")
    assert torch.equal(read[-1][0], heldout.tokens[random.keys(0, len(heldout)).argsort()[:5]]), "nothing decoded"
    told = {"causal_lm": "some", "protocol": "ids", "num_judged": 5, "ngram_order": 4}
    assert told.items() <= judge.settings.items()


def test_intervals_are_as_wide_as_the_figures_scatter(sides: tuple[text.TextTokens, text.TextTokens]) -> None:
    """Against 60 other sets of samples of one law, for every figure of tokens; and about the figure itself."""
    train, heldout = sides
    judge = TextJudge(train, heldout, 40)
    g = torch.Generator().manual_seed(3)
    law = torch.rand(8, 27, generator=g) ** 3  # a sample is of one of 8 kinds

    def samples() -> torch.Tensor:
        kind = torch.randint(8, (30,), generator=g)
        return torch.multinomial(law[kind], 12, replacement=True, generator=g)

    sets = [samples() for _ in range(60)]
    values = [judge.measure(x) for x in sets]
    measured = [judge.measure(x, num_bootstraps=60, seed=i) for i, x in enumerate(sets[:6])]
    for name in FIGURES:
        scatter = float(torch.tensor([found[name] for found in values]).std())
        width = sum(found[f"{name}_high"] - found[f"{name}_low"] for found in measured) / len(measured)
        assert 0.6 < width / (2 * 1.96 * scatter) < 1.5, (name, width, scatter)
        assert all(found[f"{name}_low"] < found[name] < found[f"{name}_high"] for found in measured)


def test_states_of_a_causal_model_tell_text_from_noise(sides: tuple[text.TextTokens, text.TextTokens]) -> None:
    """Any network's states do, trained or not, where the texts are as different as these."""
    train, heldout = sides
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=27, max_position_embeddings=32, **sizes)).eval()
    judge = TextJudge(train, heldout, 20, CausalLM("tiny", model), num_judged=40, protocol="ids")
    dull = judge.measure(torch.full((40, 32), 3), num_bootstraps=20)
    real = judge.measure(heldout.tokens[:40], num_bootstraps=20)
    assert judge.floors["mauve"] > 0.6 and real["mauve"] > 0.6 and dull["mauve"] < 0.02
    assert 0 <= dull["mauve_low"] <= dull["mauve_high"] <= 1
    assert real["mauve_low"] < real["mauve"] < real["mauve_high"] <= 1


def test_bounds_of_a_model(sides: tuple[text.TextTokens, text.TextTokens]) -> None:
    train, heldout = sides
    network = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "cond_dim": 8, "dropout": 0.0}
    set_seed(0)
    config = DiTConfig(vocab_size=28, mask_id=27, length=32, schedule="log_linear", **network)
    teacher: Any = DiTDenoiser(config).eval()
    student = DiTDenoiser.from_teacher(teacher, latent_form="added", latent_dim=2, latent_hidden_size=8)
    with torch.no_grad():
        for parameter in (*teacher.parameters(), *student.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert TextJudge(train, heldout, 20).of_model(teacher, 4) == {}
    judge = TextJudge(train, heldout, 20, num_bounded=16, num_latents=4)
    x_0 = judge._bounded
    at_once = teacher(torch.full((1, 32), 27), torch.ones(1)).log_softmax(-1)[0].double()
    wanted = -at_once[torch.arange(32), x_0].sum(1).mean().item() / 32
    assert judge.of_model(teacher, 1) == {"nelbo": pytest.approx(wanted, rel=1e-5)}
    for model in (teacher, student):
        found = judge.of_model(model, 20, num_bootstraps=50)
        assert found["nelbo_low"] < found["nelbo"] < found["nelbo_high"] < 1.5 * found["nelbo"]
    limit = mean_likelihood_bound(teacher, process_of(config), x_0, random.keys(9, 16), draws=16) / 32
    many = judge.of_model(teacher, 400, num_bootstraps=100)
    assert many["nelbo_low"] < limit < many["nelbo_high"], "so short that hardly two positions open at once"


def test_too_little_is_refused(sides: tuple[text.TextTokens, text.TextTokens]) -> None:
    train, heldout = sides
    with pytest.raises(ValueError, match="1 held-out blocks; raise --heldout_fraction"):
        TextJudge(train, heldout.subset(torch.arange(1)))
    with pytest.raises(ValueError, match="--eval_num_judged 0"):
        TextJudge(train, heldout, num_judged=0)
    with pytest.raises(ValueError, match="--eval_protocol: protocol must be one of retokenized, first_chunk, ids"):
        TextJudge(train, heldout, protocol="id")  # type: ignore[arg-type]
