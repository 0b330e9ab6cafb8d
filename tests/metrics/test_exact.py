"""Laws by enumeration, against laws known otherwise and against samples."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import chi_square_z, counts, finite_latents
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.exact import (
    ExactTeacher,
    TableStudent,
    distance_to_teacher,
    index,
    num_all_states,
    of_clean,
    product_law,
    sampler_law,
    sequences,
    total_variation,
    transition,
)
from di4c_ext.process import AbsorbingProcess, GaussianProcess, UniformProcess
from di4c_ext.sampler import sample_ancestral, times

EQUAL = torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=torch.float64)


def test_sequences_and_their_places() -> None:
    x = sequences(3, 2)
    assert x.tolist() == [[i, j] for i in range(3) for j in range(3)]
    assert torch.equal(index(x, 3), torch.arange(9)) and index(x[None, 4:6], 3).tolist() == [[4, 5]]
    with pytest.raises(ValueError, match="16777216 sequences, more than the 4096"):
        sequences(256, 3)


def test_product_law_of_many_rows() -> None:
    p = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    every = product_law(p)
    assert every.shape == (5, 8)
    for row, law in zip(p, every, strict=True):
        wanted = [math.prod(row[d, x[d]].item() for d in range(3)) for x in sequences(2, 3)]
        assert law.tolist() == pytest.approx(wanted)


def test_two_equal_tokens_by_hand() -> None:
    """N even linear steps leave both tokens open together, and so apart, with probability 1/N: TV 1 / (2N)."""
    process, teacher = AbsorbingProcess(2), ExactTeacher(EQUAL, 2, 2)
    for n in (1, 2, 3, 10):
        law = sampler_law(process, teacher, 2, times(n))
        assert law.sum().item() == pytest.approx(1) and of_clean(process, law, 2).sum().item() == pytest.approx(1)
        assert total_variation(of_clean(process, law, 2), EQUAL) == pytest.approx(1 / (2 * n))
        assert distance_to_teacher(teacher, teacher, process, 2, num_steps=1, teacher_steps=n) == pytest.approx(
            0.5 - 1 / (2 * n)
        )


def mixture() -> TableStudent:
    """One step, both tokens equal: latent 0 says 0 0, latent 1 says 1 1."""
    table = torch.zeros(2, 9, 2, 2)
    table[0, :, :, 1] = table[1, :, :, 0] = -40.0
    return TableStudent(table)


def test_a_mixture_reaches_in_one_step_what_no_product_does() -> None:
    student, process = mixture(), AbsorbingProcess(2)
    law = of_clean(process, sampler_law(process, student, 2, times(1), latents=student.latents()), 2)
    assert total_variation(law, EQUAL) < 1e-9
    teacher = ExactTeacher(EQUAL, 2, 2)
    found = distance_to_teacher(student, teacher, process, 2, num_steps=1, teacher_steps=50, latents=student.latents())
    assert found == pytest.approx(1 / 100)
    again = distance_to_teacher(
        teacher, student, process, 2, num_steps=50, teacher_steps=1, teacher_latents=student.latents()
    )
    assert again == pytest.approx(1 / 100)


@pytest.mark.parametrize("kind", ["absorbing", "mask inside", "uniform", "gaussian"])
def test_law_is_that_of_samples(kind: str) -> None:
    n, length, num_states = 20_000, 2, 3
    process = {
        "absorbing": AbsorbingProcess(num_states, "cosine"),
        "mask inside": AbsorbingProcess(num_states, mask_id=1),
        "uniform": UniformProcess(num_states),
        "gaussian": GaussianProcess(num_states),
    }[kind]
    every = num_all_states(process)
    assert every == num_states + (kind == "absorbing")
    table = torch.randn(4, every**length, length, num_states, generator=torch.Generator().manual_seed(1))
    if kind == "mask inside":
        table[..., 1] = -torch.inf

    def denoiser(x: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        return table[latents[:, 0].long(), index(x, every)]

    keys, grid = random.keys(2, n), [1.0, 0.6, 0.2]
    start = None
    if kind in ("uniform", "gaussian"):
        start = torch.zeros(every**length, dtype=torch.float64)
        start[5] = 1
    x = process.prior((n, length), keys) if start is None else sequences(every, length)[5].expand(n, -1)
    draw = lambda keys: finite_latents(4)(keys, 1)[:, 0]  # noqa: E731
    samples = sample_ancestral(denoiser, process, x, grid, keys, latents=draw)
    law = sampler_law(process, denoiser, length, grid, latents=torch.arange(4.0)[:, None], start=start)
    assert abs(chi_square_z(counts(samples, every), law)) < 4
    assert law.count_nonzero() > 6


def test_needs_a_start_where_there_are_no_masks() -> None:
    with pytest.raises(ValueError, match="has no masks to start from; give start"):
        sampler_law(UniformProcess(2), lambda x, t: x, 2, times(1))


def test_exact_teacher_knows_the_posterior() -> None:
    law = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = ExactTeacher(law / law.sum(), 2, 3)
    p = teacher(torch.tensor([[2, 1, 2]])).softmax(-1)[0]
    given = [law[i] for i in (2, 3, 6, 7)]  # 0 1 0, 0 1 1, 1 1 0, 1 1 1
    assert p[0, 1].item() == pytest.approx(((given[2] + given[3]) / sum(given)).item())
    assert p[2, 1].item() == pytest.approx(((given[1] + given[3]) / sum(given)).item())
    assert p[1].tolist() == [0.0, 1.0]
    assert (ExactTeacher(EQUAL, 2, 2)(torch.tensor([0, 1])) == 0).all()  # never comes up
    with pytest.raises(ValueError, match=r"law must be \(S\^D,\) = \(8,\)"):
        ExactTeacher(EQUAL, 2, 3)


def test_rows_of_a_transition_are_laws() -> None:
    step = transition(AbsorbingProcess(2), ExactTeacher(EQUAL, 2, 2), 2, 0.8, 0.3)
    assert step.dtype == torch.float64 and torch.allclose(step.sum(1), torch.ones(9, dtype=torch.float64))
