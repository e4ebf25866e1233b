"""Pictures of gates: maps of the weights over an image, sheets of them, and mean weights as a heat map.

All weights are drawn in the same colours, from 0 (dark) to 1 (bright), so that any two maps compare. The squares of a
map are the tokens: it is not smoothed.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import matplotlib
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
import numpy as np

from taskexpert_jax.evaluation.gate_findings import Inspection, variation
from taskexpert_jax.models.decoders.taskexpert import MEMORY
from taskexpert_jax.tasks import canvas

COLOURS = "viridis"  # perceptually uniform, in grey as well, and for colour-blind readers
_CELL = 1.5  # inches of a map's width on a sheet
_DPI = 200


class Cell(NamedTuple):
    """A place on a sheet: a picture (h, w, 3) uint8, and the line above it."""

    picture: np.ndarray
    title: str


def over_image(of_tokens: np.ndarray, window: np.ndarray, patch: int) -> np.ndarray:
    """Values of tokens (h, w, ...) at the pixels of the picture, (rows, columns, ...), without padding.

    window: (4,), top, left, rows and columns of the picture inside its padding. patch: pixels of a token's side.
    """
    top, left, rows, columns = window.tolist()
    row = np.arange(top, top + rows) // patch
    column = np.arange(left, left + columns) // patch
    return of_tokens[row[:, None], column]


@functools.cache
def weight_colours() -> np.ndarray:
    """The colours of the weights 0, 1/255, ..., 1: (256, 3) uint8."""
    return np.round(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).astype(np.uint8)


def steps(weights: np.ndarray) -> np.ndarray:
    """Weights in [0, 1] as places among `weight_colours`, uint8."""
    return np.round(np.clip(weights, 0, 1) * 255).astype(np.uint8)


def choice_colours(choices: Sequence[str]) -> np.ndarray:
    """One colour a choice, (choices, 3) uint8: pale, unlike those of classes, and a dark grey for the memory."""
    memory = [canvas.BACKGROUND] if MEMORY in choices else []
    experts = len(choices) - len(memory)
    colours = _pale_colours()[:experts] if experts <= len(_pale_colours()) else canvas.palette(experts)
    return np.array([*colours, *memory], np.uint8)


def _pale_colours() -> np.ndarray:
    """Those of ColorBrewer's Set3 but for its grey, (11, 3) uint8."""
    colours = matplotlib.colormaps["Set3"](np.arange(12))[:, :3]
    return np.round(np.delete(colours, 8, axis=0) * 255).astype(np.uint8)


def ink_on(colour: np.ndarray) -> str:
    """black or white: which of them is easier to read on a colour (3,) uint8 (contrast of WCAG 2)."""
    share = colour / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ np.array([0.2126, 0.7152, 0.0722]) > 0.179 else "white"


def hexadecimal(colour: np.ndarray) -> str:
    """A colour (3,) uint8 as `#rrggbb`."""
    return "#" + bytes(colour.tolist()).hex()


def weights_sheet(
    beside: Sequence[Cell], weights: np.ndarray, means: np.ndarray, choices: Sequence[str], *, title: str
) -> Figure:
    """One task's maps of an image: a row a tap, a column a choice; `beside` stand before them, one a row.

    weights: (S, h, w, choices) at the picture's pixels. means: (S, choices), for the titles.
    """
    rows: list[list[Cell | None]] = []
    for tap, (of_tap, of_mean) in enumerate(zip(weights, means, strict=True)):
        maps = [weight_colours()[steps(of_tap[..., k])] for k in range(len(choices))]
        titles = [f"{name}: {mean:.2f}" for name, mean in zip(choices, of_mean.tolist(), strict=True)]
        first = beside[tap] if tap < len(beside) else None
        rows.append([first, *(Cell(*pair) for pair in zip(maps, titles, strict=True))])
    figure = _sheet(rows, [f"tap {tap + 1}" for tap in range(len(rows))], title)
    scale = ScalarMappable(cmap=COLOURS)
    scale.set_clim(0, 1)
    width, height = figure.get_size_inches()
    bar = figure.add_axes((0.5 - 1.2 / width, 0.4 / height, 2.4 / width, 0.09 / height))
    figure.colorbar(scale, cax=bar, orientation="horizontal").set_label("weight; above each map its mean", fontsize=7)
    bar.tick_params(labelsize=7)
    return figure


