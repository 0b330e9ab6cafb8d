"""random_bits and sample: the tokens of the plain-torch definition, whatever the layout, the dtype and the lanes."""

from __future__ import annotations

import emulate
import pytest
import torch
from comparison import LONG, STATES, layout_of, random_logits
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STREAM = 7


def keys_for(batch: int) -> Tensor:
    return torch.arange(batch, dtype=torch.int64) * 0x9E3779B97F4A7C1 - (1 << 62)


def sample(
    logits: Tensor,
    *,
    pad: int = 0,
    offset: int = 0,
    draws: int = 1,
    temperature: float = 1.0,
    x_t: Tensor | None = None,
    unmask_prob: Tensor | None = None,
    mask_id: int = -1,
    first: int = 0,
    way: str = "turns",
    layout: emulate.Layout | None = None,
    orders: tuple[int, ...] = emulate.ORDERS,
) -> tuple[Tensor, Tensor]:
    """The kernel's tokens and log-probabilities for logits (B, D, S), or for others laid out already."""
    batch, length, states = logits.shape
    result = emulate.run(
        "sample",
        {
            "logits": layout or emulate.lay_out(logits[:, None], pad, offset),
            "keys": keys_for(batch),
            "x_t": x_t,
            "unmask_prob": unmask_prob,
            "mask_id": mask_id,
            "stream": STREAM,
            "temperature": temperature,
            "draws": draws,
            "first": first,
            "split": emulate.workspace(way, batch * length, 2 * -(-states // 1024)),
            **{"B": batch, "D": length, "S": states},
        },
        {"tokens": ((batch, draws, length), torch.int64), "log_prob": ((batch, draws, length), torch.float32)},
        orders=orders,
        capability=emulate.WAYS[way][0],
    )
    return result["tokens"], result["log_prob"]


def expected(
    logits: Tensor,
    *,
    draws: int = 1,
    temperature: float = 1.0,
    x_t: Tensor | None = None,
    unmask_prob: Tensor | None = None,
    mask_id: int = -1,
) -> tuple[Tensor, Tensor]:
    keys = keys_for(logits.shape[0])
    return reference.sample(logits.float(), keys, x_t, unmask_prob, mask_id, draws, STREAM, temperature)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert got[0].tolist() == wanted[0].tolist()
    torch.testing.assert_close(got[1], wanted[1], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(("batch", "length"), [(3, 5), (1, 1), (0, 4), (4, 0), (2, 600)])
def test_random_bits(batch: int, length: int) -> None:
    inputs = {"keys": keys_for(batch), "B": batch, "N": length, "stream": 2**32 - 3}
    got = emulate.run("random_bits", inputs, {"out": ((batch, length, 2), torch.int64)})["out"]
    assert torch.equal(got, reference.random_bits(keys_for(batch), length, 2**32 - 3))


@pytest.mark.parametrize("states", STATES)
def test_tokens_are_the_definitions(states: int) -> None:
    for dtype in DTYPES:
        logits = random_logits(2, 5, states, dtype=dtype)
        pad, offset = layout_of(states, dtype)
        assert_same(sample(logits, pad=pad, offset=offset, draws=3), expected(logits, draws=3))


@pytest.mark.parametrize("states", [17, 3001])
def test_tokens_are_the_cpus(states: int) -> None:
    """Those of the op on the CPU, by whatever serves it there."""
    logits = random_logits(3, 40, states, dtype=torch.bfloat16)
    wanted = ops.sample_categorical(logits, keys_for(3), draws=2, stream=STREAM, return_log_prob=True)
    assert_same(sample(logits, draws=2), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks(dtype: torch.dtype) -> None:
    """Of a row that one CTA takes, or several: to the bit the same."""
    logits = random_logits(1, 3, LONG, dtype=dtype)
    pad, offset = layout_of(LONG, dtype)
    wanted = expected(logits, draws=5)
    results = [sample(logits, pad=pad, offset=offset, draws=5, way=way, orders=(0, 1)) for way in emulate.WAYS]
    for got in results:
        assert_same(got, wanted)
        assert torch.equal(got[1], results[0][1])


@pytest.mark.parametrize("way", emulate.WAYS)
def test_most_states(way: str) -> None:
    """S = 2^18, the most there may be: 256 chunks, 8 CTAs to a row."""
    logits = random_logits(1, 1, 1 << 18, dtype=torch.bfloat16)
    assert_same(sample(logits, draws=9, orders=(5,), way=way), expected(logits, draws=9))


@pytest.mark.parametrize("way", ["cluster", "ticket"])
def test_rows_shared_by_ctas(way: str) -> None:
    """More rows than teams of CTAs; bad rows, sure rows and rows that nobody wants among them."""
    states, mask_id = 16385, 16390
    logits = random_logits(4, 8, states, dtype=torch.float16)
    logits[0, 1, 16384], logits[1, 2], logits[2, 3, 9000] = torch.nan, -torch.inf, torch.inf
    assert_same(sample(logits, way=way), expected(logits))
    x_t = torch.full((4, 8), mask_id)
    x_t[:, ::3] = 1
    unmask_prob = torch.tensor([0.5, 0.0, 1.0, 0.3], dtype=torch.float64)
    options = {"x_t": x_t, "unmask_prob": unmask_prob, "mask_id": mask_id, "draws": 2}
    assert_same(sample(logits, way=way, **options), expected(logits, **options))


@pytest.mark.parametrize("states", [40, 600, 3000])
def test_a_piece_of_the_positions(states: int) -> None:
    """Positions 5 to 9 alone draw what they draw among the others."""
    logits = random_logits(2, 9, states, dtype=torch.float32)
    whole = sample(logits, draws=2)
    piece = sample(logits[:, 5:], draws=2, first=5)
    assert torch.equal(piece[0], whole[0][..., 5:]) and torch.equal(piece[1], whole[1][..., 5:])


@pytest.mark.parametrize("states", [3, 256, 300, 1500, 2100])
def test_logistic_rows(states: int) -> None:
    """Logits that are computed from two floats: the tokens of those logits."""
    generator = torch.Generator().manual_seed(states)
    numbers = torch.stack(
        [torch.randn(2, 1, 5, generator=generator), torch.randn(2, 1, 5, generator=generator) - 2], -1
    )
    numbers[1, 0, 3, 0] = torch.nan
    logits = ops.Logistic(numbers[:, 0, :, 0], numbers[:, 0, :, 1], states).logits()
    layout = emulate.Layout(emulate.to_bytes(numbers), emulate.LOGISTIC, (10, 10, 2), 0)
    tokens, log_prob = sample(logits, draws=4, layout=layout)
    wanted = expected(logits, draws=4)
    assert tokens.tolist() == wanted[0].tolist()
    torch.testing.assert_close(log_prob, wanted[1], rtol=2e-5, atol=2e-5, equal_nan=True)  # logits to a few ulp


def test_too_many_states() -> None:
    with pytest.raises(emulate.KernelFault, match="at most 262144 states, got S = 262145"):
        sample(torch.zeros(1, 1, (1 << 18) + 1), orders=(0,))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.7])
@pytest.mark.parametrize("states", [17, 3000])
def test_temperature(temperature: float, states: int) -> None:
    logits = random_logits(2, 4, states, dtype=torch.bfloat16).round()  # with ties
    assert_same(sample(logits, temperature=temperature, draws=2), expected(logits, temperature=temperature, draws=2))


@pytest.mark.parametrize("states", [19, 2500])
def test_bad_rows_touch_no_other(states: int) -> None:
    """NaN, all -inf and +inf rows among good ones, whose draws stay as they are without them."""
    clean = random_logits(1, 8, states, dtype=torch.float32)
    logits = clean.clone()
    logits[0, 1, states // 2] = torch.nan
    logits[0, 2] = -torch.inf
    logits[0, 3, [4, states - 2]] = torch.inf
    logits[0, 5, 3], logits[0, 5, states - 1] = torch.inf, torch.nan
    logits[0, 6, : states - 1] = -torch.inf
    for temperature in (1.0, 0.5, 0.0):
        tokens, log_prob = sample(logits, draws=2, temperature=temperature)
        assert_same((tokens, log_prob), expected(logits, draws=2, temperature=temperature))
        assert (tokens[0, :, [1, 2, 5]] == -1).all()
        assert tokens[0, 0, [3, 6]].tolist() == [4, states - 1]
        good = [0, 4, 7]
        before = sample(clean, draws=2, temperature=temperature)
        assert torch.equal(tokens[..., good], before[0][..., good])
        assert torch.equal(log_prob[..., good], before[1][..., good])


@pytest.mark.parametrize("states", [33, 1024, 2050])
@pytest.mark.parametrize("mask_inside", [False, True])
def test_absorbing_step(states: int, mask_inside: bool) -> None:
    """Only masked rows whose coin says so are read and drawn; the class that means masked never is."""
    mask_id = states // 3 if mask_inside else states
    logits = random_logits(3, 6, states, dtype=torch.float16)
    x_t = torch.full((3, 6), mask_id)
    x_t[:, ::3] = 1
    unmask_prob = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    if mask_inside:
        logits[..., mask_id] = 100.0
    wanted = expected(logits, x_t=x_t, unmask_prob=unmask_prob, mask_id=mask_id, draws=3)
    unread = (wanted[0] == x_t[:, None]).all(1)  # no draw of these positions looks at the row
    assert 0 < unread.sum() < unread.numel()
    logits[unread] = torch.nan
    got = sample(logits, x_t=x_t, unmask_prob=unmask_prob, mask_id=mask_id, draws=3, pad=1)
    assert_same(got, wanted)
    assert (got[0][2, :, 1:3] != mask_id).all()


def test_only_the_excluded_class() -> None:
    tokens, log_prob = sample(torch.zeros(1, 2, 1), mask_id=0)
    assert tokens.tolist() == [[[-1, -1]]] and log_prob.isnan().all()


def test_a_batch_draws_what_its_parts_draw() -> None:
    """Launch shape and neighbours do not matter: 4 samples of a batch of 12 alone."""
    logits = random_logits(12, 3, 1500, dtype=torch.bfloat16)
    tokens, log_prob = sample(logits)
    few = sample(logits[:4])
    assert torch.equal(tokens[:4], few[0]) and torch.equal(log_prob[:4], few[1])


@pytest.mark.parametrize(("batch", "length", "draws"), [(0, 3, 1), (2, 0, 1), (2, 3, 0)])
def test_nothing_to_draw(batch: int, length: int, draws: int) -> None:
    tokens, _ = sample(torch.zeros(batch, length, 5), draws=draws)
    assert tokens.shape == (batch, draws, length)
