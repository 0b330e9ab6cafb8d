"""Every CUDA kernel once, for the tools that watch kernels, its results held against the CPU's.

    python benchmarks/once.py               rows of every launch class, small: for compute-sanitizer
    python benchmarks/once.py B L D S       one size alone: for a profiler

Inputs are made on the CPU, so that hardly any kernel but ours runs. Exit code 1 where a result differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from di4c_ext import ops, random

# Warps on a row, blocks on a row, split rows; odd sizes, so that rows begin at any alignment.
SMALL = [(2, 3, 5, states) for states in (1, 17, 255, 1025, 4099, 50258)]
TABLES = 4099  # states up to which tables of S x S are made
PROFILED = (torch.float32,)
CLOSE = {torch.float32: 2e-3, torch.bfloat16: 2e-2}

Call = tuple[str, Callable[[torch.device], list[Tensor]]]


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Call]:
    """Name, and what computes the results on a device: values and the gradient of the logits."""
    B, L, D, S = shape
    g = torch.Generator().manual_seed(S)
    logits, teacher, target = (
        torch.randn(sizes, generator=g).mul_(2).to(dtype) for sizes in ((B, L, D, S), (B, D, S), (B, L, D, S))
    )
    data, samples = (torch.randint(0, S, sizes, generator=g) for sizes in ((B, D), (B, L, D)))
    weight = torch.randint(0, 2, (B, D), generator=g).float()
    inside = torch.arange(B) % 2 == 0
    keys, x_t = random.keys(0, B), torch.where(weight > 0, S, data)

    def gradient(loss: Callable[..., list[Tensor]], *given: Tensor) -> Callable[[torch.device], list[Tensor]]:
        def run(device: torch.device) -> list[Tensor]:
            x = logits.to(device).requires_grad_()
            values = loss(x, *(tensor.to(device) for tensor in given))
            total = torch.stack([value.float().sum() for value in values]).sum()
            return [*values, torch.autograd.grad(total, x)[0]]

        return run

    def objective(x: Tensor, t: Tensor, y: Tensor, d: Tensor, s: Tensor, w: Tensor, i: Tensor) -> list[Tensor]:
        return list(ops.mixture_objective(x, teacher=t, data=d, samples=s, target=y, weight=w, inside=i))[:-1]

    yield "sample", lambda device: [ops.sample_categorical(logits.to(device), keys.to(device))]
    yield (
        "absorbing_step",
        lambda device: [
            ops.absorbing_step(teacher.to(device), x_t.to(device), keys.to(device), unmask_prob=0.5, mask_id=S, draws=3)
        ],
    )
    if S <= TABLES:
        left, right = torch.rand(2, S, S, generator=g, dtype=torch.float64).unbind()
        yield (
            "sample_product",
            lambda device: [
                ops.sample_product(*(tensor.to(device) for tensor in (left, right, data, samples, keys)), base=None)
            ],
        )
    yield "random_bits", lambda device: [ops.random_bits(keys.to(device), 100, stream_word=0)]
    yield "mixture_log_prob", gradient(lambda x, s, w: list(ops.mixture_log_prob(x, s, w)), samples, weight)
    yield "mixture_kl", gradient(lambda x, t, w: [ops.mixture_kl(t, x, w)], teacher, weight)
    yield "mixture_objective", gradient(objective, teacher, target, data, samples, weight, inside)
    for divergence in (ops.masked_kl, ops.masked_reverse_kl, ops.masked_js, ops.masked_tv):
        yield divergence.__name__, gradient(lambda x, t, w, f=divergence: [f(t, x, w)], teacher, weight)
    yield "masked_cross_entropy", gradient(lambda x, d, w: [ops.masked_cross_entropy(x, d, w)], data, weight)


def logistic(shape: tuple[int, ...]) -> Iterator[Call]:
    """The same mixture and draws from means and log-scales."""
    B, L, D, S = shape
    g = torch.Generator().manual_seed(S)
    mean, log_scale = torch.randn(B, L, D, generator=g) / 2, torch.randn(B, L, D, generator=g) / 2 + 1
    samples, keys = torch.randint(0, S, (B, L, D), generator=g), random.keys(0, B)

    def run(device: torch.device) -> list[Tensor]:
        m, s = mean.to(device).requires_grad_(), log_scale.to(device).requires_grad_()
        head = ops.Logistic(m, s, S)
        teacher = ops.Logistic(m[:, 0].detach(), s[:, 0].detach(), S)
        joint, correlation = ops.mixture_log_prob(head, samples.to(device))
        kl = ops.mixture_kl(teacher, head)
        total = joint.sum() + correlation.sum() + kl.sum()
        return [joint, correlation, kl, *torch.autograd.grad(total, (m, s))]

    yield "logistic mixture", run
    yield (
        "logistic sample",
        lambda device: [
            ops.sample_categorical(ops.Logistic(mean.to(device), log_scale.to(device), S), keys.to(device))
        ],
    )


def differ(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> bool:
    """Draws may differ where one falls within rounding of a boundary: one in a thousand is let pass."""
    for a, b in zip(ours, theirs, strict=True):
        if not a.is_floating_point():
            if (a.cpu() != b).float().mean() > 1e-3:
                return True
        elif not torch.allclose(a.cpu().float(), b.float(), rtol=tolerance, atol=tolerance):
            return True
    return False


def main() -> None:
    if len(sys.argv) not in (1, 5):
        raise SystemExit(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("once.py: no GPU that torch can use")
    given = tuple(int(size) for size in sys.argv[1:])
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    wrong = 0
    for shape in [given] if given else SMALL:
        every = [(call, dtype) for dtype in (PROFILED if given else CLOSE) for call in calls(shape, dtype)]
        every += [(call, torch.float32) for call in logistic(shape)] if 1 < shape[3] <= 1025 else []
        for (name, run), dtype in every:
            found = run(cuda)
            bad = not given and differ(found, run(cpu), CLOSE[dtype])
            wrong += bad
            if bad or given:
                print(f"{name} {shape} {dtype}: {'DIFFERS from the CPU' if bad else 'ran'}", flush=True)
    torch.cuda.synchronize()
    print(f"{wrong} results differ")
    raise SystemExit(min(wrong, 1))


if __name__ == "__main__":
    main()
