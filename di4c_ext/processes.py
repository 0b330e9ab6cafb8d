"""Several processes as one run (torchrun, accelerate launch): who writes, who waits, what all of them agree on.

Everything here works as well where there is one process, and then talks to nobody. What processes tell each other is
JSON, so that nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class FailedElsewhereError(ValueError):
    """The first process could not do what all wait for; it has said why."""


def connected() -> bool:
    """Whether the processes can talk to each other by now."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if connected() else int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This process's number, 0 the first."""
    return dist.get_rank() if connected() else int(os.environ.get("RANK") or 0)


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def wait() -> None:
    """Returns once every process has come here."""
    if connected():
        tell_all(None)


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives in the first process, JSON, in every process; the others wait for it.

    Raises what it raises in the first process, FailedElsewhereError in the others.
    """
    if not connected() or count() == 1:
        return action()
    told: dict[str, Any] = {}
    failure: Exception | None = None
    if is_first():
        try:
            told["value"] = action()
        except Exception as error:  # the others must hear of it, whatever it is
            failure, told["error"] = error, str(error)
    first = tell_all(told)[0]
    if failure is not None:
        raise failure
    if "error" in first:
        raise FailedElsewhereError(first["error"])
    value: T = first["value"]
    return value


def first_alone(action: Callable[[], T]) -> T:
    """What `action` gives, in every process; in the first before all others, which then find what it has kept."""
    made: list[T] = []
    on_first(lambda: made.append(action()))
    return made[0] if made else action()


def say(text: object) -> None:
    """Prints, in the first process."""
    if is_first():
        print(text)


def tell_all(value: Any) -> list[Any]:
    """What every process gave, in their order; anything that JSON can hold."""
    if not connected() or count() == 1:
        return [value]
    told = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    sizes = [told.new_zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, sizes[0].new_tensor([len(told)]))
    longest = max(int(size) for size in sizes)
    texts = [told.new_zeros(longest) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(told, (0, longest - len(told))))
    return [json.loads(bytes(text[: int(n)].tolist())) for text, n in zip(texts, sizes, strict=True)]


def any_of(flag: bool | Tensor) -> bool:
    """Whether the flag is set in any process; waits for the device where it is a tensor."""
    if not connected() or count() == 1:
        return bool(flag)
    found = torch.as_tensor(flag, device=_device()).to(torch.int32).reshape(1)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def total(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if connected() and count() > 1:
        value = value.to(_device(), copy=True)
        dist.all_reduce(value)
    return value


def _device() -> torch.device:
    """Where the processes' way of talking wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
