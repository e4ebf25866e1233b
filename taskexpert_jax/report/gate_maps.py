"""Figures of gate weights: maps over an image, sheets of maps, and a heat map of mean weights.

All figures share one colour scale from 0 (dark) to 1 (bright), so that maps can be compared. Maps are not interpolated:
each square is a token.
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
from taskexpert_jax.models.decoders.decoder import MEMORY
from taskexpert_jax.tasks import canvas

COLOURS = "viridis"  # perceptually uniform, also in grey scale and for colour-blind readers
_CELL = 1.5  # width of a map on a sheet, in inches
_DPI = 200


class Cell(NamedTuple):
    """One image of a sheet: (h, w, 3) uint8, and its title."""

    image: np.ndarray
    title: str


@functools.cache
def weight_colours() -> np.ndarray:
    """Colour map of the weights 0, 1/255, ..., 1: (256, 3) uint8."""
    return np.round(matplotlib.colormaps[COLOURS](np.arange(256))[:, :3] * 255).astype(np.uint8)


def steps(weights: np.ndarray) -> np.ndarray:
    """Indices of weights in [0, 1] into `weight_colours`, uint8; 0 for NaN, which a diverged model has."""
    return np.round(np.clip(np.nan_to_num(weights), 0, 1) * 255).astype(np.uint8)


def choice_colours(slots: Sequence[str]) -> np.ndarray:
    """One colour per expert slot, (slots, 3) uint8: pale, unlike class colours, and dark grey for the memory."""
    memory = [canvas.BACKGROUND] if MEMORY in slots else []
    experts = len(slots) - len(memory)
    colours = _pale_colours()[:experts] if experts <= len(_pale_colours()) else canvas.palette(experts)
    return np.array([*colours, *memory], np.uint8)


def _pale_colours() -> np.ndarray:
    """ColorBrewer's Set3 without its grey, (11, 3) uint8."""
    colours = matplotlib.colormaps["Set3"](np.arange(12))[:, :3]
    return np.round(np.delete(colours, 8, axis=0) * 255).astype(np.uint8)


def ink_on(colour: np.ndarray) -> str:
    """Text colour, black or white, with the higher WCAG 2 contrast on a background colour (3,) uint8."""
    share = colour / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ np.array([0.2126, 0.7152, 0.0722]) > 0.179 else "white"


def hexadecimal(colour: np.ndarray) -> str:
    """A colour (3,) uint8 as `#rrggbb`."""
    return "#" + bytes(colour.tolist()).hex()


def weights_sheet(
    previews: Sequence[Cell], weights: np.ndarray, means: np.ndarray, slots: Sequence[str], *, title: str
) -> Figure:
    """Sheet of one task's maps over an image: one row per tap, one column per expert slot.

    Args:
      previews: images for the first column, from the top row down.
      weights: (S, h, w, slots) at the image's pixels.
      means: (S, slots), for the titles.
      slots: names of the expert slots.
      title: title of the sheet.
    """
    rows: list[list[Cell | None]] = []
    for tap, (of_tap, of_mean) in enumerate(zip(weights, means, strict=True)):
        maps = [weight_colours()[steps(of_tap[..., k])] for k in range(len(slots))]
        titles = [f"{name}: {mean:.2f}" for name, mean in zip(slots, of_mean.tolist(), strict=True)]
        first = previews[tap] if tap < len(previews) else None
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
    first: Sequence[Cell], winners: np.ndarray, titles: Sequence[str], slots: Sequence[str], *, title: str
) -> Figure:
    """Sheet of the expert slots with the largest weight at each pixel: one row per task, one column per tap.

    Args:
      first: images for the first column, one per task.
      winners: (T, S, h, w), indices into `slots`.
      titles: row titles, one per task.
      slots: names of the expert slots.
      title: title of the sheet.
    """
    colours = choice_colours(slots)
    rows: list[list[Cell | None]] = [
        [before, *(Cell(colours[of_tap], f"tap {tap}") for tap, of_tap in enumerate(of_task, start=1))]
        for before, of_task in zip(first, winners, strict=True)
    ]
    figure = _sheet(rows, titles, title)
    key = [Patch(facecolor=colours[k] / 255, edgecolor="black", label=name) for k, name in enumerate(slots)]
    # As many legend entries per row as fit the sheet's width.
    columns = max(1, min(len(key), int(figure.get_figwidth() / 0.95)))
    figure.legend(handles=key, loc="lower center", ncols=columns, fontsize=7, frameon=False, handlelength=1.2)
    return figure


def _sheet(rows: Sequence[Sequence[Cell | None]], names: Sequence[str], title: str) -> Figure:
    """A grid of titled images with row names on the left, and space for a legend below."""
    shape = next(cell.image.shape for row in rows for cell in row if cell is not None)
    ratio = shape[0] / shape[1]
    gap, line = 0.06, 0.17  # in image widths, like all lengths on the axes
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
                axes.imshow(cell.image, extent=(x, x + 1, top + ratio, top))
    axes.text(0, 0.02 - above / 2, title, ha="left", va="center", fontsize=9, weight="bold")
    axes.set_xlim(-left, columns * (1 + gap) + right)
    axes.set_ylim(len(rows) * height + below, -above)
    axes.set_aspect("auto")  # the figure has the axes' shape
    return figure


def heat_map(found: Inspection) -> Figure:
    """Heat map of mean weights over all images: a row per task and tap, a column per slot, entropy and variation."""
    slots, weights, entropy = found.gates
    tasks, taps, count = weights.shape
    spread = variation(found.gates)
    figure = Figure(figsize=(0.62 * (count + 2) + 2.2, 0.25 * tasks * (taps + 0.35) + 0.5), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for column, name in enumerate((*slots, "entropy", "variation")):
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
