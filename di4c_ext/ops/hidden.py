"""The mixture's functions and the sampler on hidden states and a head: logits made piece by piece, never kept whole.

At 50,000 states the logits are the memory: L = 16 components of 256 positions are 823 MB in float32, and a plain step
holds several tensors of their size. Here logits, teacher and target may each be a `Hidden`: the last layer's states
(B, L, D, H) with its weight (S, H) and bias. Memory beyond the inputs and gradients is `chunk_bytes` for the logits of
one piece and `keep_bytes` for what is kept of logits for backward; what is not kept is made again there, for one more
matrix product.
The ops of ops/mixture.py take a `Hidden` too and call these with the numbers below.

Positions of weight 0 cost nothing, not even a matrix product, and neither do the targets of samples `inside`. To know
how many remain, the host waits for the device once forward and once backward, but not while a CUDA graph is captured:
there every position is computed. Forward and backward of one call must both be captured or neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

import di4c_ext.ops.hidden_op  # registers di4c::mixture_hidden
import di4c_ext.ops.sample_hidden_op  # noqa: F401  (registers di4c::sample_hidden)
from di4c_ext.ops import checks, mixture_op, operands
from di4c_ext.ops.logits import Hidden, Logistic, Logits
from di4c_ext.ops.reference import MixtureObjective
from di4c_ext.ops.reference.objective import MARGINAL_TARGET
from di4c_ext.ops.truncation import check_top_p

CHUNK_BYTES = 128 << 20  # logits of one piece, of student, teacher and target together; 16 positions at least
KEEP_BYTES = 256 << 20  # kept from forward to backward: the target's mixture, then logits of the student


def mixture_log_prob_from_hidden(
    logits: Hidden,
    tokens: Tensor,
    weight: Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Tensor, Tensor]:
    """`mixture_log_prob` of logits.states @ logits.weight.T + logits.bias, differentiable in all three.

    Args:
        logits: of (B, L, D, S), states, weight and bias of one dtype.
        tokens, weight: as there.
        chunk_bytes: >= 1, logits made at a time; 16 positions of a sample whatever they take.
        keep_bytes: >= 0, logits kept for backward instead of made again; nothing is kept without a gradient.

    Returns:
        As `mixture_log_prob`; the same bits as for the same logits, where no weight is 0.

    Raises:
        As there; TypeError where nothing is a Hidden or dtypes within one differ.
    """
    op = "mixture_log_prob_from_hidden"
    x = operands.mixture(op, logits)
    checks.sequences(op, "tokens", tokens, x)
    w = checks.weight(op, weight, x)
    joint, correlation, *_ = _call(op, x, None, None, None, tokens, None, w, False, chunk_bytes, keep_bytes)
    return joint, correlation


def mixture_kl_from_hidden(
    target: Logits,
    logits: Logits,
    weight: Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    keep_bytes: int = KEEP_BYTES,
) -> Tensor:
    """`mixture_kl` where target, logits or both are Hidden; the target is a constant, its head may require grad.

    Arguments, value and errors as there and in `mixture_log_prob_from_hidden`.
    """
    op = "mixture_kl_from_hidden"
    x = operands.mixture(op, logits)
    y = operands.target(op, target, x)
    w = checks.weight(op, weight, x)
    return _call(op, x, None, y, None, None, None, w, False, chunk_bytes, keep_bytes)[2][MARGINAL_TARGET]


def mixture_objective_from_hidden(
    logits: Logits,
    *,
    teacher: Logits,
    data: Tensor | None = None,
    samples: Tensor | None = None,
    target: Logits | None = None,
    weight: Tensor | None = None,
    inside: Tensor | None = None,
    information: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    keep_bytes: int = KEEP_BYTES,
) -> MixtureObjective:
    """`mixture_objective` where logits, teacher, target or several of them are Hidden.

    Teacher and target are constants, but their heads may require grad: they are often the student's own. A Hidden
    teacher may be a mixture (B, T, D, S), which enters by its mean: log mean_t softmax is made piece by piece.

    Arguments, values and errors as there and in `mixture_log_prob_from_hidden`.
    """
    op = "mixture_objective_from_hidden"
    x = operands.mixture(op, logits)
    t = operands.teacher(op, teacher, x)
    y = None if target is None else operands.target(op, target, x)
    if data is not None:
        checks.indices(op, "data", data, (x.shape[0], x.shape[2]), "(B, D)", x)
    if samples is not None:
        checks.sequences(op, "samples", samples, x)
    w, within = checks.weight(op, weight, x), checks.inside(op, inside, x)
    settings = information, chunk_bytes, keep_bytes
    joint, correlation, parts, *_ = _call(op, x, t, y, data, samples, within, w, *settings)
    return mixture_op.objective_of(joint, correlation, parts, data is not None)


def sample_categorical_from_hidden(
    logits: Hidden,
    keys: Tensor,
    *,
    draws: int | None = None,
    stream: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    return_log_prob: bool = False,
    first_position: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sample_categorical` of logits.states @ logits.weight.T + logits.bias.

    Args:
        logits: of (B, D, S) or (B, L, D, S), states, weight and bias of one dtype. Rows whose class is certain are not
            made.
        keys, draws, stream, temperature, top_p, return_log_prob, first_position: as there.
        chunk_bytes: >= 1, logits made at a time; 16 positions of a sample whatever they take.

    Returns, Raises:
        As there: the same tokens, where the matrix product gives the same logits.
    """
    op = "sample_categorical_from_hidden"
    if not isinstance(logits, Hidden):
        raise TypeError(f"{op}: logits must be a Hidden, got {type(logits).__name__}")
    x = operands.hidden(op, "logits", logits, (3, 4), "(B, D, H) or (B, L, D, H)")
    batch, middle = x.shape[0], x.shape[1:-1]
    checks.indices(op, "keys", keys, (batch,), "(B,)", x)
    number = checks.draws(op, draws)
    checks.count(op, "first_position", first_position)
    checks.count(op, "chunk_bytes", chunk_bytes, 1)
    checks.stream(op, stream)
    checks.temperature(op, temperature)
    check_top_p(op, top_p)
    _one_dtype(op, "logits", x)
    tokens, log_prob = torch.ops.di4c.sample_hidden(
        x.states.detach().flatten(1, -2),
        x.weight.detach(),
        None if x.bias is None else x.bias.detach(),
        None if x.certain is None else x.certain.flatten(1),
        keys,
        None,
        None,
        -1,
        number,
        stream,
        float(temperature),
        float(top_p),
        return_log_prob,
        first_position,
        chunk_bytes,
    )
    out = (batch, *middle) if draws is None else (batch, draws, *middle)
    return (tokens.view(out), log_prob.view(out)) if return_log_prob else tokens.view(out)


