"""Names that users write: settings held against what takes them, and the nearest known name for one that is not."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def nearest(key: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for the known name closest to `key`, or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_names(where: str, settings: Mapping[str, Any], takes: Any, fixed: Sequence[str] = ()) -> None:
    """Raises ValueError for a setting that `takes` (a callable) has no argument for, or that `fixed` decides.

    where: the flag or argument that the settings came by, for the message.
    """
    known = [name for name in inspect.signature(takes).parameters if name not in ("self", "kwargs", *fixed)]
    for name in settings:
        if name in fixed:
            raise ValueError(f"{where}: {name!r} follows from other settings; leave it out")
        if name not in known:
            raise ValueError(f"{where}: unknown setting {name!r}{nearest(name, known)}; known: {', '.join(known)}")
