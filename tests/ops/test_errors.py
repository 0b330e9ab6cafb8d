"""Bad input is refused with the op, the argument, what came and what is expected; nothing is read or written first."""

from __future__ import annotations

import re

import pytest
import torch
from cases import OPS, READS_TARGET, make

from di4c_ext import ops, random

X = torch.zeros(2, 3, 5)  # (B, D, S)
X4 = torch.zeros(2, 4, 3, 5)  # (B, L, D, S)
KEYS = random.keys(0, 2)
T = torch.zeros(2, 3, dtype=torch.int64)
W = torch.ones(2, 3)


def _step(**changes):
    given = dict(logits=X, x_t=T, keys=KEYS, unmask_prob=0.5, mask_id=5)
    return ops.absorbing_step(**{**given, **changes})


CASES = [
    (
        lambda: ops.sample_categorical([1.0], KEYS),
        TypeError,
        "sample_categorical: logits must be a tensor (B, ..., S), got list",
    ),
    (
        lambda: ops.sample_categorical(X.long(), KEYS),
        TypeError,
        "sample_categorical: logits must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    (
        lambda: ops.sample_categorical(X[0, 0], KEYS),
        ValueError,
        "sample_categorical: logits must have shape (B, ..., S), got (5,)",
    ),
    (
        lambda: ops.sample_categorical(X[..., :0], KEYS),
        ValueError,
        "logits must have between 1 and 262144 classes in its last dimension, got 0",
    ),
    (
        lambda: ops.sample_categorical(X[..., :1].expand(2, 3, 262145), KEYS),
        ValueError,
        "between 1 and 262144 classes in its last dimension, got 262145",
    ),
    (
        lambda: ops.sample_categorical(X, KEYS[:1]),
        ValueError,
        "sample_categorical: keys must have shape (B,) = (2,), got (1,)",
    ),
    (
        lambda: ops.sample_categorical(X, KEYS.int()),
        TypeError,
        "sample_categorical: keys must be int64, got torch.int32",
    ),
    (lambda: ops.sample_categorical(X, 7), TypeError, "sample_categorical: keys must be an int64 tensor (B,), got int"),
    (
        lambda: ops.sample_categorical(X, KEYS.to("meta")),
        ValueError,
        "sample_categorical: keys must be on cpu like the logits, got meta",
    ),
    (
        lambda: ops.sample_categorical(X, KEYS, draws=-1),
        ValueError,
        "sample_categorical: draws must be an integer >= 0, got -1",
    ),
    (
        lambda: ops.sample_categorical(X, KEYS, stream=-1),
        ValueError,
        "sample_categorical: stream must be an integer in [0, 2^31 - 1), got -1",
    ),
    (
        lambda: ops.sample_categorical(X, KEYS, temperature=-1.0),
        ValueError,
        "sample_categorical: temperature must be finite and >= 0 (0 takes the largest logit), got -1.0",
    ),
    (
        lambda: ops.sample_categorical(X, KEYS, temperature=float("nan")),
        ValueError,
        "temperature must be finite and >= 0 (0 takes the largest logit), got nan",
    ),
    (lambda: _step(logits=X4), ValueError, "absorbing_step: logits must have shape (B, D, S), got (2, 4, 3, 5)"),
    (lambda: _step(x_t=T[:, :2]), ValueError, "absorbing_step: x_t must have shape (B, D) = (2, 3), got (2, 2)"),
    (lambda: _step(x_t=T.float()), TypeError, "absorbing_step: x_t must be int64, got torch.float32"),
    (lambda: _step(unmask_prob=1.5), ValueError, "absorbing_step: unmask_prob must lie in [0, 1], got 1.5"),
    (
        lambda: _step(unmask_prob=torch.tensor([0.5, 1.25])),
        ValueError,
        "absorbing_step: unmask_prob must lie in [0, 1] everywhere, got 1.25",
    ),
    (
        lambda: _step(unmask_prob=torch.tensor([0.5, float("nan")])),
        ValueError,
        "unmask_prob must lie in [0, 1] everywhere, got nan",
    ),
    (
        lambda: _step(unmask_prob=torch.tensor([0.5])),
        ValueError,
        "unmask_prob must be a number or a floating tensor (B,) = (2,), got torch.float32 of shape (1,)",
    ),
    (lambda: _step(mask_id=-1), ValueError, "absorbing_step: mask_id must be an integer >= 0, got -1"),
    (
        lambda: ops.mixture_log_prob(X, T[:, None]),
        ValueError,
        "mixture_log_prob: logits must have shape (B, L, D, S), got (2, 3, 5)",
    ),
    (
        lambda: ops.mixture_log_prob(X4[:, :0], T[:, None]),
        ValueError,
        "mixture_log_prob: L, the second dimension of logits, must be an integer >= 1, got 0",
    ),
    (
        lambda: ops.mixture_log_prob(X4, T),
        ValueError,
        "mixture_log_prob: tokens must be an int64 tensor (B, K, D), got shape (2, 3)",
    ),
    (
        lambda: ops.mixture_log_prob(X4, T[:, None, :2]),
        ValueError,
        "mixture_log_prob: tokens must have shape (B, K, D) = (2, 1, 3), got (2, 1, 2)",
    ),
    (
        lambda: ops.mixture_log_prob(X4, T[:, None] + 5),
        ValueError,
        "mixture_log_prob: tokens must lie in [0, S) = [0, 5) where the weight is not 0, got 5 at index "
        "(0, 0, 0); give such positions weight 0",
    ),
    (lambda: ops.mixture_log_prob(X4, T[:, None] - 1), ValueError, "got -1 at index (0, 0, 0)"),
    (
        lambda: ops.mixture_kl(X[:, :2], X4),
        ValueError,
        "mixture_kl: target (B, D, S) or (B, T, D, S) must have the logits' B, D, S = (2, 3, 5), got shape (2, 2, 5)",
    ),
    (
        lambda: ops.mixture_kl(X4[:, :0], X4),
        ValueError,
        "mixture_kl: T, the second dimension of target, must be an integer >= 1, got 0",
    ),
    (lambda: ops.masked_kl(X4, X4), ValueError, "masked_kl: target must have shape (B, D, S), got (2, 4, 3, 5)"),
    (
        lambda: ops.masked_js(X, X[0]),
        ValueError,
        "masked_js: logits must have shape (B, D, S) or (B, L, D, S), got (3, 5)",
    ),
    (
        lambda: ops.masked_tv(X[:1], X),
        ValueError,
        "masked_tv: target (B, D, S) must have the logits' B, D, S = (2, 3, 5), got shape (1, 3, 5)",
    ),
    (
        lambda: ops.masked_reverse_kl(X, X, W[:, :2]),
        ValueError,
        "masked_reverse_kl: weight must have shape (B, D) = (2, 3), got (2, 2)",
    ),
    (lambda: ops.masked_kl(X, X, 1.0), TypeError, "masked_kl: weight must be None or a tensor (B, D), got float"),
    (lambda: ops.masked_kl(X, X, -W), ValueError, "masked_kl: weight must be >= 0 everywhere, got -1.0"),
    (lambda: ops.masked_kl(X, X, W * float("nan")), ValueError, "masked_kl: weight must be >= 0 everywhere, got nan"),
    (
        lambda: ops.masked_kl(X, X, W.clone().requires_grad_()),
        ValueError,
        "masked_kl: weight is a constant of this op but requires grad; pass weight.detach()",
    ),
    (
        lambda: ops.masked_cross_entropy(X, T + 7),
        ValueError,
        "masked_cross_entropy: tokens must lie in [0, S) = [0, 5) where the weight is not 0, got 7 at index (0, 0)",
    ),
    (
        lambda: ops.masked_cross_entropy(X, T[None]),
        ValueError,
        "masked_cross_entropy: tokens must have shape (B, D) = (2, 3), got (1, 2, 3)",
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_message(backend, case):
    if backend.name == "cuda":
        pytest.skip("checks before the op are the same; values are not looked at on CUDA")
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.parametrize("name", READS_TARGET)
def test_target_that_requires_grad(name):
    i = make(5)
    i.target.requires_grad_()
    i.targets.requires_grad_()
    with pytest.raises(
        ValueError, match=re.escape("target is a constant of this op but requires grad; pass target.detach()")
    ):
        OPS[name](i)
    with torch.no_grad():
        OPS[name](i)


def test_tokens_on_cuda_are_not_looked_at():
    """On CUDA nothing is raised (that would stop the host): the sample's value is NaN, its neighbours are right."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    i = make(5, weighted=False).to(torch.device("cuda"))
    good = ops.mixture_log_prob(i.logits, i.tokens)[0], ops.masked_cross_entropy(i.logits, i.tokens[:, 0])
    tokens = i.tokens.clone()
    tokens[1, 0, 2] = 1 << 40
    for value, expected in zip(
        (ops.mixture_log_prob(i.logits, tokens)[0], ops.masked_cross_entropy(i.logits, tokens[:, 0])), good, strict=True
    ):
        assert torch.equal(value[0], expected[0]) and value[1].flatten()[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.bfloat16])
def test_weights_of_any_dtype(backend, dtype):
    """A mask of the positions still noised can be handed in as it is."""
    i = make(8).to(backend.device)
    mask = i.weight > 0
    for name in ("masked_kl", "mixture_kl"):
        op = getattr(ops, name)
        assert torch.equal(op(i.target, i.logits, mask.to(dtype)), op(i.target, i.logits, mask.float()))
