"""What a student's latents carry, told as rows."""

from __future__ import annotations

import numpy as np
import pytest
from toys import STATES, pair, toy

from di4c_ext import data
from di4c_ext.evaluation.latents import ONE_STEP_SAMPLES, TIMES, latent_use, one_step
from di4c_ext.models import CompactDenoiser


def images(number: int) -> data.ImageTokens:
    return data.from_arrays(np.random.default_rng(0).integers(0, STATES, (number, 2, 2)), num_states=STATES)


def test_latents_that_do_nothing_and_some_that_do() -> None:
    heldout = images(5)
    new = CompactDenoiser.from_teacher(toy())
    for row in latent_use(new, heldout, 4):
        assert row["num_images"] == 5 and all(abs(row[name]) < 1e-5 for name in ("correlation", "information"))
        assert row["variation"] == pytest.approx(0, abs=1e-6)
    assert one_step(new, heldout, 4)["total_correlation"] == pytest.approx(0, abs=1e-5)
    rows = latent_use(pair()["student"], heldout, 4, num_bootstraps=30)
    assert [row["t"] for row in rows] == list(TIMES)
    for row in rows:
        assert row["information"] > 0 and 0 < row["variation"] < 1
        for name in ("joint", "correlation", "information", "variation"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    # A latent tells at most what is open, and less is open later.
    assert rows[0]["joint"] < rows[-1]["joint"] <= 0


def test_one_step_makes_samples_of_its_own() -> None:
    """As many as it wants, whatever the number of held-out examples, and the same ones again."""
    student = pair()["student"]
    found = one_step(student, images(3), 8, num_bootstraps=30)
    assert found["num_samples"] == ONE_STEP_SAMPLES and found["num_latents"] == 8
    assert found["total_correlation_low"] < found["total_correlation"] < found["total_correlation_high"]
    assert one_step(student, images(2), 8)["total_correlation"] == found["total_correlation"]


def test_of_few_latents_less_is_seen() -> None:
    """Both terms are estimated low; the mean grows towards the total correlation with the number of latents."""
    student = toy(is_student=True, scale=1.2)
    values = [one_step(student, images(2), number)["total_correlation"] for number in (2, 8, 64)]
    assert values[0] < values[1] < values[2] and values[2] > 0.2


def test_teachers_have_none() -> None:
    for measured in (latent_use, one_step):
        with pytest.raises(ValueError, match=f"{measured.__name__}: a teacher has no latents"):
            measured(toy(), images(2), 2)
