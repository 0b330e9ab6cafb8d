"""Samples of every model side by side, a row for each number of steps, below real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from torch import Tensor

from di4c_ext import pictures
from di4c_ext.data import ImageTokens
from di4c_ext.report.facts import plural


def side_by_side(
    models: Sequence[str],
    steps: Sequence[int],
    cell: Callable[[str, int], str],
    real: tuple[str, str],
    *,
    is_text: bool = False,
) -> str:
    """HTML. cell: (model, number of steps) -> its samples; real: a heading and real examples."""
    columns = "" if len(models) == 2 else f' style="grid-template-columns: 70px repeat({len(models)}, 1fr)"'
    heads = "".join(f'<h3 class="{model}">{model.capitalize()}</h3>' for model in models)
    rows = [
        f'<div class="real"><h3>{real[0]}</h3>{real[1]}</div>',
        f'<div class="pair head"{columns}><span></span>{heads}</div>',
    ]
    kind = "pair words" if is_text else "pair"
    for n in steps:
        unit = plural(n, "step").split()[1]
        cells = "".join(f"<figure>{cell(model, n)}</figure>" for model in models)
        rows.append(f'<div class="{kind}"{columns}><span class="count"><b>{n}</b> {unit}</span>{cells}</div>')
    return "".join(rows)


def picture(tokens: Tensor, images: ImageTokens, columns: int, text: str) -> str:
    """tokens (N, D) of images like these as one picture in the page, `columns` of them in a row."""
    pixels = pictures.grid(tokens, images.shape, images.num_states, columns, images.layout)
    height, width = pixels.shape[:2]
    source = pictures.data_url(pixels)
    return f'<img src="{source}" width="{width * 4}" height="{height * 4}" alt="{escape(text)}">'


def quotations(texts: Sequence[str]) -> str:
    """Each text as a quotation."""
    return "".join(f"<blockquote>{escape(text.strip())}</blockquote>" for text in texts)