def absorbing_step_from_hidden(
    logits: Hidden,
    x_t: Tensor,
    keys: Tensor,
    unmask_prob: Tensor,
    *,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    top_p: float,
    return_log_prob: bool,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """`absorbing_step` of a Hidden (B, D, S), arguments checked there: (B, n, D) tokens and their log-probabilities."""
    x = operands.hidden("absorbing_step", "logits", logits, (3,), "(B, D, H)")
    _one_dtype("absorbing_step", "logits", x)
    step: tuple[Tensor, Tensor] = torch.ops.di4c.sample_hidden(
        x.states.detach(),
        x.weight.detach(),
        None if x.bias is None else x.bias.detach(),
        x.certain,
        keys,
        x_t,
        unmask_prob,
        mask_id,
        draws,
        stream,
        float(temperature),
        float(top_p),
        return_log_prob,
        0,
        chunk_bytes,
    )
    return step


def _call(
    op: str,
    logits: Logits,
    teacher: Logits | None,
    target: Logits | None,
    first: Tensor | None,
    tokens: Tensor | None,
    inside: Tensor | None,
    weight: Tensor | None,
    information: bool,
    chunk_bytes: int,
    keep_bytes: int,
) -> tuple[Tensor, ...]:
    """The outputs of di4c::mixture; arguments checked, teacher (B, D, S) or (B, T, D, S), target (B, T, D, S)."""
    named = {"logits": logits, "teacher": teacher, "target": target}
    if not any(isinstance(value, Hidden) for value in named.values()):
        raise TypeError(f"{op}: {' or '.join(n for n, v in named.items() if v is not None)} must be a Hidden")
    checks.count(op, "chunk_bytes", chunk_bytes, 1)
    checks.count(op, "keep_bytes", keep_bytes)
    tensors = [part for name, value in named.items() for part in _parts(op, name, value)]
    if isinstance(logits, Hidden) and logits.certain is not None:
        raise ValueError(f"{op}: logits.certain must be None: what is certain has no gradient; give it weight 0")
    tensors.pop(3)  # the logits' own, which is None
    # Constants are detached: their heads may be parameters.
    constants = [None if x is None else x.detach() for x in tensors[3:]]
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:3])
    keep = keep_bytes if needs_gradient else 0
    return torch.ops.di4c.mixture_hidden(
        *tensors[:3], *constants, first, tokens, inside, weight, information, chunk_bytes, keep
    )


def _parts(op: str, name: str, value: Logits | None) -> tuple[Tensor | None, ...]:
    """Data (B, N, D, .), weight, bias and what is certain as the operator takes them; a Logistic becomes logits."""
    if isinstance(value, Logistic):
        value = value.logits()
    if isinstance(value, Hidden):
        _one_dtype(op, name, value)
        return tuple(value if len(value.shape) == 4 else operands.one_component(value))
    return value.unsqueeze(1) if value is not None and value.dim() == 3 else value, None, None, None


def _one_dtype(op: str, name: str, value: Hidden) -> None:
    for field, x in (("weight", value.weight), ("bias", value.bias)):
        if x is not None and x.dtype != value.dtype:
            raise TypeError(
                f"{op}: {name}.{field} must have the states' dtype {value.dtype}, got {x.dtype}; "
                f"pass {field}.to({value.dtype})"
            )
