"""Where the time of training goes: seconds by name, of which an inner span's are not counted to the outer one.

On a GPU the spans are measured by events of the stream, and nothing waits until the figures are asked for.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

SPANS = ("data", "teacher", "student", "loss")


class Stopwatch:
    """`with watch.span("teacher"): ...`; `take` gives the seconds of each name and of the wall, and begins anew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._open: list[str] = []
        self._mark: Any = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._start = time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Counts the time within to `name`, but for spans within it."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Closes the account of the innermost open span and begins the next one's."""
        now = self._now()
        if self._open:
            if self.device.type == "cuda":
                self._events.append((self._open[-1], self._mark, now))
            else:
                self._seconds[self._open[-1]] += now - self._mark
        self._mark = now

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[dict[str, float], float]:
        """(seconds by name, seconds of the wall) since the last call."""
        if self._events:
            self._events[-1][2].synchronize()
            for name, first, last in self._events:
                self._seconds[name] += first.elapsed_time(last) / 1000
            self._events = []
        now = time.perf_counter()
        seconds, wall = dict(self._seconds), now - self._start
        self._seconds, self._start = defaultdict(float), now
        return seconds, wall


class Called(nn.Module):
    """A network as a loss calls it: in the precision of training, its time counted to `name`."""

    def __init__(
        self, network: nn.Module, watch: Stopwatch, name: str, precision: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.network = network
        self._around = watch, name, precision

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        watch, name, precision = self._around
        with watch.span(name), precision():
            return self.network(*args, **kwargs)


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU so far, or that the whole process took in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