def winners_sheet(
    first: Sequence[Cell], winners: np.ndarray, titles: Sequence[str], choices: Sequence[str], *, title: str
) -> Figure:
    """Which choice weighs most, over an image: a row a task, a column a tap.

    first: what stands before the maps, one a task. winners: (T, S, h, w), places among the choices.
    """
    colours = choice_colours(choices)
    rows: list[list[Cell | None]] = [
        [before, *(Cell(colours[of_tap], f"tap {tap}") for tap, of_tap in enumerate(of_task, start=1))]
        for before, of_task in zip(first, winners, strict=True)
    ]
    figure = _sheet(rows, titles, title)
    key = [Patch(facecolor=colours[k] / 255, edgecolor="black", label=name) for k, name in enumerate(choices)]
    # As many in a row as the sheet is wide enough for.
    columns = max(1, min(len(key), int(figure.get_figwidth() / 0.95)))
    figure.legend(handles=key, loc="lower center", ncols=columns, fontsize=7, frameon=False, handlelength=1.2)
    return figure


def _sheet(rows: Sequence[Sequence[Cell | None]], names: Sequence[str], title: str) -> Figure:
    """Titled pictures in rows and columns, the rows named at the left; below them is room for a key."""
    shape = next(cell.picture.shape for row in rows for cell in row if cell is not None)
    ratio = shape[0] / shape[1]
    gap, line = 0.06, 0.17  # as shares of a picture's width, as are all lengths on the axes
    columns, height = max(len(row) for row in rows), ratio + line + gap
    below, above, left, right = 0.36, 0.2, 0.2, 0.02
    width_inches = _CELL * (columns * (1 + gap) + left + right)
    height_inches = _CELL * (len(rows) * height + above + below)
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for r, (name, row) in enumerate(zip(names, rows, strict=True)):
        top = r * height + line
        axes.text(-0.05, top + ratio / 2, name, rotation=90, ha="right", va="center", fontsize=8)
        for c, cell in enumerate(row):
            if cell is not None:
                x = c * (1 + gap)
                axes.text(x, top - 0.02, cell.title, ha="left", va="bottom", fontsize=7)
                axes.imshow(cell.picture, extent=(x, x + 1, top + ratio, top))
    axes.text(0, 0.02 - above / 2, title, ha="left", va="center", fontsize=9, weight="bold")
    axes.set_xlim(-left, columns * (1 + gap) + right)
    axes.set_ylim(len(rows) * height + below, -above)
    axes.set_aspect("auto")  # the figure has the axes' shape
    return figure


def heat_map(found: Inspection) -> Figure:
    """Mean weights over all images: rows are taps by task, columns choices; entropy and variation stand beside them."""
    choices, weights, entropy = found.gates
    tasks, taps, count = weights.shape
    spread = variation(found.gates)
    figure = Figure(figsize=(0.62 * (count + 2) + 2.2, 0.25 * tasks * (taps + 0.35) + 0.5), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for column, name in enumerate((*choices, "entropy", "variation")):
        axes.text(column + 0.5, -0.15, name, ha="center", va="bottom", fontsize=8)
    colours = weight_colours()
    for t, task in enumerate(found.tasks):
        top = t * (taps + 0.35)
        axes.text(-2.9, top + taps / 2, task.title, ha="left", va="center", fontsize=8, weight="bold", wrap=False)
        axes.imshow(colours[steps(weights[t])], extent=(0, count, top + taps, top), interpolation="nearest")
        for s in range(taps):
            y = top + s + 0.52
            axes.text(-0.15, y, f"tap {s + 1}", ha="right", va="center", fontsize=7)
            for k, weight in enumerate(weights[t, s].tolist()):
                ink = ink_on(colours[steps(np.array(weight))])
                axes.text(k + 0.5, y, f"{weight:.2f}", ha="center", va="center", fontsize=7, color=ink)
            for k, value in enumerate((entropy[t, s], spread[t, s])):
                text = "–" if np.isnan(value) else f"{value:.2f}"
                axes.text(count + k + 0.5, y, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(-3, count + 2)
    axes.set_ylim(tasks * (taps + 0.35), -1)
    axes.set_aspect("auto")
    return figure
