"""A process by its name and constants, as configs and flags have it: {"name": "gaussian", "rate_sigma": 3}."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from di4c_ext.names import check_names, nearest
from di4c_ext.process.absorbing import AbsorbingProcess
from di4c_ext.process.base import Process
from di4c_ext.process.confidence import ConfidenceProcess
from di4c_ext.process.gaussian import GaussianProcess
from di4c_ext.process.uniform import UniformProcess

PROCESSES: dict[str, Any] = {
    "absorbing": AbsorbingProcess,
    "gaussian": GaussianProcess,
    "uniform": UniformProcess,
    "confidence": ConfidenceProcess,
}
LEVEL_PROCESSES = ("gaussian", "uniform")  # whose states are all of the data's: the pixel network's


def process_from(settings: Mapping[str, Any], num_states: int, where: str = "process") -> Process:
    """The process over S = num_states states that `settings` describe: its "name", and constants of its class.

    where: the flag or argument that the settings came by, for messages. Raises ValueError for an unknown name, a
    constant that the process does not have, and one it cannot have.
    """
    name, known = settings.get("name"), ", ".join(PROCESSES)
    if name not in PROCESSES:
        hint = nearest(str(name), PROCESSES)
        raise ValueError(f'{where}: "name" must be one of {known}, got {name!r}{hint}')
    made = PROCESSES[name]
    constants = {key: value for key, value in settings.items() if key != "name"}
    fixed = ("num_states", "mask_id") if name == "confidence" else ("num_states",)
    check_names(f"{where} ({name})", constants, made, fixed)
    for key, value in constants.items():
        wanted = inspect.signature(made).parameters[key].default
        if isinstance(wanted, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where} ({name}): {key} must be a number, got {value!r}")
        if isinstance(wanted, str) and not isinstance(value, str):
            raise ValueError(f"{where} ({name}): {key} must be a name, got {value!r}")
    try:
        process: Process = made(num_states, **constants)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return process
