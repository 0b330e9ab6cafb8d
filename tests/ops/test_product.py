"""`sample_product`: the definition's draws to the last one, the product's law, nothing of no mass, how it is served."""

from __future__ import annotations

import calls
import pytest
import torch
from laws import chi_square
from torch._subclasses.fake_tensor import FakeTensorMode

from di4c_ext import ops, random
from di4c_ext.ops import reference

STATES = (1, 2, 3, 7, 31, 32, 33, 64, 255, 256, 257, 300, 1025)


def _tables(states: int, tables: int = 1, *, spread: int = 20, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """left, right and base (N, S, S): entries of many magnitudes, a third of them 0."""
    g = torch.Generator().manual_seed(states + seed)
    x = torch.rand(3, tables, states, states, generator=g, dtype=torch.float64)
    x = x * 10.0 ** -torch.randint(0, spread, x.shape, generator=g)
    x[torch.rand(x.shape, generator=g) < 0.33] = 0.0
    return x[0], x[1], x[2] * 1e-3


def _rows(states: int, *shape: int, outside: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-outside, states + outside, shape, generator=g)


@pytest.mark.parametrize("states", STATES)
def test_draws_are_the_definitions(implementation, states):
    """To the last one, by every instruction set: one or many tables, with base or without, indices out of range."""
    i, j, keys = _rows(states, 3, 40, outside=1), _rows(states, 3, 2, 40, outside=1), random.keys(1, 3)
    for number in (1, 3):
        left, right, base = _tables(states, number)
        for floor in (None, base):
            wanted = reference.sample_product(left, right, floor, i, j, keys, 5)
            moved = [None if x is None else x.to(implementation.device) for x in (left, right, i, j, keys, floor)]
            got = ops.sample_product(*moved[:5], base=moved[5], stream=5)
            assert torch.equal(got.cpu(), wanted)
            weights = left[torch.arange(3)[:, None, None] % number, i[:, None].clamp(0, states - 1)]
            weights = weights * right[torch.arange(3)[:, None, None] % number, j.clamp(0, states - 1)]
            if floor is None:  # what was drawn has mass
                drawn = weights.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
                assert ((drawn > 0) | (wanted == -1)).all()


@pytest.mark.parametrize("states", [2, 5, 40, 256, 700])
def test_law(implementation, states):
    """Over many draws of one pair of rows; a class of mass 0 that comes up fails at once."""
    left, right, base = _tables(states, spread=2)
    n = 100_000 if implementation.is_native else 10_000
    i, j = torch.zeros(1, 1, dtype=torch.int64), torch.full((1, n, 1), states - 1)
    for floor in (None, base):
        weights = left[0, 0] * right[0, states - 1] + (0 if floor is None else floor[0, 0, states - 1])
        moved = [None if x is None else x.to(implementation.device) for x in (left, right, i, j, random.keys(2, 1))]
        got = ops.sample_product(*moved, base=None if floor is None else floor.to(implementation.device))
        counts = torch.bincount(got.flatten().cpu(), minlength=states)
        assert chi_square(counts, weights / weights.sum()) > 1e-3


def test_tails(implementation):
    """Probabilities down to 1e-6 by 4 million draws, and magnitudes that only a float64 holds."""
    weights = torch.tensor([1.0, 1e-2, 0.0, 1e-4, 1e-6, 1e-300], dtype=torch.float64)
    left = weights.expand(6, 6) * 1e-140
    right = torch.ones(6, 6, dtype=torch.float64) * 1e-10
    n = 4_000_000 if implementation.is_native else 400_000
    j = torch.zeros(1, n, 1, dtype=torch.int64, device=implementation.device)
    keys = random.keys(0, 1, implementation.device)
    left, right = left.to(implementation.device), right.to(implementation.device)
    got = ops.sample_product(left, right, j[:, 0], j, keys)
    counts = torch.bincount(got.flatten().cpu(), minlength=6)
    assert counts[2] == counts[5] == 0 and chi_square(counts[:5], weights[:5] / weights[:5].sum()) > 1e-3


def test_subnormal_and_huge_masses(backend):
    """Wherever the numbers lie, their proportions are kept."""
    for scale in (5e-324, 1e-310, 1.0, 1e307):
        left = torch.tensor([[8.0, 4.0, 0.0, 4.0]], dtype=torch.float64).expand(4, 4) * scale
        right = torch.ones(4, 4, dtype=torch.float64)
        j = torch.zeros(1, 20_000, 1, dtype=torch.int64, device=backend.device)
        got = ops.sample_product(
            left.to(backend.device), right.to(backend.device), j[:, 0], j, random.keys(4, 1, backend.device)
        )
        law = torch.tensor([0.5, 0.25, 0.0, 0.25], dtype=torch.float64)
        assert chi_square(torch.bincount(got.flatten().cpu(), minlength=4), law) > 1e-3


def test_rows_without_a_law(implementation):
    """Negative, infinite and NaN weights, zeros alone, indices that are no states: -1, and neighbours as they were."""
    left, right, _ = _tables(40, 4)
    j = _rows(40, 4, 3, 30)
    i = _rows(40, 4, 30)
    keys = random.keys(3, 4)
    clean = reference.sample_product(left, right, None, i, j, keys, 0)
    left = left.clone()
    right = right.clone()
    right[..., 7] = 1.0
    left[..., 7] = 1e-9
    clean = reference.sample_product(left, right, None, i, j, keys, 0)
    for row, value in ((0, -1e-300), (1, torch.inf), (2, torch.nan), (3, -torch.inf)):
        left[:, row, 7] = value
    left[:, 4] = 0.0
    left[:, 5, 8] = -0.0  # a zero like another
    bad = (i < 5)[:, None].expand_as(j)
    i, j = i.clone(), j.clone()
    i[0, 3], j[1, 2, 4], j[2, 0, 5] = 40, -1, 1 << 40
    bad = bad.clone()
    bad[0, :, 3] = bad[1, 2, 4] = bad[2, 0, 5] = True
    moved = [x.to(implementation.device) for x in (left, right, i, j, keys)]
    got = ops.sample_product(*moved).cpu()
    assert torch.equal(got == -1, bad) and 0.05 < bad.double().mean() < 0.5
    same = ~bad & (left[torch.arange(4)[:, None], i.clamp(max=39)][:, None, :, 8] >= 0)
    assert torch.equal(got[same], clean[same])


def test_a_batch_draws_what_its_parts_draw(backend):
    left, right, base = (x.to(backend.device) for x in _tables(50, 6))
    i, j = _rows(50, 6, 20).to(backend.device), _rows(50, 6, 3, 20).to(backend.device)
    keys = random.keys(9, 6, backend.device)
    whole = ops.sample_product(left, right, i, j, keys, base=base)
    for b in range(6):
        one = slice(b, b + 1)
        part = ops.sample_product(left[one], right[one], i[one], j[one], keys[one], base=base[one])
        assert torch.equal(part, whole[one])
    assert torch.equal(ops.sample_product(left, right, i, j[:, :2], keys, base=base), whole[:, :2])
    assert torch.equal(ops.sample_product(left, right, i, j[:, 0], keys, base=base), whole[:, 0])
    assert not torch.equal(ops.sample_product(left, right, i, j, keys, base=base, stream=1), whole)
    shared = ops.sample_product(left[0], right[0], i, j, keys)
    assert torch.equal(shared, ops.sample_product(left[:1].expand_as(left), right[:1].expand_as(left), i, j, keys))
    turned = ops.sample_product(left.mT.contiguous().mT, right, i, j, keys, base=base)  # any layout
    assert torch.equal(turned, whole)


def test_draws_are_independent_of_the_streams_tokens(backend):
    """One key and one stream serve `sample_categorical` and the draw that follows."""
    n, device = 40_000, backend.device
    keys = random.keys(12, n, device)
    first = ops.sample_categorical(torch.zeros(n, 1, 4, device=device), keys)
    ones = torch.ones(4, 4, dtype=torch.float64, device=device)
    second = ops.sample_product(ones, ones, first, first, keys)
    counts = torch.bincount((first * 4 + second).flatten().cpu(), minlength=16)
    assert chi_square(counts, torch.full((16,), 1 / 16).double()) > 1e-3


def test_threads_change_nothing(kernels):
    if kernels.name != "cpu":
        pytest.skip("threads are the CPU's")
    left, right, _ = _tables(200)
    i, j, keys = _rows(200, 2, 400), _rows(200, 2, 3, 400), random.keys(9, 2)
    one = ops.sample_product(left, right, i, j, keys)
    torch.set_num_threads(2)
    assert torch.equal(ops.sample_product(left, right, i, j, keys), one)


def test_opcheck(backend):
    for name in ("left", None):
        call = calls.make("sample_product", 9).to(backend.device).arguments
        base = call["base"] if name else None
        arguments = (call["left"], call["right"], base, call["i"], call["j"], call["keys"], 3)
        torch.library.opcheck(torch.ops.di4c.sample_product.default, arguments)


@pytest.mark.parametrize("empty", [None, "batch", "draws", "length"])
def test_shapes_without_data(backend, empty):
    call = calls.make("sample_product", 9, **({empty: 0} if empty in ("batch", "length") else {})).to(backend.device)
    if empty == "draws":
        call = call.changed(j=call.arguments["j"][:, :0])
    (real,) = call()
    with FakeTensorMode() as mode:
        (fake,) = call.each(mode.from_tensor)()
    assert real.shape == fake.shape == call.arguments["j"].shape and real.dtype == fake.dtype == torch.int64


def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(ops.sample_product, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        call = calls.make("sample_product", 9, batch=batch).to(backend.device)
        assert torch.equal(compiled(**call.arguments), call()[0])
