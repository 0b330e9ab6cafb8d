"""The memory of one training step of the published image-token system, in a process of its own.

    python benchmarks/tokens_step.py                              B = 2, L = 32, all but the network
    python benchmarks/tokens_step.py --by published               the same written the published way
    python benchmarks/tokens_step.py --layers 24 --latents 2      with the published network, 174,160,874 weights, of
                                                                  fewer latents; --micro_batch 1: one at a time

D = 256 codes, S = 1025 states, forward, losses and the gradient of every weight; no step before it. `growth` is the
peak of the resident size (on a GPU: of what torch allocated) over what was there before the step, so the network's
output, its gradient and everything between are in it; weights and data are not. `activations` is what one sequence of
the student leaves for the backward, counted where autograd saves it, without weights and without the logits. On a CPU
attention drops nothing, because there torch makes the probabilities where it does; on a GPU a tenth, as published.

Prints a row of results/tokens.md. Without a network, exit code 1 where growth of ours is not under LIMIT.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_tokens import FULL, GROWTH_LIMIT, Setting, latents, ours, published_way, standing_in, with_network
from measuring import memory_growth
from torch import Tensor, nn

from di4c_ext import random

LIMIT = GROWTH_LIMIT


def saved(model: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes that call() leaves for a backward, but for weights and what it returns."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    kept.pop(result.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def activations(s: Setting, by: str) -> int:
    """Of one sequence of the student, bytes."""
    x, labels, device = s.x_0[:1], s.labels[:1], s.x_0.device
    z = latents(random.keys(0, 1, device), 1)[:, 0]
    if by == "published":
        network = s.called(s.student, True)
        return saved(s.student, lambda: network(x, labels, z))
    return saved(s.student, lambda: s.student(x, None, z, labels=labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=["di4c", "published"], default="di4c", help="ours, or the published way")
    parser.add_argument("--layers", type=int, default=0, help="of the network; 0: a head alone in its place")
    parser.add_argument("--batch", type=int, default=FULL[0], help="B, images")
    parser.add_argument("--latents", type=int, default=FULL[1], help="L, latents and targets of an image")
    parser.add_argument(
        "--micro_batch", type=int, default=None, help="latents of an image whose activations live at once"
    )
    parser.add_argument("--threads", type=int, default=None, help="of torch on a CPU; default: as it comes")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.batch, arguments.latents
    s = with_network(*size, device, num_layers=arguments.layers) if arguments.layers else standing_in(*size, device)
    more: dict[str, Any] = {} if arguments.by == "published" else {"latent_micro_batch": arguments.micro_batch}
    loss = published_way if arguments.by == "published" else ours
    parameters = list(s.student.parameters())
    found: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        value = loss(s, **more)
        torch.autograd.grad(value, parameters, allow_unused=True)
        found.extend((value.item(), time.perf_counter() - start))

    growth = memory_growth(step, device)
    each = activations(s, arguments.by) if arguments.layers else 0
    value, seconds = found
    weights = sum(parameter.numel() for parameter in parameters)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{weights:,} weights; loss {value:.4f}; {name}")
    print("| by | layers | B | L | latents at a time | growth, MB | activations of a sequence, MB | seconds |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    at_once = arguments.micro_batch or arguments.latents
    shown = "" if growth is None else f"{growth / 1e6:.0f}"
    print(
        f"| {arguments.by} | {arguments.layers} | {size[0]} | {size[1]} | {at_once} | {shown} "
        f"| {each / 1e6:.0f} | {seconds:.1f} |",
        flush=True,
    )
    raise SystemExit(not arguments.layers and arguments.by == "di4c" and (growth is None or growth >= LIMIT))


if __name__ == "__main__":
    main()
