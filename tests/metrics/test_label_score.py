from __future__ import annotations

import math

import pytest
import torch

from di4c_ext.metrics import label_score


def test_its_ends() -> None:
    certain = torch.eye(5).repeat(4, 1)
    assert label_score(certain) == pytest.approx(5)  # every label, each certain
    assert label_score(certain[:1].expand(20, 5)) == pytest.approx(1)  # always the same
    assert label_score(torch.full((20, 5), 0.2)) == pytest.approx(1)  # says nothing


def test_by_hand() -> None:
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    mean = (0.6, 0.4)
    divergences = [sum(q * math.log(q / m) for q, m in zip(row, mean, strict=True)) for row in p.double().tolist()]
    assert label_score(p) == pytest.approx(math.exp(sum(divergences) / 2), rel=1e-6)


def test_refuses_what_is_no_law() -> None:
    for bad, message in (
        (torch.zeros(0, 3), r"shape \(0, 3\)"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.tensor([[0.5, 0.6]]), "no distribution"),
        (torch.tensor([[1.5, -0.5]]), "no distribution"),
        (torch.tensor([[0.5, math.nan]]), "no distribution"),
    ):
        with pytest.raises(ValueError, match=message):
            label_score(bad)
