"""`reveal`: the definition's positions to the last one, the law of the order, ties, bad tokens, how it is served."""

from __future__ import annotations

import itertools
import math

import calls
import pytest
import torch
from laws import chi_square
from scipy.stats import kstest
from torch._subclasses.fake_tensor import FakeTensorMode

from di4c_ext import ops, random
from di4c_ext.ops import reference

MASK = 9


def _case(batch: int, draws: int, length: int, *, steps: float = 0.0, bad: float = 0.0, seed: int = 0):
    """x_t, tokens, log_prob; log-probabilities rounded to multiples of `steps`, so that many are equal."""
    g = torch.Generator().manual_seed(seed + length)
    x_t = torch.randint(0, MASK, (batch, length), generator=g)
    x_t[torch.rand(batch, length, generator=g) < 0.7] = MASK
    tokens = torch.randint(0, MASK, (batch, draws, length), generator=g)
    log_prob = -2 * torch.rand(batch, draws, length, generator=g)
    log_prob = (log_prob / steps).round() * steps if steps else log_prob
    tokens[torch.rand(tokens.shape, generator=g) < bad] = -1
    log_prob[torch.rand(tokens.shape, generator=g) < bad] = math.nan
    return x_t, tokens, log_prob


@pytest.mark.parametrize("length", [1, 2, 31, 33, 64, 256, 257, 1000])
def test_positions_are_the_definitions(implementation, length):
    """To the last one, by every instruction set: with noise and without, equal confidences, bad tokens, any counts."""
    keys = random.keys(1, 5)
    count = torch.tensor([0, length // 3, 1, 10 * length, -4])
    for draws, steps, bad in ((1, 0.0, 0.0), (3, 0.5, 0.0), (2, 1.0, 0.1)):
        x_t, tokens, log_prob = _case(5, draws, length, steps=steps, bad=bad)
        for noise in (torch.zeros(5), torch.tensor([4.5, 1.0, 0.0, 0.3, -0.5])):
            wanted = reference.reveal(x_t, tokens, log_prob, count, noise, keys, MASK, 3)
            moved = [x.to(implementation.device) for x in (x_t, tokens, log_prob, keys, count, noise)]
            got = ops.reveal(*moved[:4], count=moved[4], mask_id=MASK, noise=moved[5], stream=3)
            assert torch.equal(got.cpu(), wanted)


def test_the_definition_position_by_position(backend):
    """Without noise, in words: sort what is masked by confidence and position, write the first of them."""
    x_t, tokens, log_prob = _case(6, 2, 40, steps=0.25, bad=0.1)
    count = [0, 3, 7, 20, 40, 1]
    moved = [x.to(backend.device) for x in (x_t, tokens, log_prob, random.keys(0, 6))]
    got = ops.reveal(*moved, count=torch.tensor(count, device=backend.device), mask_id=MASK).tolist()
    for b, n in itertools.product(range(6), range(2)):
        masked = [d for d in range(40) if x_t[b, d] == MASK]
        bad = [d for d in masked if tokens[b, n, d] < 0 or log_prob[b, n, d].isnan()]
        order = sorted((d for d in masked if d not in bad), key=lambda d: (-log_prob[b, n, d].item(), d))
        wanted = x_t[b].tolist()
        for d in order[: count[b]]:
            wanted[d] = tokens[b, n, d].item()
        for d in bad:
            wanted[d] = -1
        assert got[b][n] == wanted


def test_gumbel_numbers(backend):
    bits = ops.random_bits(random.keys(3, 1, backend.device), 100_000, stream_word=1)[0, :, 0]
    g = reference.gumbel(bits)
    assert kstest(g.cpu().numpy(), "gumbel_r").pvalue > 1e-3
    v = ((bits >> 12 & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52
    exact = -torch.log(-torch.log1p(-v))
    torch.testing.assert_close(g.double(), exact, rtol=1e-6, atol=1e-6)
    ends = reference.gumbel(torch.tensor([0, -1, 1 << 62, -(1 << 63)]))
    largest = 53 * math.log(2)
    wanted = [largest, -math.log(largest), -math.log(math.log(4 / 3)), -math.log(math.log(2))]
    assert ends.tolist() == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_law_of_the_order(backend, noise):
    """Position after position in proportion to p^(1 / noise): all ordered pairs of four positions."""
    n, p = 20_000, torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=torch.float64)
    x_t = torch.tensor([[MASK, MASK, 4, MASK, MASK]]).expand(n, 5)
    tokens = torch.tensor([0, 1, 8, 2, 3]).expand(n, 5)
    log_prob = torch.cat([p[:2], torch.ones(1), p[2:]]).log().float().expand(n, 5)
    keys = random.keys(5, n)
    weights = p ** (1 / noise)
    moved = [x.to(backend.device) for x in (x_t, tokens, log_prob, keys)]
    one, two = (ops.reveal(*moved, count=c, mask_id=MASK, noise=noise).cpu() for c in (1, 2))
    first = one[one != MASK].view(n, 2).masked_fill(one[:, 2:3].expand(n, 2) < 0, 0)
    first = first[first != 4]
    assert chi_square(torch.bincount(first, minlength=4), weights / weights.sum()) > 1e-3
    law = torch.zeros(4, 4, dtype=torch.float64)
    for i, j in itertools.permutations(range(4), 2):
        law[min(i, j), max(i, j)] += weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
    pair = two[:, [0, 1, 3, 4]].sort(-1).values[:, :2]
    counts = torch.bincount((pair[:, 0] * 4 + pair[:, 1]), minlength=16)
    assert chi_square(counts[law.flatten() > 0], law[law > 0]) > 1e-3
    assert ((one != MASK) <= (two != MASK)).all()  # who is first is among the first two


def test_a_batch_reveals_what_its_parts_reveal(backend):
    x_t, tokens, log_prob = (x.to(backend.device) for x in _case(6, 3, 50))
    keys, noise = random.keys(9, 6, backend.device), torch.linspace(0, 2, 6, device=backend.device)
    count = torch.arange(6, device=backend.device) * 5
    whole = ops.reveal(x_t, tokens, log_prob, keys, count=count, mask_id=MASK, noise=noise)
    for b in range(6):
        one = slice(b, b + 1)
        part = ops.reveal(
            x_t[one], tokens[one], log_prob[one], keys[one], count=count[one], mask_id=MASK, noise=noise[one]
        )
        assert torch.equal(part, whole[one])
    plain = ops.reveal(x_t, tokens[:, 0], log_prob[:, 0], keys, count=count, mask_id=MASK, noise=noise)
    assert torch.equal(plain, whole[:, 0])
    assert not torch.equal(
        ops.reveal(x_t, tokens, log_prob, keys, count=count, mask_id=MASK, noise=noise, stream=1), whole
    )
    numbers = ops.reveal(x_t, tokens, log_prob, keys, count=4, mask_id=MASK, noise=0.7)
    filled = {"count": torch.full_like(count, 4), "noise": torch.full_like(noise, 0.7)}
    assert torch.equal(numbers, ops.reveal(x_t, tokens, log_prob, keys, mask_id=MASK, **filled))


def test_bad_tokens_touch_no_other(backend):
    """They take no one's turn, in their own sample either."""
    x_t, tokens, log_prob = (x.to(backend.device) for x in _case(4, 1, 60))
    x_t[:] = MASK
    keys = random.keys(2, 4, backend.device)
    options = {"count": 20, "mask_id": MASK, "noise": 1.0}
    log_prob[1:3, :, :7] = -1e9  # behind all others
    good = ops.reveal(x_t, tokens, log_prob, keys, **options)
    tokens[1, :, :7], log_prob[2, :, :7] = -1, math.nan
    got = ops.reveal(x_t, tokens, log_prob, keys, **options)
    assert (got[1:3, :, :7] == -1).all() and torch.equal(got[1:3, :, 7:], good[1:3, :, 7:])
    assert torch.equal(got[[0, 3]], good[[0, 3]]) and ((good != MASK).sum(-1) == 20).all()


def test_opcheck(backend):
    x_t, tokens, log_prob = (x.to(backend.device) for x in _case(3, 2, 7))
    count = torch.tensor([1, 2, 3], device=backend.device)
    arguments = (x_t, tokens, log_prob, count, torch.ones(3, device=backend.device), random.keys(0, 3, backend.device))
    torch.library.opcheck(torch.ops.di4c.reveal.default, (*arguments, MASK, 1))


@pytest.mark.parametrize("empty", [None, "batch", "draws", "length"])
def test_shapes_without_data(backend, empty):
    call = calls.make("reveal", 9, **({empty: 0} if empty in ("batch", "length") else {})).to(backend.device)
    if empty == "draws":
        call = call.changed(**{name: call.arguments[name][:, :0] for name in ("tokens", "log_prob")})
    (real,) = call()
    with FakeTensorMode() as mode:
        (fake,) = call.each(mode.from_tensor)()
    assert real.shape == fake.shape == call.arguments["tokens"].shape and real.dtype == fake.dtype == torch.int64


def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(ops.reveal, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        call = calls.make("reveal", 9, batch=batch).to(backend.device)
        assert torch.equal(compiled(**call.arguments), call()[0])
