"""Settings in YAML: read without trust in who wrote them, written as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_MOST = 100_000  # values that a file may hold


class UsageError(ValueError):
    """The command line or a file it names is wrong; the message says what and how to mend it."""


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UsageError where there is none."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file}: not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if _expanded(content, {}) > _MOST:
        raise UsageError(f"--config {file}: its aliases stand for more than {_MOST} values; write out what is meant")
    if not isinstance(content, dict):
        raise UsageError(f"--config {file}: holds a {type(content).__name__}; write `key: value` lines")
    return {str(key): value for key, value in content.items()}


def _expanded(value: Any, known: dict[int, int]) -> int:
    """How many values there are once every alias is written out; aliases of aliases multiply."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST + 1  # what holds itself has no end
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(item, known) for item in inside)
    return known[id(value)]


def read_stored(file: Path) -> dict[str, Any]:
    """What the run to resume was told; raises UsageError where there is none."""
    if not file.is_file():
        raise UsageError(f"--resume: {file.parent} holds no {file.name}, no run to go on with; leave --resume out")
    return read_yaml(file)


def as_yaml(settings: dict[str, Any]) -> str:
    """`key: value` lines in the order given, lists and mappings on one line."""
    return yaml.safe_dump(settings, sort_keys=False, width=110, default_flow_style=None)
