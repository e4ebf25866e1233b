"""Colours, legends, colour bars and sheets of images, shared by all drawings."""

from collections.abc import Sequence
import functools
import math
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Range = tuple[float, float]
Colour = tuple[int, int, int]
Cell = tuple[str, Image.Image]

SMALLEST, LARGEST = 384, 800  # range of the longer side of a map on a sheet, in pixels
KEY_WIDTH = 320  # minimum width of a key in pixels; five depth labels fit without touching
GAP = 12
INK, PAPER = (30, 30, 30), (255, 255, 255)
BACKGROUND = (48, 48, 56)
INVALID = (0, 0, 0)
INVALID_GREY = (40, 40, 110)  # invalid pixels of grey maps, in which black is a value


class Drawn(NamedTuple):
    """Values to be drawn.

    values: (H, W), or (H, W, channels) for vectors.
    valid: (H, W) bool, False for pixels without a value.
    limits: values at the two ends of the colour map.
    """

    values: np.ndarray
    valid: np.ndarray
    limits: Range


def montage(image: np.ndarray, panels: Sequence[tuple[str, Image.Image | np.ndarray]]) -> Image.Image:
    """Sheet with the input image first and the titled panels after it, about as many rows as columns.

    Args:
      image: (H, W, 3) uint8.
      panels: title and panel: a map drawn by `panels.picture`, or (H, W, 3) uint8 of the image's size.
    """
    cells = [("input", at_display_size(image))]
    for title, panel in panels:
        cells.append((title, panel if isinstance(panel, Image.Image) else at_display_size(panel)))
    squarest = math.ceil(math.sqrt(len(cells)))
    columns = min((squarest, squarest + 1), key=lambda count: -len(cells) % count)  # fewest empty cells
    return sheet([cells[start : start + columns] for start in range(0, len(cells), columns)])


@functools.cache
def palette(count: int) -> np.ndarray:
    """Colours for `count` classes, (count, 3) uint8, none of them dark, each as far as possible from those before it.

    Deterministic; a longer palette begins with the shorter one. Distances are measured in the perceptually uniform
    OKLab colour space (Ottosson 2020).
    """
    steps = np.linspace(0, 255, 18).round()
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    bright = (lab[:, 0] > 0.45) & (lab[:, 0] < 0.92) & (chroma > 0.04) & (chroma < 0.18)
    candidates, lab = candidates[bright], lab[bright]
    # Class colours keep their distance from the fixed colours too: background, invalid pixels and paper.
    taken = _oklab(np.array([BACKGROUND, INVALID, PAPER], np.float64))
    distance = np.linalg.norm(lab[:, None] - taken, axis=-1).min(axis=1)
    chosen = []
    for _ in range(count):
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=-1))
    return candidates[chosen].astype(np.uint8).reshape(count, 3)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    share = rgb / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_cones.append([0.0883024619, 0.2817188376, 0.6299787005])
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    to_lab.append([0.0259040371, 0.7827717662, -0.8086757660])
    return np.cbrt(linear @ np.array(to_cones).T) @ np.array(to_lab).T


def grey(values: np.ndarray, limits: Range) -> np.ndarray:
    """Values as (..., 3) uint8, black to white over the limits; (H, W, 3) becomes RGB, other shapes grey."""
    low, high = limits
    share = np.clip((values.astype(np.float32) - low) / (high - low), 0, 1)
    bright = np.round(share * 255).astype(np.uint8)
    return bright if values.ndim == 3 else bright[..., None].repeat(3, axis=-1)


def at_display_size(rgb: np.ndarray, *, smooth: bool = True) -> Image.Image:
    """The image with its longer side between SMALLEST and LARGEST pixels; upscaling is by a whole factor, nearest."""
    image = Image.fromarray(rgb)
    longer = max(image.size)
    if longer < SMALLEST:
        factor = math.ceil(SMALLEST / longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longer > LARGEST:
        size = [max(1, round(side * LARGEST / longer)) for side in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.BOX if smooth else Image.Resampling.NEAREST)
    return image


@functools.cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Font shipped with matplotlib, because a minimal system has no fonts."""
    import matplotlib  # imported lazily: slow, and only drawing needs it

    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)


def legend(entries: Sequence[tuple[str, Colour]], width: int) -> Image.Image:
    """Colour swatches with their names, in rows of at most `width` pixels."""
    font, box, line = _font(14), 14, 22
    places, x, y = [], 0, 0
    for name, _ in entries:
        needed = box + 5 + math.ceil(font.getlength(name))
        if x and x + needed > width:
            x, y = 0, y + line
        places.append((x, y))
        x += needed + GAP
    paper = Image.new("RGB", (width, y + line), PAPER)
    draw = ImageDraw.Draw(paper)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 3, x + box - 1, y + 3 + box - 1), fill=colour, outline=INK)
        draw.text((x + box + 5, y + 3 + box // 2), name, fill=INK, font=font, anchor="lm")
    return paper


def beside(image: Image.Image, lines: Sequence[str], width: int) -> Image.Image:
    """The image with lines of text to its right, `width` pixels wide in total."""
    paper = Image.new("RGB", (width, image.height), PAPER)
    paper.paste(image, (0, 0))
    draw = ImageDraw.Draw(paper)
    for row, line in enumerate(lines):
        draw.text((image.width + GAP, GAP + 22 * row), line, fill=INK, font=_font(14))
    return paper


def bar(colours: np.ndarray, labels: Sequence[str], width: int) -> Image.Image:
    """Horizontal colour bar of 256 colours, with evenly spaced labels below it from end to end."""
    height, last = 12, len(labels) - 1
    paper = Image.new("RGB", (width, height + 22), PAPER)
    paper.paste(Image.fromarray(colours[None]).resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    draw = ImageDraw.Draw(paper)
    for i, label in enumerate(labels):
        x = i * (width - 1) // last
        anchor = "lt" if i == 0 else "rt" if i == last else "mt"
        draw.line((x, height, x, height + 3), fill=INK)
        draw.text((x, height + 6), label, fill=INK, font=_font(13), anchor=anchor)
    return paper


def sheet(rows: Sequence[Sequence[Cell | None]]) -> Image.Image:
    """Titled images in rows and columns, each aligned to the top left of its cell."""
    font, title_height = _font(16, bold=True), 24
    count = max(len(row) for row in rows)
    widths, heights = [0] * count, [0] * len(rows)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            if cell is not None:
                title, image = cell
                widths[c] = max(widths[c], image.width, math.ceil(font.getlength(title)))
                heights[r] = max(heights[r], title_height + image.height)
    paper = Image.new("RGB", (GAP + sum(w + GAP for w in widths), GAP + sum(h + GAP for h in heights)), PAPER)
    draw = ImageDraw.Draw(paper)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            if cell is not None:
                x, y = GAP + sum(w + GAP for w in widths[:c]), GAP + sum(h + GAP for h in heights[:r])
                draw.text((x, y + title_height // 2 - 2), cell[0], fill=INK, font=font, anchor="lm")
                paper.paste(cell[1], (x, y + title_height))
    return paper
