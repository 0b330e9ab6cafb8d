"""Bad input is refused with the op, the argument, what came and what is expected; no kernel has run by then."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import calls
import pytest
import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.ops import Hidden, Logistic, native

B, L, D, S = 2, 4, 3, 5  # of the calls that are made bad


@dataclass(frozen=True)
class Bad:
    """An argument made bad by `make`, from its good value, and words of the message: what came, what is expected."""

    argument: str
    make: Callable[[Any], Any]
    received: str
    expected: str
    named: str = ""  # as the message names it, where not like the argument
    looked_at: bool = False  # a value within a tensor, which is not looked at on CUDA


def _set(value: float | int, at: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The tensor with one element replaced."""

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[at] = value
        return x

    return change


def _as(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _shape(*sizes: int) -> str:
    return str(tuple(sizes))


def _logits(name: str, letters: str) -> Iterator[Bad]:
    """For a tensor of logits: kind, dtype, number of dimensions, number of classes."""
    yield Bad(name, _as([1.0]), "got list", f"must be a tensor {letters}")
    yield Bad(name, lambda x: x.long(), "got torch.int64", "float32, bfloat16, float16 or float64")
    yield Bad(name, lambda x: x.to(torch.complex64), "got torch.complex64", "float32, bfloat16, float16 or float64")
    yield Bad(name, lambda x: x.flatten()[:S], "got (5,)", letters)
    yield Bad(name, lambda x: x[..., :0], "got 0", "between 1 and 262144 classes")
    yield Bad(name, lambda x: x[..., :1].expand(*x.shape[:-1], 262145), "got 262145", "between 1 and 262144 classes")


def _constant(name: str, letters: str) -> Iterator[Bad]:
    """For logits that have no gradient, beside the logits that do."""
    yield from _logits(name, letters)
    yield Bad(name, lambda x: x[:1], "got shape (1, ", f"the logits' B, D, S = {_shape(B, D, S)}")
    yield Bad(name, lambda x: x[..., :2, :], "2, 5)", f"the logits' B, D, S = {_shape(B, D, S)}")
    yield Bad(name, lambda x: x[..., :4], "3, 4)", f"the logits' B, D, S = {_shape(B, D, S)}")
    yield Bad(name, lambda x: x.to("meta"), "got meta", "must be on {device}")
    yield Bad(name, lambda x: x.clone().requires_grad_(), "requires grad", f"pass {name}.detach()")


def _indices(name: str, letters: str) -> Iterator[Bad]:
    """For an int64 tensor."""
    yield Bad(name, _as([0]), "got list", f"an int64 tensor {letters}")
    yield Bad(name, lambda x: x.int(), "got torch.int32", "must be int64")
    yield Bad(name, lambda x: x.double(), "got torch.float64", "must be int64")
    yield Bad(name, lambda x: x.flatten()[0], "()", letters)


def _beside(name: str, letters: str, *sizes: int) -> Iterator[Bad]:
    """For one whose shape and device are those of the logits."""
    yield from _indices(name, letters)
    yield Bad(name, lambda x: x[:1], f"got {_shape(1, *sizes[1:])}", f"{letters} = {_shape(*sizes)}")
    yield Bad(name, lambda x: x.to("meta"), "got meta", "must be on {device}")


def _positions(name: str, letters: str, *sizes: int) -> Iterator[Bad]:
    yield from _beside(name, letters, *sizes)
    yield Bad(name, lambda x: x[..., :2], f"got {_shape(*sizes[:-1], 2)}", f"{letters} = {_shape(*sizes)}")


def _tokens(name: str, letters: str, *sizes: int) -> Iterator[Bad]:
    yield from _positions(name, letters, *sizes)
    for value in (S, -1, 1 << 40):
        change = _set(value, tuple(n - 1 for n in sizes))
        yield Bad(name, change, f"got {value} at index (1, ", f"in [0, S) = [0, {S})", looked_at=True)


def _keys() -> Iterator[Bad]:
    yield from _beside("keys", "(B,)", B)
    yield Bad("keys", lambda x: x[:, None], "got (2, 1)", "(B,) = (2,)")


def _weight() -> Iterator[Bad]:
    expected = f"(B, D) = {_shape(B, D)}"
    yield Bad("weight", _as(1.0), "got float", "None or a tensor (B, D)")
    yield Bad("weight", lambda x: x[:, :2], "got (2, 2)", expected)
    yield Bad("weight", lambda x: x[:, None], "got (2, 1, 3)", expected)
    yield Bad("weight", lambda x: x.to(torch.complex64), "got torch.complex64", "must be real")
    yield Bad("weight", lambda x: x.to("meta"), "got meta", "must be on {device}")
    yield Bad("weight", lambda x: x.clone().requires_grad_(), "requires grad", "pass weight.detach()")
    for value, received in ((-0.5, "got -0.5"), (math.nan, "got nan"), (-math.inf, "got -inf")):
        yield Bad("weight", _set(value, (1, 2)), received, ">= 0 everywhere", looked_at=True)


def _count(name: str, *more: Any, smallest: int = 0) -> Iterator[Bad]:
    for value in (smallest - 1, 1.5, "3", True, *more):
        yield Bad(name, _as(value), f"got {value!r}", f"must be an integer >= {smallest}")


def _stream(name: str, end: int, expected: str) -> Iterator[Bad]:
    for value in (-1, end, 0.5, "a", None):
        yield Bad(name, _as(value), f"got {value!r}", expected)


def _temperature() -> Iterator[Bad]:
    for value in (-1.0, math.nan, math.inf, "hot", None):
        yield Bad("temperature", _as(value), f"got {value!r}", "must be finite and >= 0 (0 takes the largest logit)")


def _sampling() -> Iterator[Bad]:
    yield from _keys()
    yield from _count("draws")
    yield from _stream("stream", (1 << 31) - 1, "must be an integer in [0, 2^31 - 1)")
    yield from _temperature()


def _unmask_prob() -> Iterator[Bad]:
    for value in (1.5, -0.1, math.nan, "a", None):
        yield Bad("unmask_prob", _as(value), f"got {value!r}", "in [0, 1]")
    expected = "a number or a floating tensor (B,) = (2,)"
    yield Bad("unmask_prob", lambda x: x[:1], "torch.float32 of shape (1,)", expected)
    yield Bad("unmask_prob", lambda x: x.long(), "torch.int64 of shape (2,)", expected)
    yield Bad("unmask_prob", lambda x: x.to("meta"), "got meta", "must be on {device}")
    for value, received in ((1.25, "got 1.25"), (math.nan, "got nan")):
        yield Bad("unmask_prob", _set(value, (1,)), received, "in [0, 1] everywhere", looked_at=True)


def _inside() -> Iterator[Bad]:
    yield Bad("inside", _as(True), "got bool", "None or a bool tensor (B,)")
    yield Bad("inside", _as(torch.ones(B)), "got torch.float32", "must be bool")
    yield Bad("inside", _as(torch.ones(B + 1, dtype=torch.bool)), "got (3,)", "(B,) = (2,)")
    yield Bad("inside", _as(torch.ones(B, dtype=torch.bool, device="meta")), "got meta", "must be on {device}")


def _mixture_logits() -> Iterator[Bad]:
    yield from _logits("logits", "(B, L, D, S)")
    yield Bad("logits", lambda x: x[:, 0], "got (2, 3, 5)", "(B, L, D, S)")
    yield Bad("logits", lambda x: x[:, :0], "got 0", "L, the second dimension", "L, the second dimension of logits")


def _mixture_target() -> Iterator[Bad]:
    yield from _constant("target", "(B, D, S) or (B, T, D, S)")
    yield Bad("target", lambda x: x.new_zeros(B, 0, D, S), "got 0", "T, the second dimension", "of target")


def _tables(name: str) -> Iterator[Bad]:
    """For one of the tables of sample_product, (B, S, S) in the good call."""
    if name != "base":  # which may be absent
        yield Bad(name, _as(None), "got NoneType", "a float64 tensor (S, S) or (N, S, S)")
    yield Bad(name, _as([1.0]), "got list", "a float64 tensor (S, S) or (N, S, S)")
    yield Bad(name, lambda x: x.float(), "got torch.float32", "must be float64")
    yield Bad(name, lambda x: x[..., :4], f"got {_shape(B, S, 4)}", "(S, S) or (N, S, S)")
    yield Bad(name, lambda x: x[0, 0], f"got {_shape(S)}", "(S, S) or (N, S, S)")
    yield Bad(name, lambda x: x[:, :0, :0], f"got {_shape(B, 0, 0)}", "1 <= S <= 262144")
    yield Bad(name, lambda x: x.expand(3, B, S, S)[:, 0], "got 3", "N = B = 2 tables, or 1")
    yield Bad(name, lambda x: x[:1], f"{_shape(1, S, S)}", "must be alike in shape")
    yield Bad(name, lambda x: x[:, :4, :4], f"{_shape(B, 4, 4)}", "must be alike in shape")
    yield Bad(name, lambda x: x.to("meta"), "got meta", "must be on {device}")


def _reveal() -> Iterator[Bad]:
    """For what is beside indices in a call of reveal, whose tokens are (B, 2, D)."""
    yield Bad("log_prob", _as([0.0]), "got list", "must be a float32 tensor")
    yield Bad("log_prob", lambda x: x.double(), "got torch.float64", "must be a float32 tensor")
    yield Bad("log_prob", lambda x: x[:, 0], f"got {_shape(B, D)}", f"the tokens' shape {_shape(B, 2, D)}")
    yield Bad("log_prob", lambda x: x.to("meta"), "got meta", "must be on {device}")
    for value in (1.5, None, True):
        yield Bad("count", _as(value), f"got {value!r}", "an integer or an int64 tensor (B,)")
    yield Bad("count", lambda x: x.float(), "got torch.float32", "must be int64")
    yield Bad("count", lambda x: x[:1], f"got {_shape(1)}", f"(B,) = {_shape(B)}")
    for value in (None, "a", True):
        yield Bad("noise", _as(value), f"got {value!r}", "a number or a floating tensor (B,)")
    for value in (math.nan, math.inf):
        yield Bad("noise", _as(value), f"got {value!r}", "must be finite")
    yield Bad("noise", lambda x: x[:1], "torch.float32 of shape (1,)", "a floating tensor (B,) = (2,)")
    yield Bad("noise", lambda x: x.long(), "torch.int64 of shape (2,)", "a floating tensor (B,) = (2,)")
    yield Bad("noise", lambda x: x.to("meta"), "got meta", "must be on {device}")


ROW_LOGITS = "(B, D, S) or (B, L, D, S)"
TABLE: dict[str, list[Bad]] = {
    "random_bits": [*_indices("keys", "(B,)"), *_count("n", None), *_stream("stream_word", 1 << 32, "[0, 2^32)")],
    "sample_product": [
        *(bad for name in ("left", "right", "base") for bad in _tables(name)),
        *_positions("i", "(B, D)", B, D),  # any number may stand there: what is no state gives -1
        *_indices("j", "(B, D) or (B, n, D)"),
        *_keys(),
        *_stream("stream", (1 << 31) - 1, "must be an integer in [0, 2^31 - 1)"),
    ],
    "reveal": [
        *_indices("tokens", "(B, D) or (B, n, D)"),
        *_positions("x_t", "(B, D)", B, D),  # any state may stand there
        *_keys(),
        *_count("mask_id", None),
        *_stream("stream", (1 << 31) - 1, "must be an integer in [0, 2^31 - 1)"),
        *_reveal(),
    ],
    "sample_categorical": [*_logits("logits", "(B, ..., S)"), *_sampling(), *_count("first_position", None)],
    "absorbing_step": [
        *_logits("logits", "(B, D, S)"),
        *_positions("x_t", "(B, D)", B, D),  # any state may stand there
        *_sampling(),
        *_unmask_prob(),
        *_count("mask_id", None),
    ],
    "mixture_log_prob": [*_mixture_logits(), *_tokens("tokens", "(B, K, D)", B, 2, D), *_weight()],
    "mixture_kl": [*_mixture_target(), *_mixture_logits(), *_weight()],
    "mixture_objective": [
        *_mixture_logits(),
        *_constant("teacher", "(B, D, S)"),
        *_tokens("data", "(B, D)", B, D),
        *_tokens("samples", "(B, K, D)", B, 2, D),
        *_mixture_target(),
        *_weight(),
        *_inside(),
    ],
    **{
        name: [*_constant("target", "(B, D, S)"), *_logits("logits", ROW_LOGITS), *_weight()]
        for name in calls.DIVERGENCES
    },
    "masked_cross_entropy": [*_logits("logits", ROW_LOGITS), *_tokens("tokens", "(B, D)", B, D), *_weight()],
}


def _of_logistic(name: str) -> Iterator[Bad]:
    """For each part of a Logistic given as the argument `name`."""

    def part(field: str, change: Callable[[Any], Any]) -> Callable[[Logistic], Logistic]:
        return lambda x: x._replace(**{field: change(getattr(x, field))})

    for field in ("mean", "log_scale"):
        yield Bad(name, part(field, _as(0.5)), "got float", "must be a tensor", f"{name}.{field}")
        yield Bad(name, part(field, lambda x: x.long()), "torch.int64", "float32", f"{name}.{field}")
    yield Bad(name, part("log_scale", lambda x: x[:1]), "(1, ", "shape", f"{name}.log_scale")
    yield Bad(name, part("log_scale", lambda x: x.to("meta")), "got meta", "must be on {device}", f"{name}.log_scale")
    if name != "logits":
        for field in ("mean", "log_scale"):
            yield Bad(name, part(field, lambda x: x.clone().requires_grad_()), "requires grad", "detach()")
    for value in (0, -3, 262145):
        yield Bad(name, part("num_states", _as(value)), f"got {value}", "between 1 and 262144", name)
    for value in (2.5, None, True):
        yield Bad(name, part("num_states", _as(value)), f"got {value!r}", "an integer", f"{name}.num_states")


def _of_hidden(name: str) -> Iterator[Bad]:
    """For each part of a Hidden given as the argument `name`."""

    def part(field: str, change: Callable[[Any], Any]) -> Callable[[Hidden], Hidden]:
        return lambda x: x._replace(**{field: change(getattr(x, field))})

    for field in ("states", "weight", "bias"):
        yield Bad(name, part(field, _as(0.5)), "got float", "must be", f"{name}.{field}")
        yield Bad(name, part(field, lambda x: x.long()), "torch.int64", "float32", f"{name}.{field}")
    yield Bad(name, part("weight", lambda x: x[:, :5]), "got (5, 5)", "(S, H)", f"{name}.weight")
    yield Bad(name, part("weight", lambda x: x[0]), "got (6,)", "(S, H)", f"{name}.weight")
    yield Bad(name, part("bias", lambda x: x[:4]), "got (4,)", "(S,) = (5,)", f"{name}.bias")
    yield Bad(name, part("weight", lambda x: x.to("meta")), "got meta", "must be on {device}", f"{name}.weight")
    yield Bad(name, part("bias", lambda x: x.to("meta")), "got meta", "must be on {device}", f"{name}.bias")
    if name != "logits":  # the head may be the student's own
        yield Bad(name, part("states", lambda x: x.clone().requires_grad_()), "requires grad", "detach()")


for _op, _arguments in {
    "sample_categorical": ("logits",),
    "mixture_log_prob": ("logits",),
    "mixture_kl": ("target", "logits"),
    "mixture_objective": ("teacher", "target", "logits"),
}.items():
    TABLE[f"{_op}_of_logistic"] = [bad for argument in _arguments for bad in _of_logistic(argument)]
    TABLE[f"{_op}_of_hidden"] = [bad for argument in _arguments for bad in _of_hidden(argument)]
    TABLE[f"{_op}_from_hidden"] = [
        *_count("chunk_bytes", None, smallest=1),
        *([] if _op == "sample_categorical" else _count("keep_bytes", None)),
    ]


def _no_kernel(*_: Any, **__: Any) -> None:
    pytest.fail("a kernel ran on bad input")


@pytest.mark.parametrize("name", TABLE)
def test_bad_argument(backend, name, monkeypatch):
    """Every message holds the op, the argument, what came and what is expected, and no kernel was handed a pointer."""
    call = calls.make(name).to(backend.device)
    monkeypatch.setattr(native.Kernels, "__call__", _no_kernel)
    for bad in TABLE[name]:
        if bad.looked_at and backend.device.type == "cuda":
            continue  # it would stop the host
        made = bad.make(call.arguments.get(bad.argument))
        if isinstance(made, Tensor) and made.device.type == "cpu":
            made = made.to(backend.device)
        with pytest.raises((TypeError, ValueError)) as caught:
            call.changed(**{bad.argument: made})()
        message, expected = str(caught.value), bad.expected.format(device=backend.device)
        missing = [w for w in (bad.named or bad.argument, bad.received, expected) if w not in message]
        assert message.startswith(call.op) and not missing, f"{bad.argument}: {missing} not in {message!r}"


@pytest.mark.parametrize("name", calls.NAMES)
def test_good_arguments(backend, name):
    """What the table makes bad is good as it is."""
    assert all(torch.isfinite(value).all() for value in calls.make(name).to(backend.device)())
    assert name in TABLE or name.startswith("mixture_kl_of_mixture")


@pytest.mark.parametrize(
    "name", [name for name in calls.NAMES if name not in ("random_bits", "sample_product", "reveal")]
)
def test_logits_on_another_device(name):
    """Whatever stands beside logits of another device is named."""
    call = calls.make(name)
    logits = call.each(lambda x: x.to("meta")).arguments["logits"]
    with pytest.raises(ValueError, match=f"{call.op}.* must be on meta like the logits, got cpu"):
        call.changed(logits=logits)()


@pytest.mark.parametrize("name", calls.MIXTURES)
def test_constants_may_require_grad_where_there_is_none(backend, name):
    """Under no_grad a target that requires grad is taken as it is."""
    call = calls.make(name).to(backend.device)
    parts = {key: call.arguments[key].requires_grad_() for key in ("target", "teacher") if key in call.arguments}
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(call.changed(**parts)(), call(), strict=True))


