"""A report of text: its words, its samples, perplexity with entropy beside it, on numbers chosen for them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from di4c_ext import generate, report, text, text_sources
from di4c_ext.report import charts
from di4c_ext.report.facts import Facts, doubling, headline, latent_verdict

TEACHER = {1: 900.0, 4: 400.0, 8: 200.0}
STUDENT = {1: 800.0, 4: 190.0, 8: 150.0}
REAL = {"perplexity": 40.0, "ngram_perplexity": 60.0, "entropy": 3.5, "distinct_2": 0.9}


def _facts(student: dict[int, float] = STUDENT, figures: tuple[str, ...] = tuple(REAL), bounds: bool = True) -> Facts:
    cutter = text_sources.cutter_of("characters")
    tokens = torch.tensor(cutter.encode(["the state of the union", "of peace and of plenty"]), dtype=torch.int32)
    blocks = text.TextTokens("sotu", tokens, torch.arange(2), cutter.num_tokens, cutter)
    rows: list[dict[str, Any]] = []
    for model, table in (("teacher", TEACHER), ("student", student)):
        for n, value in table.items():
            known = {
                "perplexity": value,
                "ngram_perplexity": value / 2,
                "entropy": 3.0 + n / 20 + 0.1 * (model == "teacher"),
                "distinct_2": 0.8,
            }
            row = {"model": model, "sampler": "ancestral", "num_steps": n, "seed": 0, "num_samples": 50}
            rows.append(row | {name: known[name] for name in figures})
    results = {
        "rows": rows,
        "grids": {(row["model"], row["num_steps"]): [f"{row['model']} <{row['num_steps']}>"] * 4 for row in rows},
        "floors": {name: REAL[name] for name in figures},
        "sizes": {"train": 900, "heldout": 100},
        "accuracy": None,
        "bounds": {"train": 1.2345, "heldout": 1.3579} if bounds else {},
        "num_bounds": {"train": 900, "heldout": 100},
        "bounds_name": "likelihood bound in nats a token",
        "latents": [
            {"t": 1.0, "num_latents": 8, "num_images": 9, "correlation": 1.5, "information": 2.0, "joint": -9.0}
        ],
    }
    history = [
        {"phase": phase, "step": step, "loss": 1.0, "nats_per_sequence": 60.0, "marginal_data": 0.5, "gain_data": 1.0}
        for phase in ("teacher", "student")
        for step in (1, 2)
    ]
    settings = {"output_dir": "out", "eval_causal_lm": "smollm2", "eval_num_judged": 32}
    return Facts(settings, results, history, "trained in this run", {"teacher": 9.0}, blocks, 1000, 900)


def test_text_is_told_in_words_of_text() -> None:
    facts = _facts()
    page, card, table = report.page(facts), report.model_card(facts), report.summary(facts)
    wanted = "In 4 steps the student's text has a perplexity of 190, its teacher's 400 (entropies 3.20, 3.30 nats)"
    assert headline(facts) == wanted
    for told in (page, card):
        assert wanted in told.replace("&#x27;", "'")
        assert (
            "1.234" in told and "1.358" in told and "by smollm2 in float32, of the text of the first 32 samples" in told
        )
        bare = re.sub(r"<style>.*?</style>", "", told, flags=re.DOTALL)
        assert not re.search(r"\b(image|pixel|classifier|Fréchet)", bare, re.IGNORECASE)
    assert "sotu: sequences of 22 tokens, each one of 27, masked diffusion" in page
    assert "about its tokens" in latent_verdict(facts) and "held-out sequence" in latent_verdict(facts)
    assert re.search(r"student +800 +190 +150\n", table) and "real text 40.0" in table
    assert re.search(r"entropy of a sample's own tokens, nats\nteacher +3\.15 +3\.30 +3\.50\nstudent +3\.05", table)


def test_what_a_perplexity_is_of_is_said() -> None:
    """By each protocol; and of the agreement with real text, where the judge's states were compared."""
    facts = _facts()
    for name, words in (
        ("retokenized", "of the text of the first 32 samples in its own tokens"),
        ("first_chunk", "of the first chunk of the text of the first 32 samples in its own tokens, as MDLM takes it"),
        ("ids", "of the first 32 samples as they were drawn, the mean over them of their means, as SDTT takes it"),
    ):
        facts.settings["eval_protocol"] = name
        assert f"by smollm2 in float32, {words}" in report.model_card(facts)
    assert "agreement" not in report.model_card(facts)
    for row in facts.results["rows"]:
        row["mauve"] = 0.5
    assert "MAUVE-style agreement: of that model's states of these texts" in report.model_card(facts)


def test_samples_stand_side_by_side_as_text() -> None:
    page = report.page(_facts())
    assert page.count("<blockquote>teacher &lt;4&gt;</blockquote>") == 3 == page.count("student &lt;8&gt;<")
    assert "<blockquote>the state of the union</blockquote>" in page and "<img" not in page
    assert page.index("teacher &lt;1&gt;") < page.index("student &lt;1&gt;") < page.index("teacher &lt;4&gt;")


def test_perplexity_stands_beside_entropy_everywhere() -> None:
    facts = _facts()
    page = report.page(facts)
    assert "entropy 3.20, the teacher's 3.30" in page  # on the cards
    assert 'aria-label="perplexity against entropy"' in page and "may only be duller" in page
    assert doubling(facts) == [(4, 190.0, 200.0, 1)]
    assert (
        headline(_facts(TEACHER))
        == "At no number of steps the student's text is clearly less perplexing than its teacher's"
    )
    drawing = charts.frontier([("teacher", 2, 3.0, 90.0), ("student", 2, 3.1, 80.0)], (3.5, 40.0))
    assert "var(--teacher)" in drawing and "real text" in drawing and "hybrid" not in drawing


def test_without_a_causal_model_the_ngrams_speak() -> None:
    facts = _facts(figures=("ngram_perplexity", "entropy", "distinct_2"))
    facts.settings["eval_causal_lm"] = None
    assert "a perplexity of 95.0" in headline(facts)
    assert "Generative perplexity" not in report.page(facts) + report.model_card(facts)


def test_a_second_round_has_no_bound() -> None:
    facts = _facts(bounds=False)
    assert "The teacher is a mixture itself" in report.page(facts) and "no bound was taken" in report.model_card(facts)


def test_the_card_shows_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _facts()
    (code,) = re.findall(r"```python\n(.*?)```", report.model_card(facts), re.DOTALL)
    monkeypatch.setattr(generate, "open_model", lambda folder, is_student: ("student of", folder))
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: facts.images.tokens)
    monkeypatch.setattr(text_sources, "cutter_of", lambda folder: text_sources.Characters())
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["texts"] == ["the state of the union", "of peace and of plenty"]
