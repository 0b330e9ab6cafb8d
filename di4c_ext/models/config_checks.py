"""What the networks' configs check alike; each raises ValueError naming config, setting and the value received."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from di4c_ext.names import nearest


def integer(config: Any, name: str, value: object, least: int = 1) -> None:
    """`value`, the setting `name` or one of its numbers, is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{_of(config)}: {name} must be an integer of at least {least}, got {value!r}")


def integers(config: Any, names: Iterable[str], least: int = 1) -> None:
    """Each setting is an integer of at least `least`."""
    for name in names:
        integer(config, name, getattr(config, name), least)


def shares(config: Any, *names: str) -> None:
    """Each setting lies in [0, 1), as dropout does."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{_of(config)}: {name} must lie in [0, 1), got {getattr(config, name)!r}")


def positive(config: Any, *names: str) -> None:
    """Each setting is finite and greater than 0."""
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{_of(config)}: {name} must be finite and > 0, got {getattr(config, name)!r}")


def not_negative(config: Any, *names: str) -> None:
    """Each setting is finite and at least 0."""
    for name in names:
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(f"{_of(config)}: {name} must be finite and >= 0, got {getattr(config, name)!r}")


def one_of(config: Any, name: str, known: Iterable[str]) -> None:
    """The setting is one of the known words."""
    value, known = getattr(config, name), list(known)
    if value not in known:
        raise ValueError(
            f"{_of(config)}: {name} must be one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}"
        )


def even_embedding(config: Any, name: str) -> None:
    """Sines and cosines come in pairs, two at least."""
    value = getattr(config, name)
    if value < 4 or value % 2:
        raise ValueError(f"{_of(config)}: {name} must be even and at least 4, got {value}")


def token_latent(config: Any) -> None:
    """A latent that is one token is one number."""
    if config.latent_form == "token" and config.latent_dim != 1:
        raise ValueError(
            f"{_of(config)}: a latent that is one token, as published, is one number; got latent_dim "
            f"{config.latent_dim}. Set latent_form 'added' for more"
        )


def _of(config: Any) -> str:
    return type(config).__name__