def test_tokens_on_cuda_are_not_looked_at():
    """On CUDA nothing is raised (that would stop the host): the sample's value is NaN, its neighbours are right."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for name in ("mixture_log_prob", "mixture_objective", "masked_cross_entropy"):
        call = calls.make(name).to(torch.device("cuda"))
        argument = "samples" if name == "mixture_objective" else "tokens"
        tokens = _set(1 << 40, (1, *[0] * (call.arguments[argument].dim() - 1)))(call.arguments[argument])
        for value, good in zip(call.changed(**{argument: tokens})(), call(), strict=True):
            assert torch.equal(value[0], good[0])
        assert any(value[1].isnan().any() for value in call.changed(**{argument: tokens})())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.bfloat16])
def test_weights_of_any_dtype(backend, dtype):
    """A mask of the positions still noised can be handed in as it is."""
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], device=backend.device)
    for name in calls.SUMS:
        call = calls.make(name).to(backend.device)
        got, expected = call.changed(weight=mask.to(dtype))(), call.changed(weight=mask.float())()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name


def test_every_public_op_is_in_the_table():
    """An op that is new must be made bad as well."""
    public = {name for name in ops.__all__ if callable(getattr(ops, name)) and name[0].islower()}
    assert {re.sub("_of_(logistic|hidden)$", "", name) for name in TABLE} == public
