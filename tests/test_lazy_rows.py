"""Rows that are read as they are asked for say what a tensor of them says."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from di4c_ext import lazy_rows
from di4c_ext.lazy_rows import LazyRows, MappedCodes, joined, taken

N, D = 11, 5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "codes.npy", np.arange(N * D, dtype=np.int16).reshape(N, D))
    return tmp_path / "codes.npy"


@pytest.fixture
def table() -> torch.Tensor:
    return torch.arange(N * D, dtype=torch.int16).view(N, D)


def test_they_are_asked_as_a_tensor_is(file: Path, table: torch.Tensor) -> None:
    rows = LazyRows(MappedCodes(file))
    assert len(rows) == N and rows.shape == (N, D) and rows.dtype == torch.int16
    for index in (3, -1, slice(2, 7), slice(None), [4, 0, 4], torch.tensor([9, 1]), torch.arange(0)):
        assert torch.equal(rows[index], table[index]), index
    assert torch.equal(rows.long(), table.long())
    assert [len(some) for some in rows.split(4)] == [4, 4, 3] and torch.equal(torch.cat([*rows.split(4)]), table)
    some = torch.tensor([7, 2, 2, 10])
    assert isinstance(taken(rows, some), LazyRows) and torch.equal(taken(rows, some)[:], table[some])
    assert torch.equal(rows.take(some).take(slice(1, 3))[:], table[some][1:3])
    assert torch.equal(taken(table, some), table[some])
    assert torch.equal(LazyRows(MappedCodes(file, slice(3, 8)))[:], table[3:8])


def test_their_digest_is_of_values_or_of_the_source(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = LazyRows(MappedCodes(file))
    told = {rows.digest(), rows.take(torch.arange(N - 1)).digest(), rows.take(torch.arange(N).flip(0)).digest()}
    assert len(told) == 3
    monkeypatch.setattr(lazy_rows, "AT_ONCE", 2)
    assert rows.digest() in told
    named = MappedCodes(file)
    named.fingerprint = "of the source"
    monkeypatch.setattr(named, "read", lambda index: pytest.fail("it need not be read"))
    assert LazyRows(named).digest() != LazyRows(named).take(torch.arange(3)).digest()


def test_a_worker_maps_the_file_for_itself(file: Path, table: torch.Tensor) -> None:
    sent = pickle.dumps(LazyRows(MappedCodes(file)).take(torch.tensor([1, 8])))
    assert len(sent) < 4000 and torch.equal(pickle.loads(sent)[:], table[[1, 8]])


def test_two_sets_in_a_row(file: Path, table: torch.Tensor) -> None:
    lazy = LazyRows(MappedCodes(file))
    assert torch.equal(joined(table[:3], table[3:]), table)
    for first, second in ((lazy.take(slice(0, 3)), table[3:]), (table[:3], lazy.take(slice(3, None)))):
        both = joined(first, second)
        assert isinstance(both, LazyRows) and torch.equal(both[:], table)
        assert torch.equal(both[torch.tensor([10, 0, 3, 2])], table[[10, 0, 3, 2]])
