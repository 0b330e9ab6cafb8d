"""The from_hidden forms: against the logits made whole, against the float64 definition, and what they never look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_bits
from hidden_cases import NAMES, Case, arguments, as_tuple, hidden, make, whole, with_gradients
from torch import Tensor
from torch._inductor import config as inductor_config

from di4c_ext import ops, random
from di4c_ext.ops import Hidden, pieces, reference

HALF = 250_000  # keep_bytes that hold some pieces of the case below and not all


def close(value: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of the plain path in the same dtype, and a few ulp of the largest."""
    error, largest = (value.double() - exact).abs().max().item(), exact.abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + 16 * torch.finfo(torch.float32).eps * (1 + largest)
    assert error <= allowed, f"off by {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("keep_bytes", [0, HALF, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_definition(backend, name, dtype, keep_bytes):
    for weighted, bias, inside in ((True, True, True), (False, False, False), (True, False, True), (False, True, True)):
        case = make(dtype, weighted=weighted, bias=bias, inside=inside).to(backend.device)
        got = with_gradients(partial(hidden, keep_bytes=keep_bytes), name, case)
        plain = with_gradients(partial(whole, of=_Definitions), name, case)
        exact = with_gradients(partial(whole, of=_Definitions), name, case.to(dtype=torch.float64))
        for values in zip(*(outputs + grads for outputs, grads in (got, plain, exact)), strict=True):
            close(*values)
        assert all(x.dtype == dtype for x in got[1])


