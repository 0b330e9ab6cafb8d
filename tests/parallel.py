"""Real processes for tests: alone, to be killed, or several as the ranks of one run that talk by gloo.

They come from one server that has imported what they need, so that each begins at once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["di4c_ext.trainer", "di4c_ext.models", "di4c_ext.data"])


def alone(job: Callable[..., None], *args: Any) -> Any:
    """job(*args) in a process of its own, which has been started."""
    process = _context.Process(target=_run, args=({}, None, job, args), daemon=True)
    process.start()
    return process


def together(count: int, job: Callable[..., None], *args: Any, seconds: float = 300) -> None:
    """job(*args) in `count` processes of one run; raises AssertionError with what went wrong in them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    told, tell = _context.Pipe(duplex=False)
    processes = []
    for rank in range(count):
        environment = places | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _context.Process(target=_run, args=(environment, tell, job, args), daemon=True)
        process.start()
        processes.append(process)
    tell.close()
    fault = f"not done after {seconds} seconds"
    if told.poll(seconds):
        try:
            fault = told.recv()
        except EOFError:  # all have ended and none had anything to tell
            fault = ""
    for process in processes:
        process.join(None if not fault else 1)
        process.kill()
    assert not fault, fault
    assert [process.exitcode for process in processes] == [0] * count


def _run(environment: dict[str, str], tell: Any, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        job(*args)
    except BaseException:
        if tell is None:
            raise
        tell.send(f"process {environment['RANK']}: {traceback.format_exc()}")
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_of_timing(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without those that hang on the machine."""
    from di4c_ext.callbacks import read_metrics, untimed

    return [untimed(line) for line in read_metrics(folder / "metrics.jsonl")]
