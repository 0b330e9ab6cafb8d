"""Rows that are kept: what goes on with them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from di4c_ext.evaluation.store import ROWS, Store

WEIGHTS, TOLD = {"student": "aa"}, {"data": "d", "--eval_num_samples": 4}


def row(**more: Any) -> dict[str, Any]:
    return {"model": "student", "num_steps": 1, "temperature": 1.0, "seed": 0, "x": 0.5} | more


def opened(folder: Path, weights: dict[str, str] = WEIGHTS, told: dict[str, Any] = TOLD, **more: Any) -> Store:
    return Store(folder, weights, told, **{"temperature": 1.0, "seed": 0} | more)


def test_rows_and_samples_are_there_again(tmp_path: Path) -> None:
    store = opened(tmp_path / "kept")
    first = torch.arange(8).view(2, 4)
    store.add(row(), first)
    store.add(row(seed=3), first + 1)
    store.add(row(temperature=0.5), first + 2)
    again = opened(tmp_path / "kept")
    assert again.rows == store.rows and again.known == {
        ("student", 1, 1.0, 0),
        ("student", 1, 1.0, 3),
        ("student", 1, 0.5, 0),
    }
    ((cell, samples),) = again.samples().items()
    assert cell == ("student", 1) and torch.equal(samples, first), "of the first seed and the plain temperature"
    assert len(list((tmp_path / "kept" / "samples").iterdir())) == 1


def test_a_row_that_was_cut_off_or_lost_its_samples_is_measured_again(tmp_path: Path) -> None:
    store = opened(tmp_path / "kept")
    for n in (1, 2):
        store.add(row(num_steps=n), torch.zeros(1, 4).long())
    file = tmp_path / "kept" / ROWS
    whole = file.read_text()
    file.write_text(whole[:-9])
    assert opened(tmp_path / "kept").known == {("student", 1, 1.0, 0)}
    again = opened(tmp_path / "kept")
    again.add(row(num_steps=2), torch.zeros(1, 4).long())
    assert file.read_text() == whole, "the rest of a line is not in the way"
    (tmp_path / "kept" / "samples" / "student-001steps-seed0.npy").unlink()
    assert opened(tmp_path / "kept").known == {("student", 2, 1.0, 0)}


def test_a_teacher_may_join_but_nothing_may_change(tmp_path: Path) -> None:
    store = opened(tmp_path / "kept")
    store.add(row(), torch.zeros(1, 4).long())
    both = {"teacher": "bb", **WEIGHTS}
    assert len(opened(tmp_path / "kept", both).rows) == 1 and len(opened(tmp_path / "kept").rows) == 1
    for weights, told, message in (
        ({"student": "cc"}, TOLD, "holds an evaluation of another student"),
        ({"teacher": "cc"}, TOLD, r"another teacher \(bb, now cc\)"),
        (WEIGHTS, TOLD | {"--eval_num_samples": 5}, r"another --eval_num_samples \(4, now 5\)"),
        (WEIGHTS, {"data": "d"}, r"another --eval_num_samples \(4, now None\)"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*|replace it by --overwrite_output_dir"):
            opened(tmp_path / "kept", weights, told)
    assert len(opened(tmp_path / "kept").rows) == 1, "a refusal deletes nothing"


def test_overwriting_leaves_other_files(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(row(), torch.zeros(1, 4).long())
    (tmp_path / "mine.txt").write_text("mine")
    assert opened(tmp_path, {"student": "new"}, overwrite=True).rows == []
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "samples").exists()


def test_folders_of_other_things_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds mine.txt, and no evaluation"):
            opened(tmp_path, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        opened(tmp_path / "mine.txt")
