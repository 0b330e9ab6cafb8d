"""Whether a checkpoint is what was written: its files with their sizes and SHA-256, checked before it is used.

And whether an archive is as large as it looks: torch's files are zips of which nothing is compressed.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

NAME = "checksums.json"
_REMEDY = "use another checkpoint"


def seal(folder: Path) -> None:
    """Writes the list of all files in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)
    told = {path.relative_to(folder).as_posix(): [path.stat().st_size, digest(path)] for path in files}
    (folder / NAME).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing or is not as it was written; without a list, nothing."""
    if not (folder / NAME).is_file():
        return
    for name, (size, written) in _listed(folder / NAME).items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: is missing, so the checkpoint is not whole; {_REMEDY}")
        if file.stat().st_size != size:
            raise ValueError(f"{file}: truncated or damaged ({file.stat().st_size} bytes of {size}); {_REMEDY}")
        if digest(file) != written:
            raise ValueError(f"{file}: damaged, its SHA-256 is not the one it was written with; {_REMEDY}")


def check_archive(file: Path) -> None:
    """Raises ValueError unless a torch file is a zip whose parts are stored as they are, and so no larger than itself.

    A compressed part could be made to fill the memory when it is read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: truncated or damaged ({error}); {_REMEDY}") from error
    squeezed = [
        part for part in parts if part.compress_type != zipfile.ZIP_STORED or part.file_size > part.compress_size
    ]
    if squeezed or sum(part.file_size for part in parts) > file.stat().st_size:
        size = sum(part.file_size for part in parts)
        raise ValueError(
            f"{file}: refused, its {file.stat().st_size} bytes would become {size} when read; torch writes no such "
            f"file, {_REMEDY}"
        )


def _listed(file: Path) -> dict[str, tuple[int, str]]:
    try:
        held: Any = json.loads(file.read_text(encoding="utf-8"))
        listed = {str(name): (int(size), str(written)) for name, (size, written) in held.items()}
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{file}: not a readable list of files ({error}); {_REMEDY}") from error
    outside = [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise ValueError(f"{file}: names {outside[0]!r}, which is outside the checkpoint; {_REMEDY}")
    return listed


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
