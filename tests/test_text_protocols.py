"""`evaluate` of text by each published protocol of perplexity, with a judge small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language
import pytest
from commands import DIT, as_words
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from di4c_ext import checkpoints, evaluate
from di4c_ext.generate import generate
from di4c_ext.metrics.perplexity import generative_perplexity, open_causal_lm
from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.text_sources import Tokens, save_cutter

FIGURES = ("perplexity", "mauve", "ngram_perplexity", "entropy", "pooled_entropy", "distinct_2", "self_bleu", "nelbo")


@pytest.fixture
def told(tmp_path: Path) -> dict[str, Any]:
    """A student and its teacher, untrained, a text of words, and a judge of the same tokens that reads 8 at a time."""
    set_seed(0)
    cutter = Tokens(language.tokenizer())
    teacher: Any = DiTDenoiser(DiTConfig(vocab_size=language.S, mask_id=language.SPECIAL["mask"], length=12, **DIT))
    student = DiTDenoiser.from_teacher(teacher.eval(), latent_form="added", latent_dim=2, latent_hidden_size=8)
    for model, folder in ((student, tmp_path / "run"), (teacher, tmp_path / "run" / "teacher")):
        language.stir(model)
        checkpoints.save_model(model, folder)
        save_cutter(cutter, folder, 12, False)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    judge: Any = LlamaForCausalLM(LlamaConfig(vocab_size=language.S, max_position_embeddings=8, **sizes))
    language.stir(judge)
    judge.save_pretrained(tmp_path / "judge")
    cutter.tokenizer.save_pretrained(tmp_path / "judge")
    (tmp_path / "words.txt").write_text("\n\n".join(" ".join(language.WORDS[i : i + 40]) for i in range(30)))
    named = {"model": tmp_path / "run", "teacher": tmp_path / "run" / "teacher", "dataset_name": tmp_path / "words.txt"}
    named |= {"separator": "\\n\\n", "heldout_fraction": 0.3, "eval_causal_lm": tmp_path / "judge", "eval_seeds": 0}
    return (
        named
        | {"num_steps": 2, "eval_num_samples": 8, "eval_num_judged": 6, "eval_num_bounded": 4}
        | {
            "eval_num_bootstraps": 5,
            "eval_num_turns": 0,
            "eval_num_latents": 4,
        }
    )


@pytest.mark.parametrize("protocol", ["retokenized", "first_chunk"])
def test_rows_say_what_the_protocol_makes_of_the_samples(told: dict[str, Any], protocol: str, tmp_path: Path) -> None:
    output = tmp_path / protocol
    assert evaluate.main(as_words(told | {"eval_protocol": protocol, "output_dir": output})) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert found["judge"]["protocol"] == protocol and found["judge"]["num_judged"] == 6
    judge = open_causal_lm(tmp_path / "judge")
    for row in found["rows"]:
        for figure in FIGURES:
            assert row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"], (row["model"], figure)
        folder = tmp_path / "run" / ("teacher" if row["model"] == "teacher" else "")
        drawn = generate(DiTDenoiser.from_pretrained(folder).eval(), 2, 8, seed=0)[:6]
        texts = [Tokens(judge.tokenizer).decode(sample) for sample in drawn.tolist()]
        wanted = generative_perplexity(texts, judge, protocol)  # type: ignore[arg-type]
        assert row["perplexity"] == pytest.approx(wanted.value, rel=1e-5)
        assert bool((wanted.counts > 7).any()) == (protocol == "retokenized"), "a sample is longer than a chunk"
    assert set(FIGURES) - {"nelbo"} <= set(found["floors"])


def test_ids_want_a_judge_that_reads_a_whole_sample(
    told: dict[str, Any], tmp_path: Path, refused: Callable[..., str]
) -> None:
    message = refused(evaluate.main, *as_words(told | {"eval_protocol": "ids", "output_dir": tmp_path / "ids"}))
    assert "12 ids a sample, the judge" in message and "reads 8" in message
    message = refused(evaluate.main, *as_words(told | {"eval_protocol": "id", "output_dir": tmp_path / "ids"}))
    assert "--eval_protocol: protocol must be one of retokenized, first_chunk, ids, got 'id'" in message
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    assert evaluate.main(as_words(told | {"eval_protocol": "ids", "output_dir": tmp_path / "ids"})) == 0
    rows = json.loads((tmp_path / "ids" / "evaluation.json").read_text())["rows"]
    drawn = generate(DiTDenoiser.from_pretrained(tmp_path / "run").eval(), 2, 8, seed=0)[:6]
    wanted = generative_perplexity(drawn, open_causal_lm(tmp_path / "judge"), "ids").value
    (student,) = [row for row in rows if row["model"] == "student"]
    assert student["perplexity"] == pytest.approx(wanted, rel=1e-5)
