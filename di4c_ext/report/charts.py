"""Charts as inline SVG whose colours are CSS variables of the page, so that one drawing serves light and dark.

Matplotlib knows no CSS, so it draws with stand-in colours that are replaced in its output.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

STAND_INS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--teacher)",
    "#050505": "var(--student)",
    "#060606": "var(--series-1)",
    "#070707": "var(--series-2)",
    "#080808": "var(--series-3)",
    "#090909": "var(--series-4)",
    "#0a0a0a": "var(--series-5)",
    "#0b0b0b": "var(--series-6)",
}
INK, MUTED, RULE, TEACHER, STUDENT, *SERIES = STAND_INS
MODELS = {"teacher": (TEACHER, "o"), "student": (STUDENT, "D"), "hybrid": (SERIES[2], "s"), "guided": (SERIES[3], "^")}
FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif"

WORDS = {"gain_data": "gain at the data", "gain_consistency": "gain at the samples"}

# (model, number of steps, values one a seed)
Points = Sequence[tuple[str, int, list[float]]]
# By model: x, the mean, the ends of its interval if there is one, and the values of every seed.
Curves = Mapping[str, Sequence[tuple[float, float, tuple[float, float] | None, list[float]]]]


def against_steps(points: Points, floor: float | None, label: str, floor_label: str, log: bool) -> str:
    """Every model's figure against the number of steps: the mean as a line, every seed as a dot."""
    figure, axes = _new(5.4, 3.5)
    steps = sorted({n for _, n, _ in points})
    for model, (colour, marker) in MODELS.items():
        mine = sorted((n, values) for name, n, values in points if name == model)
        if not mine:
            continue
        axes.plot([n for n, _ in mine], [sum(v) / len(v) for _, v in mine], color=colour, lw=2, label=model, zorder=3)
        for n, values in mine:
            axes.plot([n] * len(values), values, marker, color=colour, ms=4.5, alpha=0.75, mew=0, zorder=4)
    if floor is not None:
        axes.axhline(floor, color=MUTED, lw=1.2, ls=(0, (4, 3)), label=floor_label, zorder=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(n) for n in steps])
    axes.minorticks_off()
    if log:
        _log_y(axes)
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(label)
    _legend(figure)
    return _svg(figure, label)


def frontier(points: Sequence[tuple[str, int, float, float]], real: tuple[float, float] | None) -> str:
    """(model, number of steps, entropy, perplexity): a line for each model, its steps written beside the dots."""
    figure, axes = _new(5.4, 3.9)
    for model, (colour, marker) in MODELS.items():
        mine = sorted((n, entropy, perplexity) for name, n, entropy, perplexity in points if name == model)
        if not mine:
            continue
        entropies, perplexities = [entropy for _, entropy, _ in mine], [perplexity for _, _, perplexity in mine]
        axes.plot(entropies, perplexities, marker=marker, color=colour, lw=1.6, ms=5, mew=0, label=model, zorder=3)
        for n, entropy, perplexity in mine:
            axes.annotate(str(n), (entropy, perplexity), (5, 4), textcoords="offset points", fontsize=8, color=colour)
    if real is not None:
        axes.plot(*real, "*", color=MUTED, ms=11, mew=0, label="real text", zorder=4)
    _log_y(axes)
    axes.set_xlabel("entropy of a sample's own tokens, nats")
    axes.set_ylabel("perplexity")
    _legend(figure)
    return _svg(figure, "perplexity against entropy")


