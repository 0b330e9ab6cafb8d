"""The commands on text: the whole way in small, what lies in the folders, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from commands import DIT, as_words
from safetensors.torch import save_file
from transformers import BertModel

from di4c_ext import distill, evaluate, pretrain, sample
from di4c_ext.callbacks import read_metrics
from di4c_ext.generate import generate, open_model
from di4c_ext.models import Di4CForMaskedLM, DiTDenoiser
from di4c_ext.text_sources import Characters, cutter_of, told_beside

FEW_STEP = ("few_step_data", "few_step_consistency", "distillation")
STORY = "the cat sat on the mat and the dog ran to the man who had a hat "


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DI4C_CACHE", str(cache))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "story.txt"
    file.write_text("\n\n".join(STORY * (2 + i % 3) for i in range(40)))
    return file


def _data(story: Path, **more: Any) -> dict[str, Any]:
    told = {"modality": "text", "dataset_name": story, "separator": "\\n\\n", "heldout_fraction": 0.3}
    return told | {"tokenizer_name": "characters", "block_size": 12} | more


_QUICK = {"use_cpu": "true", "disable_tqdm": "true", "logging_steps": 1}


def _teaching(story: Path, output: Path, **more: Any) -> list[str]:
    own = {"output_dir": output, "max_steps": 4, "per_device_train_batch_size": 8, "model_config": DIT, "seed": 0}
    return as_words(_data(story) | own | _QUICK | more)


def _distilling(story: Path, output: Path, **more: Any) -> list[str]:
    own = {
        "output_dir": output,
        "teacher_max_steps": 25,
        "teacher_per_device_train_batch_size": 8,
        "teacher_model_config": DIT,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "num_latents": 3,
        "num_targets": 2,
        "few_step_counts": 0,
        "student_model_config": {"latent_form": "added", "latent_dim": 2, "latent_hidden_size": 8},
        "eval_num_steps": [1, 3],
        "eval_num_samples": 6,
        "eval_seeds": 0,
    }
    return as_words(_data(story) | own | _QUICK | more)


@pytest.fixture(scope="module")
def finished(story: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose teacher was trained in it; tests read it and leave it as it is."""
    output = tmp_path_factory.mktemp("runs") / "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI4C_CACHE", str(cache))
        assert distill.main(_distilling(story, output)) == 0
    return output


def test_a_run_holds_all_that_is_needed(finished: Path) -> None:
    student, teacher = (open_model(finished / place) for place in ("", "teacher"))
    assert isinstance(student, DiTDenoiser) and student.config.is_student and not teacher.config.is_student
    assert (student.config.num_states, student.config.mask_id, student.config.length) == (27, 27, 12)
    for folder in (finished, finished / "teacher"):
        assert told_beside(folder) == {"tokenizer_name": "characters", "block_size": 12, "wrap": False}
        assert isinstance(cutter_of(folder), Characters)
    assert "cutter_of" in (finished / "README.md").read_text() and "<html" in (finished / "report.html").read_text()
    measured = json.loads((finished / "evaluation.json").read_text())
    assert {(row["model"], row["num_steps"]) for row in measured["rows"]} == {
        (model, n) for model in ("teacher", "student") for n in (1, 3)
    }
    assert all(row["num_samples"] == 6 and row["entropy"] > 0 for row in measured["rows"])
    assert 2 < measured["bounds"]["train"] < math.log(27), "25 steps teach little, but no less than nothing"
    assert measured["perplexity_bound"]["train"] == pytest.approx(
        torch.tensor(measured["bounds"]["train"]).exp().item()
    )
    texts = (finished / "samples" / "student-003steps.txt").read_text().rstrip("\n").split("\n\n")
    assert len(texts) == 6 and {len(text) for text in texts} == {12}
    lines = read_metrics(finished / "teacher" / "metrics.jsonl")
    assert lines[0]["nats_per_sequence"] == pytest.approx(12 * lines[0]["loss"], rel=1e-4)


def test_a_streamed_run_that_is_resumed_is_the_one_that_never_stopped(
    finished: Path, story: Path, tmp_path: Path
) -> None:
    output, weights = tmp_path / "run", tmp_path / "run" / "model.safetensors"
    more = {"teacher_model_name_or_path": finished / "teacher", "eval_num_steps": 1, "streaming": "true"}
    assert distill.main(_distilling(story, output, **more)) == 0
    wanted = weights.read_bytes()
    shutil.rmtree(output / "checkpoint-4")
    weights.unlink()
    assert distill.main(["--resume", "--output_dir", str(output)]) == 0
    assert weights.read_bytes() == wanted
    assert not (output / "teacher").exists(), "the teacher was named, it stays where it is"


