"""The recipe python/language.py: its promise at matched entropy, tables, samples, picture, and the whole in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIT
from programs import program

from di4c_ext import arguments
from di4c_ext.distill import StudentConfig, TeacherArguments
from di4c_ext.evaluate import EvaluationArguments
from di4c_ext.metrics import text_judge
from di4c_ext.metrics.perplexity import CausalLM, Perplexity
from di4c_ext.stages import StageArguments
from di4c_ext.text_arguments import TextArguments

language = program("language")
SMALL = language.SCALES["small"]


def measured(student: float = 100.0, entropy: float = 3.5) -> dict[str, Any]:
    """A teacher whose perplexity is 200 at 2k steps, halved by a tenth of a nat; students of one point each."""
    rows = []

    def add(model: str, n: int, temperature: float, perplexity: float, own: float) -> None:
        others = dict.fromkeys(("ngram_perplexity", "pooled_entropy", "distinct_2", "self_bleu"), 0.5)
        row = {"model": model, "num_steps": n, "temperature": temperature, "seed": 0, "num_samples": 1000}
        rows.append(row | {"perplexity": perplexity, "entropy": own} | others)

    for n in SMALL.steps:
        add("teacher", n, 1.0, 200.0, 3.6)
        add("student", n, 1.0, student, entropy)
        add("second", n, 1.0, 90.0, 3.5)
    for n in (8, 16, 32):
        add("teacher", n, 0.9, 100.0, 3.5)
        add("teacher", n, 1.1, 400.0, 3.7)
        add("apart", n, 1.0, 123.0, 3.52)
    return {
        "rows": rows,
        "floors": {"perplexity": 40.0, "entropy": 3.8, **dict.fromkeys(list(language.FIGURES)[2:], 0.25)},
        "bounds": {"train": 4.25, "heldout": 4.5},
        "bounds_name": "likelihood bound in nats a token",
        "seconds": {"teacher": 1200.0, "student": 900.0, "evaluation": 60.0},
        "judged": 128,
        "told": {name: {"1": 400.0, "8": 280.5} for name in ("teacher", "apart", "student", "second")},
        "samples": {m: {str(n): [f"{m} at {n}\nsteps"] for n in SMALL.steps} for m in language.MODELS},
    }


@pytest.mark.parametrize(
    ("perplexity", "entropy", "kept"),
    [
        (100.0, 3.5, True),
        (100.1, 3.5, False),
        (141.0, 3.55, True),  # half way between 100 and 200 in the logarithm
        (142.0, 3.55, False),
        (50.0, 3.4, False),  # of less entropy than the teacher was seen at
        (400.0, 3.8, True),  # more entropy and no more perplexity
    ],
)
def test_the_promise_is_one_at_the_students_entropy(perplexity: float, entropy: float, kept: bool) -> None:
    found = language.promises(measured(perplexity, entropy), SMALL.promised)
    assert list(found.values()) == [kept] * 3 and "student at 4 <= teacher at 8 of its entropy" in found


def test_report_says_what_was_measured() -> None:
    text = language.report(SMALL, {0: measured(), 3: measured(141.0, 3.55)}, "smollm2")
    assert "perplexity is that of `smollm2`, in bfloat16, on the text of the first 128" in text
    assert "Generative perplexity; real text: 40" in text
    assert "| 0 | teacher |" + " 200 |" * 7 in text and "| 3 | student (Di4C) |" + " 141 |" * 7 in text
    assert "| 3 | student (Di4C) | 8 | 141 | 3.550 | 141.4 |" in text
    assert "| 0 | second round (Di4C²) | 16 | 90 | 3.500 | 100 |" in text
    assert text.count("| yes |") == 6 and "4.250 on training text and 4.500 on held-out" in text
    assert "| 3 | 8 | 141 | 3.550 | 123 | 3.520 |" in text and text.count("The chain's part alone") == 1
    assert "| 3 | student, each position apart | 400.0 | 280.5 |" in text and text.count("Likelihood of few steps") == 1
    assert "outside its entropies" in language.report(SMALL, {0: measured(50.0, 3.4)}, "smollm2")


def test_samples_are_quoted_on_one_line_each(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = language.samples_page(SMALL, measured(), 0)
    assert text.count("\n> student at 4 steps\n") == 1 and text.index("## 1 step\n") < text.index("## 64 steps")
    language.picture(SMALL, {0: measured()}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 20_000


def _settings(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What di4c_ext.distill would make of the flags of the one seed that argv asks for."""
    monkeypatch.chdir(tmp_path)
    args, flags = language.parsed(argv)
    scale, (seed,) = language.SCALES[args.scale], args.seeds
    output = args.runs / f"seed-{seed}"
    types = [arguments.DataArguments, TextArguments, TeacherArguments, StudentConfig, EvaluationArguments]
    words = ["--output_dir", str(output), *language.flags_of(scale, seed, output, args, flags)]
    made, _ = arguments.parse("distill", [*types, StageArguments], words, default_preset="digits")
    return list(made)


