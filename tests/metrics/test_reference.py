"""What is kept of real images: whole, found again, and made anew where it is damaged or of other images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from di4c_ext.metrics import Moments, reference
from di4c_ext.metrics.reference import Reference, keep, kept, reference_file


def _known() -> Reference:
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    return Reference({"features": Moments(x), "features_heldout": Moments(x[:7])}, x[:9], {"kid": 1e-3 / 3})


def test_is_what_was_kept(tmp_path: Path) -> None:
    file = reference_file(tmp_path / "new", "images", "network", 10)
    assert file is not None and kept(file) is None
    known = _known()
    keep(known, file)
    again = kept(file)
    assert again is not None and again.floors == known.floors and list(again.moments) == list(known.moments)
    for name, moments in known.moments.items():
        found = again.moments[name]
        assert found.n == moments.n and torch.equal(found.mean, moments.mean)
        assert torch.equal(found.covariance, moments.covariance)
    assert again.rows is not None and torch.equal(again.rows, known.rows)  # type: ignore[arg-type]
    keep(Reference({}, None, {}), file)
    assert kept(file) == Reference({}, None, {})


def test_a_file_for_all_it_hangs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference_file(None, "images") is None
    file = reference_file(tmp_path, "images", 10)
    assert file == reference_file(tmp_path, "images", 10) != reference_file(tmp_path, "images", 11)
    monkeypatch.setattr(reference, "_FORMAT", 99)
    assert file != reference_file(tmp_path, "images", 10)


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    keep(_known(), file)
    whole = file.read_bytes()
    for damaged in (
        whole[:-20],
        b"",
        whole.replace(b"sizes", b"seize"),
        whole.replace(b"mean_features", b"mean_fEatures"),
    ):
        file.write_bytes(damaged)
        assert kept(file) is None
    (tmp_path / "full").write_text("")
    with pytest.warns(UserWarning, match="not kept in the cache"):
        keep(_known(), tmp_path / "full" / "reference.safetensors")