def test_a_teacher_alone_and_again_from_the_cache(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _teaching(story, tmp_path / "teacher", seed=5)
    assert pretrain.main(told) == 0
    shown = capsys.readouterr().out
    assert "likelihood bound in nats a token: " in shown and "perplexity of a token, heldout: at most 2" in shown
    assert told_beside(tmp_path / "teacher")["block_size"] == 12
    card = (tmp_path / "teacher" / "README.md").read_text()
    assert "# A teacher of story" in card and "(`DiTDenoiser`) for `AbsorbingProcess(" in card
    assert "4 steps on batches of 8 sequences" in card and "Likelihood bound in nats a token: " in card
    weights = tmp_path / "teacher" / "model.safetensors"
    wanted = weights.read_bytes()
    weights.unlink()
    assert pretrain.main(["--resume", "--output_dir", str(tmp_path / "teacher")]) == 0  # of text, as it was told
    assert weights.read_bytes() == wanted

    job = distill.Run(_distilling(story, tmp_path / "run", teacher_seed=5, teacher_max_steps=4))
    cached = job.task.cached_teacher(job.teacher_args.config(job.args))
    assert (cached / "model.safetensors").read_bytes() == wanted
    assert isinstance(cutter_of(cached), Characters)


def test_sample(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stem = tmp_path / "three.steps"
    words = {"model": finished, "num_steps": 3, "num_samples": 5, "output": stem}
    assert sample.main(as_words(words)) == 0
    shown = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "three.steps.jsonl").read_text().splitlines()]
    drawn = generate(open_model(finished), 3, 5, seed=0, batch_size=2)
    assert [row["tokens"] for row in rows] == drawn.tolist()
    assert [row["text"] for row in rows] == [Characters().decode(row) for row in drawn.tolist()]
    assert all(row["text"] in shown for row in rows[:3]) and "5 texts in 3 steps" in shown
    assert (tmp_path / "three.steps.txt").read_text() == "\n\n".join(row["text"] for row in rows) + "\n"


def test_sample_goes_on_from_a_prompt_and_fills_gaps(finished: Path, tmp_path: Path) -> None:
    def drawn(**told: Any) -> list[dict[str, Any]]:
        words = {"model": finished / "teacher", "num_steps": 2, "num_samples": 3, "output": tmp_path / "p"}
        assert sample.main(as_words(words | told)) == 0
        return [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]

    assert {row["text"][:4] for row in drawn(prompt="The ")} == {"the "}
    filled = drawn(prompt="a[MASK]*3 b ", num_new_tokens=0)
    assert all(row["text"][0] == "a" and row["text"][4:] == " b " and len(row["text"]) == 7 for row in filled)
    own = drawn(prompt="a??", mask_marker="?", num_new_tokens=2, seed=3)
    assert all(row["text"][0] == "a" and len(row["tokens"]) == 5 and max(row["tokens"]) < 27 for row in own)


def test_evaluate_measures_the_same(
    finished: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = _data(story)
    del told["tokenizer_name"], told["block_size"], told["modality"]  # the model's own
    asked = {"model": finished, "num_steps": 3, "eval_num_samples": 6, "eval_seeds": 0, "output_dir": tmp_path}
    asked |= {"eval_num_bootstraps": 3, "eval_num_turns": 1, "eval_num_bounded": 2, "eval_temperatures": 0.5}
    assert evaluate.main(as_words(told | asked | {"teacher": finished / "teacher"})) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    known = {row["model"]: row for row in read_metrics(finished / "metrics.jsonl") if row.get("num_steps") == 3}
    models = ["teacher", "student"]
    assert [row["model"] for row in lines[1:]] == models * 2 and lines[0]["floors"]["entropy"] > 0
    for row in lines[3:]:
        assert row["temperature"] == 1 and row["entropy"] == pytest.approx(known[row["model"]]["entropy"])
        assert row["entropy_low"] <= row["entropy"] <= row["entropy_high"]
        assert row["nelbo_low"] <= row["nelbo"] <= row["nelbo_high"] and row["latency_1"] > 0
    assert all("nelbo" not in row for row in lines[1:3]), "the bound is of samples at temperature 1"
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("<blockquote>") >= 3 * 3 and "At equal entropy" in page and "Entropy of a sample&#x27;s own" in page
    )