def test_small_scale_as_distill_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, text, teacher, student, evaluation, stages = _settings(
        ["--seeds", "4", "--max_steps", "7", "--use_cpu"], tmp_path, monkeypatch
    )
    assert (images.modality, images.dataset_name, text.block_size) == ("text", "sotu", 64)
    assert text.tokenizer_name == "runs/language-seeds/pieces"
    assert (teacher.teacher_seed, student.seed, student.max_steps) == (4, 4, 7)
    assert evaluation.eval_num_steps == [1, 2, 4, 8, 16, 32, 64] and evaluation.eval_causal_lm == "smollm2"
    assert stages.stages == ["di4c", "di4c2"] and stages.stage_config == SMALL.stages
    assert student.objective().num_steps == (1, 2, 4, 4, 8, 8, 16, 16)


def test_published_scale_as_distill_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["--scale", "paper", "--teacher_model_name_or_path", "sdtt", "--use_cpu"]
    images, text, _, student, evaluation, _ = _settings(argv, tmp_path, monkeypatch)
    assert (images.dataset_name, text.tokenizer_name, text.block_size) == ("Skylion007/openwebtext", "gpt2", 1024)
    objective = student.objective()
    assert objective == type(objective).preset("language"), "as published"
    assert (evaluation.eval_causal_lm, evaluation.eval_num_judged) == ("gpt2-large", 1024)
    scale = language.SCALES["paper"]
    assert {2 * k for k in scale.promised} | set(scale.promised) <= set(scale.steps)


def test_the_whole_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs and writes what it promises, and goes on where it stopped; nothing is learned."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text("The state of the union is strong, and so it shall be. " * (5 + i))
    monkeypatch.setattr("di4c_ext.text_sources.sotu", lambda: [(tmp_path / "text" / "0.txt").read_text()])
    read: list[int] = []

    def judged(texts: list[str], judge: CausalLM, protocol: str, states: bool) -> Perplexity:
        read.append(len(texts))
        lengths = torch.tensor([len(text) for text in texts])
        return Perplexity(lengths.double() * 3, lengths, "retokenized")

    monkeypatch.setattr(text_judge, "generative_perplexity", judged)
    monkeypatch.setattr("di4c_ext.text_task.open_causal_lm", lambda name, dtype: CausalLM(name, None))
    argv = ["--runs", tmp_path / "runs", "--results", tmp_path / "results", "--num_samples", 5, "--num_judged", 2]
    argv += ["--seeds", 1, "--dataset_name", tmp_path / "text", "--heldout_fraction", 0.3, "--block_size", 16]
    argv += ["--use_cpu", "--disable_tqdm", "true", "--teacher_max_steps", 2, "--max_steps", 2, "--num_latents", 2]
    argv += ["--teacher_per_device_train_batch_size", 4, "--per_device_train_batch_size", 2, "--num_targets", 2]
    argv += ["--teacher_model_config", json.dumps(DIT), "--second_steps", 2]
    words = [str(word) for word in argv]
    assert language.main(words) in (0, 1)
    results, run = tmp_path / "results", tmp_path / "runs" / "seed-1"
    names = ["language-samples.md", "language.json", "language.md", "language.png"]
    assert sorted(file.name for file in results.iterdir()) == names
    assert "Preset `language_small`" in (results / "language.md").read_text()
    assert plt.imread(results / "language.png").shape[:2] == (484, 1540)
    more = [json.loads(row) for row in (run / "more.jsonl").read_text().splitlines()]
    assert len(more) == 7 + 2 * 3 + 3 and {row["temperature"] for row in more} == {1.0, *language.TEMPERATURES}
    assert len(read) == 1 + 14 + 1 + len(more) and set(read) == {2}
    kept = json.loads((results / "language.json").read_text())["1"]
    assert {row["model"] for row in kept["rows"]} == {*language.MODELS, language.APART}
    more = [row for row in more if row["model"] != language.APART]
    (run / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more[:-1]))
    assert kept["told"]["apart"]["1"] > 0 and list(kept["told"]["second"]) == ["1", "2", "4", "8", "16"]
    made = language.Run(run, SMALL.steps, SMALL.promised)
    known = language.measure(made, json.loads((run / "evaluation.json").read_text()))["rows"]
    assert [row for row in known if row["model"] == "teacher"][-1]["entropy"] == more[-1]["entropy"]