class _Definitions:
    """The definitions with the ops' defaults."""

    mixture_objective = staticmethod(reference.mixture_objective)

    @staticmethod
    def mixture_log_prob(logits: Tensor, tokens: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.mixture_log_prob(logits, tokens, weight)

    @staticmethod
    def mixture_kl(target: Tensor, logits: Tensor, weight: Tensor | None) -> Tensor:
        return reference.mixture_kl(target, logits, weight)


@pytest.mark.parametrize("chunk_bytes", [1, 60_000, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_from_whole_logits(backend, name, dtype, chunk_bytes):
    """Where the product has the same bits: whatever the pieces, several samples in one or one sample in several."""
    for length in (1, 16, 53):
        case = make(dtype, length=length, weighted=False, exact=True).to(backend.device)
        for a, b in zip(hidden(name, case, chunk_bytes=chunk_bytes), whole(name, case), strict=True):
            assert same_bits(a, b)
        got, expected = (with_gradients(run, name, case)[1] for run in (hidden, whole))
        for a, b in zip(got, expected, strict=True):
            rtol = 1e-5 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * b.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_in_the_public_op(backend, name):
    case = make(exact=True).to(backend.device)
    by_op = as_tuple(getattr(ops, name)(**arguments(name, case)))
    for a, b in zip(by_op, hidden(name, case), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_used_is_not_looked_at(backend, name):
    """NaN in states at weight 0, and in the target's of samples inside: the same bits, gradient 0 there."""
    case = make().to(backend.device)
    unused = (case.weight == 0)[:, None, :, None]
    not_aimed_at = unused | case.inside[:, None, None, None] if name == "mixture_objective" else unused
    bad = replace(
        case,
        student=case.student._replace(states=case.student.states.masked_fill(unused, torch.nan)),
        teacher=case.teacher._replace(states=case.teacher.states.masked_fill(unused[:, 0], torch.nan)),
        target=case.target._replace(states=case.target.states.masked_fill(not_aimed_at, torch.nan)),
    )
    for chunk_bytes in (1, 1 << 30):
        (values, grads), (bad_values, bad_grads) = (
            with_gradients(partial(hidden, chunk_bytes=chunk_bytes), name, c) for c in (case, bad)
        )
        for a, b in zip(values + grads, bad_values + bad_grads, strict=True):
            assert same_bits(a, b)
        assert (bad_grads[0].masked_select(unused.expand_as(bad_grads[0])) == 0).all()


def test_what_is_not_used_is_not_multiplied(kernels, monkeypatch):
    """Rows of logits made: L, 1 and T for each used position, no target's of samples inside."""
    case = make(bias=False).to(kernels.device)
    made = []
    multiply = torch.mm

    def counted(a, b, **options):
        made.append(a.shape[0])
        return multiply(a, b, **options)

    monkeypatch.setattr(pieces.torch, "mm", counted)
    used = (case.weight != 0).sum(1)
    outside = int(used[~case.inside].sum())
    with torch.no_grad():
        hidden("mixture_objective", case)
    assert sum(made) == 5 * int(used.sum()) + 2 * outside

    made.clear()
    with torch.no_grad():  # the samples inside together: the shorter one is filled up to the longer
        hidden("mixture_objective", case, chunk_bytes=1 << 30)
    assert sum(made) == 5 * 2 * int(used[case.inside].max()) + 7 * outside
    assert len(made) == 5


@pytest.mark.parametrize("keep_bytes", [0, HALF, 1 << 30])
def test_what_is_kept_is_not_made_again(kernels, monkeypatch, keep_bytes):
    """Backward makes the rows of logits that forward did not keep and no others: a target's mixture takes one row of
    float32 in place of its two, and comes first."""
    case = make(weighted=False, inside=False).to(kernels.device)
    made = {"student": 0, "target": 0}
    make_logits = pieces.logits_of

    def counted(source, piece, *places):
        if source is not None:
            made["student" if source.shape[1] == 4 else "target"] += piece.size * source.shape[1]
        return make_logits(source, piece, *places)

    monkeypatch.setattr(pieces, "logits_of", counted)
    student = case.student._replace(states=case.student.states.detach().requires_grad_())
    positions, row = 3 * 53, 301 * 4
    room = keep_bytes // row
    for name in ("mixture_log_prob", "mixture_kl"):
        (value, *_) = hidden(name, replace(case, student=student), keep_bytes=keep_bytes)
        targets = positions if name == "mixture_kl" else 0
        assert made == {"student": 4 * positions, "target": 2 * targets}
        made.update(student=0, target=0)
        value.sum().backward()
        kept = min(targets, room)
        assert made["target"] == (2 * (targets - kept) if kept == targets else 2 * targets)
        left = 4 * positions - (room - kept)
        assert max(0, left) <= made["student"] < max(1, left + 4 * 16)  # pieces are kept as a whole
        made.update(student=0, target=0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_do(backend, name):
    """No samples, no positions, no weights other than 0: values and gradients of 0."""
    for case in (make(batch=0), make(length=0), replace(make(), weight=torch.zeros(3, 53))):
        values, grads = with_gradients(hidden, name, case.to(backend.device))
        assert all((x == 0).all() for x in values + grads)
        assert [x.shape for x in grads] == [x.shape for x in case.student[:3]]


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_only_where_needed(backend, needed):
    case = make().to(backend.device)
    _, expected = with_gradients(hidden, "mixture_objective", case)
    leaves = [x.detach().requires_grad_(n) for x, n in zip(case.student[:3], needed, strict=True)]
    outputs = hidden("mixture_objective", replace(case, student=Hidden(*leaves)))
    summed = [o for o in outputs if o.requires_grad]
    grads = [torch.linspace(0.5, -1.5, o.numel(), device=o.device).view(o.shape) for o in summed]
    torch.autograd.backward(summed, grads)
    for x, need, grad in zip(leaves, needed, expected, strict=True):
        assert same_bits(x.grad, grad) if need else x.grad is None


def test_logits_that_are_there_beside_hidden_ones(backend):
    """A student's logits as a tensor, teacher and target hidden; and the other way about."""
    case = make(exact=True).to(backend.device)
    given = arguments("mixture_objective", case)
    logits = case.student.logits().requires_grad_()
    expected = whole("mixture_objective", case)
    mixed = ops.mixture_objective_from_hidden(**{**given, "logits": logits}, chunk_bytes=1)
    for a, b in zip(mixed, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.autograd.backward([o for o in mixed if o.requires_grad], [torch.ones_like(o) for o in mixed[:-1]])
    again = logits.detach().requires_grad_()
    constants = {"teacher": case.teacher.logits(), "target": case.target.logits()}
    other = ops.mixture_objective(**{**given, "logits": again, **constants})
    torch.autograd.backward([o for o in other if o.requires_grad], [torch.ones_like(o) for o in other[:-1]])
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(ops.mixture_objective(**{**given, **constants}), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    case = make(torch.float64, states=7, length=5, batch=2)
    # A head of the teacher's own, which would be perturbed with the student's otherwise.
    case = replace(case, teacher=Hidden(*(x.clone() for x in case.teacher[:3])))

    def run(states: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return hidden("mixture_objective", replace(case, student=Hidden(states, weight, bias)))[:-1]

    assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in case.student[:3]))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(backend, name):
    case = make().to(backend.device)
    plain = with_gradients(hidden, name, case)
    with torch.autocast(backend.device.type, torch.bfloat16):
        cast = with_gradients(hidden, name, case)
    for a, b in zip(plain[0] + plain[1], cast[0] + cast[1], strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("draws", [None, 3])
def test_samples(backend, draws):
    """The tokens and log-probabilities of the whole logits, where the product has the same bits."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make(dtype, exact=True).to(backend.device)
        keys = random.keys(3, 3, backend.device)
        options = {"draws": draws, "stream": 2, "temperature": 0.7, "first_position": 9}
        for rows in (case.teacher, case.target):
            expected = ops.sample_categorical(rows.logits(), keys, return_log_prob=True, **options)
            for chunk_bytes in (1, 50_000, 1 << 30):
                got = ops.sample_categorical_from_hidden(
                    rows, keys, return_log_prob=True, chunk_bytes=chunk_bytes, **options
                )
                assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))
            assert torch.equal(ops.sample_categorical(rows, keys, **options), expected[0])


def _registered(device: torch.device) -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of the registered operators: with all there is, and with as little as possible."""
    case = make(states=37, length=19).to(device)
    student = tuple(x.requires_grad_() for x in case.student[:3])
    certain = torch.where(case.tokens[:, :2] % 3 == 0, case.tokens[:, :2], -1)
    constants = case.teacher.states[:, None], case.teacher.weight.detach(), None, None, *case.target[:3], certain
    full = *student, *constants, case.tokens[:, 0], case.tokens, case.inside, case.weight, True, 1, 0
    least = student[0], student[1], None, *[None] * 9, case.tokens, None, None, False, 1, 1 << 20
    calls = []
    for inputs in (full, least):
        calls.append((torch.ops.di4c.mixture_hidden.default, inputs))
        joint, correlation, parts, *kept = (x.detach() for x in torch.ops.di4c.mixture_hidden(*inputs))
        tensors = [x.detach() if isinstance(x, Tensor) else x for x in inputs[:15]]
        grads = torch.ones_like(joint), torch.ones_like(correlation), torch.ones_like(parts)
        needs = [True, True, inputs[2] is not None]
        calls.append(
            (torch.ops.di4c.mixture_hidden_backward.default, (*grads, *tensors, joint, correlation, *kept, 1, needs))
        )
    keys = random.keys(0, 3, device)
    rows = [x.detach() for x in case.teacher[:3]]
    settings = 2, 1, 0.9, 0.8, True, 0, 1
    calls.append((torch.ops.di4c.sample_hidden.default, (*rows, certain[:, 0], keys, None, None, -1, *settings)))
    step = torch.where(case.tokens[:, 0] % 2 == 0, 37, 3), torch.full((3,), 0.5, dtype=torch.float64, device=device), 37
    calls.append((torch.ops.di4c.sample_hidden.default, (*rows[:2], None, None, keys, *step, *settings)))
    return calls


@pytest.mark.parametrize("call", range(6))
def test_opcheck(backend, call):
    torch.library.opcheck(*_registered(backend.device)[call])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@inductor_config.patch(force_disable_caches=True)
def test_compile_fullgraph(backend, compiler):
    if compiler == "inductor" and not backend.is_native:
        pytest.skip("compiled once")
    torch._dynamo.reset()

    def step(case: Case) -> Tensor:
        keys = random.keys(0, case.tokens.shape[0], case.tokens.device)
        drawn = ops.sample_categorical_from_hidden(case.target, keys, chunk_bytes=1)
        outputs = hidden("mixture_objective", replace(case, tokens=drawn))
        return sum(((o * o).sum() for o in outputs if o.requires_grad), torch.zeros(()))

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for batch in (3, 4) if compiler == "aot_eager" else (3,):
        case = make(states=37, batch=batch).to(backend.device)
        grads = []
        for f in (step, compiled):
            leaves = [x.detach().requires_grad_() for x in case.student[:3]]
            loss = f(replace(case, student=Hidden(*leaves)))
            loss.backward()
            grads.append([loss.detach(), *(x.grad for x in leaves)])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_one_dtype_is_asked_for():
    case = make()
    mixed = case.student._replace(states=case.student.states.bfloat16())
    with pytest.raises(TypeError, match=r"logits.weight must have the states' dtype torch.bfloat16, got torch.float32"):
        ops.mixture_log_prob(mixed, case.tokens)
    with pytest.raises(TypeError, match="logits must be a Hidden"):
        ops.mixture_log_prob_from_hidden(case.student.logits(), case.tokens)
    with pytest.raises(ValueError, match="keep_bytes"):
        ops.mixture_log_prob_from_hidden(case.student, case.tokens, keep_bytes=-1)


# Forward and backward at (B, L, D, H, S) = (1, 8, 128, 16, 8192), by how many bytes they raise the peak of memory.
_PEAK = """
import json, sys, torch
from di4c_ext import ops

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

def step(length, settings):
    states = torch.randn(1, 8, length, 16, requires_grad=True)
    weight = torch.randn(8192, 16, requires_grad=True)
    tokens = torch.randint(0, 8192, (1, 8, length))
    rows = ops.Hidden(states, weight)
    if settings is None:
        outputs = ops.mixture_log_prob(rows.logits(), tokens)
    else:
        outputs = ops.mixture_log_prob_from_hidden(rows, tokens, **settings)
    sum(o.sum() for o in outputs).backward()

settings = json.loads(sys.argv[1])
torch.set_num_threads(2)
step(16, settings)
with open("/proc/self/clear_refs", "w") as forget:
    forget.write("5")
before = resident("VmRSS")
step(128, settings)
print(resident("VmHWM") - before)
"""


def _peak(settings: dict[str, int] | None) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", _PEAK, json.dumps(settings)]
    return int(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


def test_peak(kernels):
    """The pieces' logits and those kept are all that grows; whole, they and their gradient are twice 34 MB."""
    if kernels.name != "cpu":
        pytest.skip("resident memory is the CPU's")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset: {error}")
    logits = 8 * 128 * 8192 * 4
    assert _peak(None) > 1.9 * logits
    assert _peak({"chunk_bytes": 1, "keep_bytes": 0}) < 0.3 * logits
    assert _peak({"chunk_bytes": 1, "keep_bytes": logits // 4}) < 0.55 * logits