def two_panels(
    upper: Curves,
    lower: Curves,
    label: str,
    x_label: str,
    floors: tuple[float | None, float | None],
    real: str,
    log: bool,
) -> str:
    """A figure above, and below it, over the same axis, the entropy it is to be read beside.

    Means as lines, intervals as bars, every seed as a dot. floors: of both; real: what these are called. log: whether
    the figure's own axis is logarithmic, as x is.
    """
    figure, (above, below) = _new(5.4, 4.3, heights=(2.2, 1))
    for axes, curves, floor in ((above, upper, floors[0]), (below, lower, floors[1])):
        for model, (colour, marker) in MODELS.items():
            points = sorted(curves.get(model, []))
            if not points:
                continue
            told = model if axes is above else None
            axes.plot([x for x, *_ in points], [y for _, y, *_ in points], color=colour, lw=2, label=told, zorder=3)
            for x, _, ends, each in points:
                if ends is not None:
                    axes.plot([x, x], ends, color=colour, lw=5, alpha=0.25, solid_capstyle="butt", zorder=2)
                axes.plot([x] * len(each), each, marker, color=colour, ms=4, alpha=0.75, mew=0, zorder=4)
        if floor is not None:
            told = real if axes is above else None
            axes.axhline(floor, color=MUTED, lw=1.2, ls=(0, (4, 3)), label=told, zorder=1)
        axes.set_xscale("log")
        axes.minorticks_off()
    places = sorted({x for points in upper.values() for x, *_ in points})
    is_counts = all(float(x).is_integer() for x in places)
    ticks = places if is_counts else _log_ticks(above.get_xlim())
    for axes in (above, below):
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    above.tick_params(labelbottom=False)
    if log:
        _log_y(above)
    above.set_ylabel(label)
    below.set_ylabel("entropy")
    below.set_xlabel(x_label)
    _legend(figure)
    return _svg(figure, f"{label} against {x_label}")


def temperature_lines(
    lines: Sequence[tuple[str, int, Sequence[tuple[float, float]]]], real: tuple[float, float] | None, label: str
) -> str:
    """(model, number of steps, (entropy, figure) at each temperature): a line each, its steps written at its end."""
    figure, axes = _new(5.4, 3.9)
    told: set[str] = set()
    for model, n, points in lines:
        colour, marker = MODELS[model]
        name = None if model in told else model
        told.add(model)
        drawn = sorted(points)
        axes.plot(*zip(*drawn, strict=True), marker=marker, color=colour, lw=1.4, ms=4, mew=0, label=name, zorder=3)
        axes.annotate(str(n), drawn[-1], (5, 3), textcoords="offset points", fontsize=8, color=colour)
    if real is not None:
        axes.plot(*real, "*", color=MUTED, ms=11, mew=0, label="real", zorder=4)
    _log_y(axes)
    axes.set_xlabel("entropy, nats")
    axes.set_ylabel(label)
    _legend(figure)
    return _svg(figure, f"{label} against entropy")


def over_time(lines: Sequence[dict[str, Any]], names: Sequence[str], label: str) -> str:
    """Named values of the metrics file against the training step."""
    figure, axes = _new(5.4, 3.3)
    for name, colour in zip(names, SERIES, strict=False):
        known = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
        axes.plot([step for step, _ in known], [value for _, value in known], color=colour, lw=1.6, label=_words(name))
    if any(line.get(name, 0) < 0 for line in lines for name in names):
        axes.axhline(0, color=MUTED, lw=0.8, zorder=1)
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    if len(names) > 1:
        _legend(figure)
    return _svg(figure, label)


def _words(name: str) -> str:
    return WORDS.get(name, name.replace("_", " "))


def _log_ticks(limits: tuple[float, float]) -> list[float]:
    candidates = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    inside = [tick for tick in candidates if limits[0] <= tick <= limits[1]]
    return inside or [limits[0], limits[1]]


def _log_y(axes: Any) -> None:
    """A logarithmic axis with plain numbers."""
    axes.set_yscale("log")
    ticks = _log_ticks(axes.get_ylim())
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _new(width: float, height: float, heights: Sequence[float] = (1,)) -> tuple[Any, Any]:
    """A figure and its axes, several above one another where several heights are given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    figure.patch.set_alpha(0)
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.grid(color=RULE, lw=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(MUTED)
        axes.tick_params(colors=MUTED, labelcolor=INK, length=0, labelsize=9)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
    return figure, panels[0] if len(panels) == 1 else panels


def _legend(figure: Any) -> None:
    """Below the axes, where it hides nothing."""
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=INK, fontsize=9)


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for stand_in, variable in STAND_INS.items():
        drawing = drawing.replace(stand_in, variable)
    drawing = re.sub(r"font: ([\d.]+px) [^;\"]+", rf"font: \1 {FONT}".replace("'", "&#39;"), drawing)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    for size in ("width", "height"):  # the page decides; the viewBox keeps the proportions
        drawing = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", drawing, count=1)
    return drawing.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
