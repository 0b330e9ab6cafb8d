"""The report of an evaluation, on numbers chosen for it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from di4c_ext import data, text, text_sources
from di4c_ext.report import charts, evaluation_card, evaluation_page, evaluation_words
from di4c_ext.report.evaluated import Evaluated, Value, evaluated_json, headline, short, table, title

STUDENT = {1: 20.0, 2: 12.0, 4: 10.0}
TEACHER = {1: 60.0, 2: 40.0, 4: 11.0}


def _row(model: str, n: int, seed: int, value: float, temperature: float, main: str, entropy: str) -> dict[str, Any]:
    about = {"model": model, "sampler": "ancestral", "num_steps": n, "temperature": temperature, "seed": seed}
    value, spread = value * temperature**0.5 + seed, 0.1 * temperature
    figures = {main: value, entropy: 3.0 + n / 10 + temperature + 0.05 * (model == "teacher"), "own_figure": -1.0}
    ends = {f"{main}_low": value - spread, f"{main}_high": value + 3 * spread}
    counted = {"precision": "float32", "num_samples": 1000, "num_evaluations": n, "batch_size": 500}
    taken = {"latency": 0.002 * n + 0.0001 * (model == "student"), "latency_1": 0.5 * n, "seconds": 2.0}
    return {**about, **figures, **ends, **counted, **taken}


def _facts(
    models: tuple[str, ...] = ("teacher", "student"), temperatures: tuple[float, ...] = (1.0,), is_text: bool = False
) -> Evaluated:
    tables = {"teacher": TEACHER, "student": STUDENT}
    main, entropy = ("perplexity", "entropy") if is_text else ("frechet_features", "position_entropy")
    rows = [
        _row(model, n, seed, value, t, main, entropy)
        for seed in (0, 1)
        for t in temperatures
        for model in models
        for n, value in tables[model].items()
    ]
    shown: Any = data.load("digits")
    if is_text:
        cutter = text_sources.cutter_of("characters")
        tokens = torch.tensor(cutter.encode(["the state of the union", "of peace and of plenty"]), dtype=torch.int32)
        shown = text.TextTokens("sotu", tokens, torch.arange(2), cutter.num_tokens, cutter)
    ends = {"total_correlation_low": 1.5, "total_correlation_high": 2.5}
    latents = {"t": 1.0, "num_latents": 16, "num_images": 9, "joint": -80.0, "variation": 0.25, "information": 2.0}
    time = {"num_steps": 1, "num_turns": 20, "teacher": 0.5, "student": 0.505, "goal": 0.02}
    report = {
        "rows": rows,
        "floors": {main: 1.7, entropy: 4.2},
        "sizes": {"train": 1497, "heldout": 300},
        "judge": {"space": "<own>"},
        "latents": [latents | {"correlation": 1.25, "correlation_low": 1.0, "correlation_high": 1.5}],
        "one_step": {"num_latents": 16, "num_samples": 400, "is_exact": False, "total_correlation": 2.0, **ends},
        "overhead": [time | {"batch_size": 500, "overhead": 0.01, "overhead_low": 0.002, "overhead_high": 0.018}],
        "exact": [{"num_steps": 1, "teacher_steps": 64, "teacher": 0.25, "student": 0.125, "same_steps": 0.5}],
        "seconds": 9.0,
        "settings": {"eval_num_bootstraps": 200, "model": "<b>run</b>"},
        "folders": {model: f"runs/{model}" for model in models},
    }
    if models == ("teacher",):
        report |= {"latents": [], "one_step": None, "overhead": [], "exact": []}
    samples = {(row["model"], row["num_steps"]): shown.tokens[:2].long() for row in rows}
    return Evaluated(report, samples, shown, {model: 1000 for model in models})


def test_values_are_means_over_seeds_with_their_intervals() -> None:
    facts = _facts(temperatures=(1.0, 4.0))
    assert facts.value("student", 2, "frechet_features") == Value(
        12.5, pytest.approx(12.4), pytest.approx(12.8), [12, 13]
    )
    assert facts.value("student", 2, "frechet_features", 4.0) == Value(
        24.5, pytest.approx(24.1), pytest.approx(25.7), [24, 25]
    )
    assert facts.value("student", 8, "frechet_features") is None and facts.value("guided", 2, "own_figure") is None
    entropy = facts.measured("teacher", 1, "position_entropy")
    assert entropy.low is None and entropy.interval == "" and str(entropy) == "4.15"
    assert facts.figures == ["frechet_features", "position_entropy", "own_figure"], "no ends, no times, no counts"
    assert (facts.main_figure, facts.diversity) == ("frechet_features", "position_entropy")
    with pytest.raises(ValueError, match="no own_figure of the teacher at 8 steps"):
        facts.measured("teacher", 8, "own_figure")


def test_an_interval_of_some_seeds_alone_is_none() -> None:
    facts = _facts()
    del facts.report["rows"][0]["frechet_features_low"]
    assert facts.measured("teacher", 1, "frechet_features").interval == ""


def test_sentences_follow_from_the_numbers() -> None:
    facts = _facts()
    # By shares of the teacher's figure: 2/3 at 1 step, 28/40 at 2 steps.
    assert headline(facts) == (
        "Fréchet distance, classifier features in 2 steps: student 12.5 (12.4 to 12.8), "
        "teacher 40.5 (40.4 to 40.8); real images 1.70"
    )
    told = evaluation_words.protocol(facts)
    for piece in ("1,000 samples", "seeds 0, 1", "sampler ancestral", "float32", "batches of 500", "of 200 sets"):
        assert piece in told
    (row,) = facts.report["overhead"]
    assert "+1.0% (+0.2% to +1.8%, 20 turns in one process), within the goal of at most 2%" in (
        evaluation_words.overhead(row)
    )
    assert "above the goal" in evaluation_words.overhead(row | {"overhead_low": 0.03, "overhead_high": 0.04})
    assert "not told apart by this timing from the goal" in evaluation_words.overhead(row | {"overhead_high": 0.04})
    assert "owe one another 2.00 nats (1.50 to 2.50)" in evaluation_words.latents(facts)
    assert "latents carry correlation" in evaluation_words.latents(facts)
    facts.report["one_step"]["total_correlation"] = facts.report["latents"][0]["correlation"] = 0.05
    assert "latents hardly carry correlation" in evaluation_words.latents(facts)
    assert evaluation_words.milliseconds(0.0123) == "12.3 ms" and evaluation_words.milliseconds(1.5) == "1.50 s"
    assert title("entropy") == "Entropy of a sample's own tokens (nats)" and title("own_figure") == "own figure"
    assert [short(name) for name in ("frechet_pixels", "kid", "recall_k", "nelbo")] == [
        "Fréchet distance",
        "Kernel distance",
        "Recall",
        "Negative log-likelihood",
    ]


def test_page_card_and_json_say_the_same() -> None:
    facts = _facts()
    page, card = evaluation_page.page(facts), evaluation_card.card(facts)
    for told in (page, card):
        assert headline(facts) in told and evaluation_words.protocol(facts) in told
        assert evaluation_words.overhead(facts.report["overhead"][0]) in told
    assert page == evaluation_page.page(facts), "nothing in it depends on when it was written"
    assert "<b>run" not in page and "&lt;b&gt;run" in page and "&lt;own&gt;" in page
    assert page.count("<svg") == 2 * 2, "each figure but the entropy, against evaluations and against time"
    assert page.count("<figure><img") == 2 * 3 and "milliseconds a sample" in page and "At equal entropy" not in page
    assert "12.5<small>12.4 to 12.8</small><small>entropy 4.20</small>" in page
    assert "<td>1.250<small>1.000 to 1.500</small></td>" in page and "0.1250" in page
    assert "| real | | | | | 4.20 | 1.70 |  |" in card
    assert "| student | 2 | 2 | 4.10 ms | 1.00 s | 4.20 | 12.5 (12.4 to 12.8) | -1.00 |" in card
    known = json.loads(evaluated_json(facts))
    assert known["rows"] == facts.rows and known["matched"] == [] and "torch" in known["environment"]
    assert known["one_step"]["total_correlation"] == 2.0 and known["parameters"] == {"teacher": 1000, "student": 1000}
    assert re.search(r"student +20\.5 +12\.5 +10\.5\n", table(facts)) and "real 4.20" in table(facts)


def test_one_model_alone() -> None:
    facts = _facts(models=("teacher",))
    page, card = evaluation_page.page(facts), evaluation_card.card(facts)
    assert headline(facts).startswith("Fréchet distance, classifier features in 4 steps: teacher 11.5 (11.4 to 11.8);")
    for told in (page, card):
        assert "latents" not in told.lower().replace("hybrid", "") and "exact" not in told.lower()
    assert 'href="#latents"' not in page and "repeat(1, 1fr)" in page


def test_models_are_held_together_at_equal_entropy() -> None:
    facts = _facts(temperatures=(0.81, 1.0, 1.21))
    matched = facts.matched()
    assert {(row["student_steps"], row["teacher_steps"]) for row in matched} == {(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)}
    own = matched[0]
    assert (own["entropy"], own["student"]) == (pytest.approx(4.1), 20.5), "at the evaluation's own temperature"
    # The teacher's entropy is 0.05 above at every temperature: 4.1 lies 0.14 of 0.19 from 0.81 to 1.
    low, high = 60 * 0.9 + 0.5, 60.5
    assert own["teacher"] == pytest.approx(low * (high / low) ** (0.14 / 0.19))
    assert len([row for row in matched if (row["student_steps"], row["teacher_steps"]) == (1, 1)]) == 1 + 3
    page = evaluation_page.page(facts)
    assert "At equal entropy" in page and "0.81, 1, 1.21" in page and page.count("<svg") == 5
    assert [row["is_own"] for row in matched[:4]] == [True, False, False, False]
    card = evaluation_card.card(facts)
    assert "| 1 | 1 | 4.100 | 20.5 |" in card and card.count("\n| 1 | 1 |") == 1, "at its own temperature alone"
    far = _facts(temperatures=(1.0, 1.1))
    for row in far.report["rows"]:
        if row["model"] == "teacher":
            row["position_entropy"] += 9
    assert all(row["teacher"] is None for row in far.matched()) and "outside its entropies" in evaluation_page.page(far)


def test_text_is_told_in_words_of_text() -> None:
    page = evaluation_page.page(_facts(is_text=True, temperatures=(0.5, 1.0)))
    assert page.count("<blockquote>the state of the union</blockquote>") == 1 + 2 * 3 and "<img" not in page
    assert "Generative perplexity in 2 steps: student 12.5" in page and "real text 1.70" in page
    bare = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(images|pixel|classifier)", bare.split("<h2>The same again")[0])


def test_a_bound_that_hangs_on_no_sample_is_not_what_is_compared() -> None:
    facts = _facts(is_text=True, temperatures=(0.5, 1.0))
    for row in facts.report["rows"]:
        row["ngram_perplexity"] = row.pop("perplexity")
        if row["temperature"] == 1:
            row["nelbo"] = 3.0
    assert facts.main_figure == "ngram_perplexity" and facts.matched() and "nelbo" in facts.figures
    assert "Negative log-likelihood of what so many steps make" in evaluation_page.page(facts)


def test_rows_of_some_cells_alone() -> None:
    """An evaluation that was asked for more of one model has holes."""
    facts = _facts()
    facts.report["rows"] = [row for row in facts.report["rows"] if (row["model"], row["num_steps"]) != ("teacher", 2)]
    facts.samples = {cell: samples for cell, samples in facts.samples.items() if cell != ("teacher", 2)}
    page = evaluation_page.page(facts)
    assert "in 1 step: student 20.5" in headline(facts) and page.count("<figure><img") == 5
    assert re.search(r"teacher +60\.5 +11\.5\n", table(facts)) and "| teacher | 2 |" not in evaluation_card.card(facts)


def test_panels_share_their_axis_and_take_colours_from_the_page() -> None:
    upper = {"teacher": [(1.0, -2.0, (-3.0, -1.0), [-2.0])], "student": [(2.0, 5.0, None, [4.0, 6.0])]}
    drawing = charts.two_panels(upper, upper, "distance", "evaluations", (1.0, None), "real", log=False)
    assert drawing.startswith('<svg role="img" aria-label="distance against evaluations"')
    for name in ("--teacher", "--student", "--muted"):
        assert f"var({name})" in drawing
    assert not re.search(r"#0([1-9a-b])0\1", drawing)
    lines = [("teacher", 4, [(3.0, 10.0), (3.5, 20.0)]), ("teacher", 8, [(3.1, 9.0), (3.6, 18.0)])]
    drawing = charts.temperature_lines(lines, (4.0, 5.0), "perplexity")
    assert drawing.count(">teacher<") == 1 and ">8<" in drawing