def _hugging(story: Path, output: Path, folder: Path, **more: Any) -> dict[str, Any]:
    told = _data(story) | _QUICK | {"output_dir": output, "block_size": 10, "seed": 0}
    del told["tokenizer_name"]  # the model's own
    return told | more


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "words.jsonl"
    rows = [" ".join(language.WORDS[i : i + 12] * (1 + i % 3)) for i in range(40)]
    file.write_text("".join(json.dumps({"title": "none", "body": row}) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without its head, as one that was never trained to predict words."""
    folder = language.save("bert", tmp_path_factory.mktemp("bert"))
    BertModel.from_pretrained(folder).save_pretrained(folder)
    return folder


def test_an_encoder_becomes_a_teacher_and_its_adapters_a_student(bert: Path, words: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    shared = _hugging(words, tmp_path / "teacher", bert, text_column="body")
    own = {"kind": "masked-lm", "model_name_or_path": bert, "max_steps": 3, "per_device_train_batch_size": 4}
    assert pretrain.main(as_words(shared | own)) == 0
    teacher = open_model(tmp_path / "teacher")
    assert isinstance(teacher, Di4CForMaskedLM) and not teacher.config.is_student
    assert told_beside(tmp_path / "teacher") == {"tokenizer_name": ".", "block_size": 10, "wrap": True}

    more = {
        "output_dir": tmp_path / "run",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "lora_rank": 2,
        "student_model_config": {"latent_dim": 2, "latent_hidden_size": 8},
        **{"max_steps": 2, "per_device_train_batch_size": 4, "num_latents": 2, "num_targets": 2},
        **{"eval_num_steps": 2, "eval_num_samples": 4, "eval_seeds": 0},
    }
    assert distill.main(as_words(shared | more)) == 0
    student = open_model(tmp_path / "run")
    assert student.config.lora["r"] == 2
    x = torch.full((2, 10), student.config.mask_id)
    assert torch.equal(student.teacher_denoiser()(x, None), teacher(x, None)), "adapters off, it is the teacher"
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "evaluation"]
    assert [row["model"] for row in rows] == ["teacher", "student"] and all(row["num_samples"] == 4 for row in rows)

    told = {"model": tmp_path / "run", "num_steps": 2, "num_samples": 2, "prompt": "w3 w4 [MASK] w6"}
    assert sample.main(as_words(told)) == 0
    file = tmp_path / "run" / "samples" / "student-2steps-seed0.jsonl"
    drawn = [json.loads(line)["tokens"] for line in file.read_text().splitlines()]
    first, cls = len(language.SPECIAL), language.SPECIAL["cls"]
    assert all(row[:3] == [cls, first + 3, first + 4] and row[4] == first + 6 and len(row) == 10 for row in drawn)
    assert not any(token in (language.SPECIAL["mask"], language.SPECIAL["pad"]) for row in drawn for token in row)


def _published(model: DiTDenoiser, file: Path) -> Path:
    """The weights under the names of the published files."""
    save_file({f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}, file)
    return file


def test_a_published_file_is_a_teacher_as_it_is(finished: Path, story: Path, tmp_path: Path) -> None:
    file = _published(open_model(finished / "teacher"), tmp_path / "model.safetensors")
    told = {"teacher_model_name_or_path": file, "max_steps": 1, "eval_num_steps": 2, "schedule": "log_linear"}
    assert distill.main(_distilling(story, tmp_path / "run", **told)) == 0
    student = open_model(tmp_path / "run")
    assert (student.config.length, student.config.schedule) == (1024, "log_linear"), "as published, none is told"
    assert sample.main(as_words({"model": tmp_path / "run", "num_samples": 2, "num_steps": 1})) == 0
    rows = (tmp_path / "run" / "samples" / "student-1steps-seed0.jsonl").read_text().splitlines()
    assert [len(json.loads(row)["tokens"]) for row in rows] == [12, 12], "the blocks it was distilled on"


def test_a_second_round_begins_as_its_teacher(finished: Path, story: Path, tmp_path: Path) -> None:
    told = {"teacher_model_name_or_path": finished, "max_steps": 1, "learning_rate": 0.0, "base_learning_rate": 0.0}
    words = _distilling(story, tmp_path / "again", **told, eval_num_steps=1, second_round="true")
    assert distill.main(words) == 0
    again, first = open_model(tmp_path / "again").state_dict(), open_model(finished).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_chain_is_trained_by_its_likelihood_and_trained_again(finished: Path, story: Path, tmp_path: Path) -> None:
    chain = {"latent_form": "chain", "latent_states": 3, "latent_hidden_size": 8}
    told = {"teacher_model_name_or_path": finished / "teacher", "stages": ["di4c", "di4c2"], "num_latents": 2}
    words = _distilling(
        story,
        tmp_path / "run",
        **told | {"student_model_config": chain, "few_step_counts": [1, 3], "eval_num_steps": 1},
        **{"consistency_share": 0.3, "window_share": 0.2, "max_steps": 3},
    )
    assert distill.main(words) == 0
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "few_step_data" in line]
    assert [line["phase"] for line in lines] == ["di4c"] * 3 + ["student"] * 3
    assert all(
        math.isclose(line["loss"], sum(line[part] for part in FEW_STEP), rel_tol=1e-5) and line["loss"] > 0
        for line in lines
    )
    assert open_model(tmp_path / "run").config.has_chain and (tmp_path / "run" / "report.html").is_file()
    assert sample.main(as_words({"model": tmp_path / "run", "num_samples": 2, "num_steps": 2})) == 0


def test_refuses_what_does_not_fit_before_anything_is_written(
    finished: Path,
    bert: Path,
    story: Path,
    words: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "out"
    whole = language.save("bert", tmp_path / "whole")
    llada = language.save("llada", tmp_path / "llada")
    (tmp_path / "none").mkdir()
    teacher = finished / "teacher"
    mixture = _published(DiTDenoiser.from_teacher(teacher, latent_hidden_size=8), tmp_path / "student.safetensors")
    for told, message in (
        ({"teacher_model_name_or_path": teacher, "tokenizer_name": whole}, "knows 61 tokens, the teacher 27"),
        ({"teacher_model_name_or_path": whole, "tokenizer_name": "characters"}, "knows 27 tokens, the teacher 61"),
        (
            {"teacher_model_name_or_path": teacher, "block_size": 13},
            "sequences of 13 tokens, but this teacher takes at most 12",
        ),
        ({"teacher_model_name_or_path": finished}, "holds a student, a teacher is wanted"),
        ({"teacher_model_name_or_path": mixture}, "latent_projection.0.bias and 3 more are weights no teacher has"),
        ({"teacher_model_name_or_path": llada, "tokenizer_name": llada}, "give trust_remote_code=True"),
        (
            {"teacher_model_name_or_path": bert, "tokenizer_name": bert},
            "an encoder without its head predicts nothing yet",
        ),
        ({"teacher_model_name_or_path": tmp_path / "none"}, "holds no config.json and no weights"),
        ({"tokenizer_name": "nobody/nothing"}, "no tokenizer there; name a folder, 'gpt2' or 'characters'"),
        (
            {"dataset_name": words, "text_column": "words"},
            "no text in 'words'; name the one that does by --text_column",
        ),
        ({"block_size": 9000}, "has not one block of 9000 tokens"),
        ({"process": "uniform"}, "--process uniform: text is masked"),
        ({"lora_rank": 2}, "is for masked language models of transformers, this teacher is a DiTDenoiser"),
        ({"student_model_config": {"latent": 2}}, "unknown setting 'latent'; did you mean"),
        ({"teacher_model_name_or_path": teacher, "teacher_revision": "main"}, "is of a repository of the hub"),
        ({"second_round": "true"}, "are of a teacher that is named"),
        ({"few_step_counts": [2, 4]}, "--few_step_counts [2, 4]: is for a student of the diffusion transformer whose"),
        ({"few_step_counts": [0, 4]}, "num_steps must be integers of at least 1, got (0, 4)"),
        ({"few_step_counts": 4, "latent_processes": 2}, "no latents are drawn that processes could share; give 1"),
        ({"schedule": "cosine", "teacher_model_name_or_path": teacher}, "this run asks for schedule = cosine"),
    ):
        assert message in refused(distill.main, *_distilling(story, output, **told)), told
        assert not output.exists(), told
    images = ["--preset", "digits_smoke", "--output_dir", output]
    for flags, message in (
        (["--block_size", 9], "--block_size 9: is for text"),
        (["--second_round", "true", "--teacher_model_name_or_path", finished], "--second_round: is for text"),
    ):
        assert message in refused(distill.main, *images, *flags) and not output.exists()
    assert "name the encoder" in refused(pretrain.main, *_teaching(story, output), "--kind", "masked-lm")
    for flags, message in (
        (["--prompt", STORY], "has 64 tokens, a sample has 12"),
        (["--prompt", "the", "--num_new_tokens", 0], "nothing is left to fill in"),
        (["--block_size", 13], "this model takes at most 12"),
        (["--labels", 3], "is a model of text"),
        (["--tokenizer_name", whole], "knows 61 tokens, the teacher 27"),
        (["--num_new_tokens", 2], "goes with --prompt"),
    ):
        assert message in refused(sample.main, "--model", finished, "--output", output, *flags), flags
        assert not list(tmp_path.glob("out*"))
