"""The picture of a report: how near to a copy's bytes per second every op and every peer comes.

A roofline laid on its side. All that is drawn is bound by memory, or should be, so the copy is the one ceiling; what
matrix products or exponentials bound is in the tables alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import bound_by_arithmetic, family, groups

INK, FAINT = "#222222", "#d9d9d9"
STYLES = {  # colour, marker; what is not named here is drawn as OTHER
    "di4c": ("#0b5fa5", "o"),
    "torch": ("#666666", "s"),
    "torch, published": ("#b0b0b0", "s"),
    "torch.compile": ("#d9731a", "^"),
    "race": ("#666666", "X"),
    "compiled race": ("#d9731a", "v"),
    "multinomial": ("#b0b0b0", "X"),
    "Liger-Kernel": ("#7a3fa0", "D"),
    "FlashInfer": ("#2e8b57", "D"),
    "FlashInfer, softmax and probs": ("#2e8b57", "d"),
    "quack": ("#b8336a", "P"),
    "TRL": ("#8c6d1f", "P"),
}
OTHER = ("#4d9db3", "h")
APART = ("odd S", "weight 0", "threads")  # ours beside ours: in the tables alone


def _shown(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Groups of which ours has a floor, families together, without what could not be measured."""
    found = {
        group: measured
        for group, members in groups(rows).items()
        if family(group) not in APART
        and not bound_by_arithmetic(group)
        and (measured := [row for row in members if row.get("of_copy")])
        and measured[0]["name"] == "di4c"
    }
    order = list(dict.fromkeys(family(group) for group in found))
    return dict(sorted(found.items(), key=lambda item: order.index(family(item[0]))))


def draw(rows: list[dict[str, Any]], about: dict[str, Any], path: Path) -> Path | None:
    """Writes the picture, SVG or PNG by the path's ending; None where no row of di4c has a floor."""
    shown = _shown(rows)
    if not shown:
        return None
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "di4c", "font.size": 8, "text.color": INK}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.19 * len(shown)), layout="constrained")
    handles: dict[str, Any] = {}
    for y, (group, members) in enumerate(shown.items()):
        new = y and family(group) != family(list(shown)[y - 1])
        if new:
            axes.axhline(y - 0.5, color=FAINT, linewidth=0.8, zorder=0)
        reach = [row["of_copy"] for row in members]
        axes.plot([min(reach), max(reach)], [y, y], color=FAINT, linewidth=1, zorder=1)
        for row in reversed(members):  # ours on top
            colour, marker = STYLES.get(row["name"], OTHER)
            ours = row["name"] == "di4c"
            handles[row["name"]] = axes.scatter(
                row["of_copy"], y, s=30 if ours else 18, color=colour, marker=marker, zorder=3 if ours else 2
            )
        speed = f"{members[0]['gb_per_s']:.3g}"
        axes.text(1.01, y, speed, transform=axes.get_yaxis_transform(), va="center", color=STYLES["di4c"][0])
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    axes.text(1, -0.8, "copy", ha="center", va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(f"bytes of the floor per second, a copy's ({about.get('copy', 'unknown')}) = 1; right: di4c, GB/s")
    axes.set_title(f"{about.get('device', '')}: achieved against the copy", loc="left", fontsize=10)
    names = sorted(handles, key=lambda name: [*STYLES, name].index(name))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, facecolor="white", dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path
