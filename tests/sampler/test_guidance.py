"""Guided logits: their law, their pieces, their memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from levels import Chain, enumerated, latents_of, start, table
from tiny import chi_square_z, counts, index

from di4c_ext import random
from di4c_ext.ops import Logistic, native
from di4c_ext.ops.reference import objective
from di4c_ext.ops.reference.logistic import logistic_logits
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import (
    GuidedDenoiser,
    GuidedLogits,
    analytic_times,
    sample_analytic,
    sample_ancestral,
)

S, D = 3, 2


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_guidance(scale):
    process, student, teacher, grid = Chain(S), table(1, S, D, 6), table(1, S, D, 7), analytic_times(2)
    x, keys = start(process, 5)
    denoiser = GuidedDenoiser(student, teacher, scale)
    x_0 = sample_analytic(denoiser, process, x, grid, keys, final="draw")
    logits = teacher.table + scale * (student.table - teacher.table)
    assert abs(chi_square_z(counts(x_0, S), enumerated(process, [logits] * 2, grid.tolist(), "draw"))) < 4
    assert len(student.calls) == len(teacher.calls) == 2
    if scale in (0.0, 1.0):
        plain = sample_analytic((teacher, student)[int(scale)], process, x, grid, keys, final="draw")
        assert (plain == x_0).float().mean() > 0.999  # up to a rounding of t + (s - t)


def test_guided_logits_are_made_piece_by_piece():
    process, student, teacher = Chain(S), table(3, S, D, 8, True), table(1, S, D, 9, True)
    x, keys = start(process, 6, 50)
    sizes: list[int] = []

    class Watched(Chain):
        def step(self, x_t, logits, t, s, keys, **options):
            assert isinstance(logits, torch.Tensor)
            sizes.append(len(logits))
            return super().step(x_t, logits, t, s, keys, **options)

    each = (24 if native.available("cpu") else 72) * S * D  # bytes a sample, in pieces

    def run(logits_bytes, **options):
        denoiser = GuidedDenoiser(student, teacher, 1.5)
        return sample_analytic(
            denoiser, Watched(S), x, analytic_times(3), keys,
            latents=latents_of(3), logits_bytes=logits_bytes, **options,
        )  # fmt: skip

    whole = run(1 << 20)
    assert sizes == [50, 50]
    sizes.clear()
    assert torch.equal(run(7 * each), whole) and sizes == [7, 7, 7, 7, 7, 7, 7, 1] * 2
    assert torch.equal(run(1), whole)  # one sample at least
    assert torch.equal(run(7 * each, last_latents=4), run(1 << 20, last_latents=4))
    guided = GuidedDenoiser(student, teacher, 1.5)(x, torch.ones(50), torch.zeros(50, 1))
    assert isinstance(guided, GuidedLogits) and guided.shape == (50, D, S)
    t, s = (Logistic(*model.table[0, index(x, S)].unbind(-1), S).logits() for model in (teacher, student))
    assert torch.allclose(guided.logits(), t + 1.5 * (s - t))
    assert torch.equal(guided.logits(slice(3, 9)), guided.logits()[3:9])


@pytest.mark.parametrize("last_latents", [1, 3])
def test_a_logistic_without_kernels_is_made_piece_by_piece(monkeypatch, last_latents):
    process, student = Chain(S), table(3, S, D, 16, True)
    x, keys = start(process, 17, 50)
    sizes: list[int] = []

    def watched(mean, log_scale, num_states):
        sizes.append(len(mean))
        return logistic_logits(mean, log_scale, num_states)

    def run(logits_bytes):
        options = {"latents": latents_of(3), "last_latents": last_latents, "logits_bytes": logits_bytes}
        return sample_analytic(student, process, x, analytic_times(2), keys, **options)

    monkeypatch.setattr(objective, "logistic_logits", watched)  # where rows (mean, log-scale) are made logits
    if not native.available("cpu"):
        pytest.skip("no kernels to compare with")
    served = run(1)
    assert not sizes  # by kernels, which make none
    monkeypatch.setenv("DI4C_NATIVE", "off")
    assert torch.equal(run(72 * S * D * 20), served) and set(sizes) == {20, 10}
    assert torch.equal(run(1 << 20), served) and max(sizes) == 50


def test_guidance_of_masked_models_keeps_what_is_ruled_out():
    """-inf - -inf is no number, and the ancestral sampler takes guided logits too."""
    process, keys = AbsorbingProcess(3), random.keys(7, 10_000)
    teacher, student = torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([1.0, 0.0, -torch.inf])
    guided = GuidedDenoiser(
        lambda x, t: student.expand(*x.shape, 3), lambda x, t: teacher.expand(*x.shape, 3), scale=2.0
    )
    x_0 = sample_ancestral(
        guided, process, process.prior((10_000, 1), keys), [1.0, 0.5, 0.0], keys, logits_bytes=10_000
    )
    law = torch.tensor([2.0, -1.0, -torch.inf]).double().softmax(0)
    assert abs(chi_square_z(counts(x_0, 3), law)) < 4


# Prints by how many bytes the peak of resident memory grows, beyond networks' outputs, where pieces of 16 MiB are asked
# for: the guided logits of 96 samples of 256 positions and 256 states (150 MB at once), and the rates of a leap.
_PROGRAM = """
import torch
from levels import Chain
from di4c_ext import random
from di4c_ext.ops import Logistic, native
from di4c_ext.ops.reference import objective
from di4c_ext.ops.reference.logistic import logistic_logits
from di4c_ext.sampler import GuidedDenoiser, sample_analytic, sample_tau_leaping

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

def denoiser(x_t, t):
    return Logistic(torch.linspace(-1, 1, x_t.shape[1]).expand(x_t.shape), torch.zeros(x_t.shape), 256)

def growth(sample, batch):
    x, keys = torch.zeros(batch, 256, dtype=torch.int64), random.keys(0, batch)
    with open("/proc/self/clear_refs", "w") as forget:
        forget.write("5")
    before = resident("VmRSS")
    sample(x, keys)
    return resident("VmHWM") - before

torch.set_num_threads(2)
process, guided = Chain(256), GuidedDenoiser(denoiser, denoiser, 2.0)
for sample in (
    lambda x, keys: sample_analytic(guided, process, x, [0.5], keys, logits_bytes=16 << 20),
    lambda x, keys: sample_tau_leaping(denoiser, process, x, [0.5, 0.49], keys, logits_bytes=16 << 20),
):
    growth(sample, 4)
    print(growth(sample, 96))
"""


def test_pieces_keep_to_the_bytes_they_are_given():
    try:
        with open("/proc/self/clear_refs", "w") as forget:
            forget.write("5")
    except OSError:
        pytest.skip("the peak of memory cannot be reset here")
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs = 24 * 1024 * 8 * 8  # what of all samples is held besides: two Logistics, x, and x of the pieces
    for grown in map(int, done.stdout.split()):
        assert 4 << 20 < grown < (16 << 20) + outputs
