"""Figures that are readable in the light and in the dark, in print, and by colour-blind readers.

A figure is drawn once, in the colours of the light scheme. In the SVG each of these colours becomes
a CSS variable whose value follows the reader's scheme; the PNG keeps the light colours on white.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SERIES", "save_figure", "style"]

# Light and dark value of each series. Neighbours differ in lightness as well as in hue, so that
# they stay apart without colour vision; each has a contrast of at least 3 : 1 to its background.
SERIES = (
    ("#0b5fa5", "#6cb6ff"),  # blue
    ("#c4510a", "#ff9e5e"),  # vermilion
    ("#00785a", "#45d6a8"),  # green
    ("#a0397f", "#f09ad2"),  # purple
    ("#8a6a00", "#e6c34a"),  # ochre
    ("#3b3f46", "#c9ced6"),  # slate
    ("#6f7a86", "#98a4b1"),  # grey
)
_INK = ("#1c1e21", "#e8e6e3")
_GRID = ("#d9dbdf", "#3c4046")
_PAPER = ("#ffffff", "#16181b")


@contextmanager
def style() -> Iterator[None]:
    """Draw with the lab's colours, sizes and line widths inside the block."""
    import matplotlib

    # No window is ever opened; and a study in a worker thread must not try to.
    matplotlib.use("agg")
    from cycler import cycler

    settings: Any = {
        "figure.figsize": (5.6, 3.5),
        "figure.constrained_layout.use": True,
        "figure.facecolor": _PAPER[0],
        "axes.facecolor": "none",
        "savefig.facecolor": "auto",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "mathtext.fontset": "cm",
        "axes.titlesize": 10,
        "axes.labelsize": 9.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "text.color": _INK[0],
        "axes.labelcolor": _INK[0],
        "axes.edgecolor": _INK[0],
        "axes.titlecolor": _INK[0],
        "xtick.color": _INK[0],
        "ytick.color": _INK[0],
        "grid.color": _GRID[0],
        "axes.prop_cycle": cycler(color=[light for light, _ in SERIES]),
        "image.cmap": "cividis",
        "svg.fonttype": "path",
        "svg.hashsalt": "kexue",
    }
    with matplotlib.rc_context(settings):
        yield


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write ``<name>.svg`` and ``<name>.png`` and close the figure."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    svg = folder / f"{name}.svg"
    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    figure.patch.set_alpha(0.0)
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    svg.write_text(_follow_scheme(svg.read_text(encoding="utf-8")), encoding="utf-8")
    plt.close(figure)


def _follow_scheme(svg: str) -> str:
    """Turn the colours of the light scheme into variables that the reader's scheme sets."""
    pairs = {"ink": _INK, "grid": _GRID, **{f"c{i}": pair for i, pair in enumerate(SERIES)}}
    # Black is what matplotlib draws where no setting reaches (legend text, annotations).
    svg = svg.replace("#000000", _INK[0])
    for variable, (light, _) in pairs.items():
        svg = svg.replace(light, f"var(--{variable})")
    light_rule = ";".join(f"--{variable}:{light}" for variable, (light, _) in pairs.items())
    dark_rule = ";".join(f"--{variable}:{dark}" for variable, (_, dark) in pairs.items())
    rules = (
        f"<style>:root{{{light_rule}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark_rule}}}}}"
        "svg{fill:var(--ink)}</style>"
    )
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + rules + svg[start:]
