"""Thinning of boundary maps to one-pixel lines, equal to MATLAB's bwmorph(map, "thin", Inf)."""

from typing import NamedTuple

import numba
import numpy as np

# Neighbours of a pixel as (dy, dx), counter-clockwise from the right; bit k of a neighbourhood code is neighbour k.
_NEIGHBOURS = np.array([(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1)])
_FIRST, _SECOND = np.uint8(1), np.uint8(2)  # marks of pixels pending in the first or second subiteration


class ThinMaps(NamedTuple):
    """Several thin boundary maps of one image, as concatenated lists of their pixels.

    pixels: (n,) int32, y * W + x.
    starts: (maps + 1,) int64; map k has pixels[starts[k] : starts[k + 1]].
    """

    pixels: np.ndarray
    starts: np.ndarray


def thin(boundary: np.ndarray) -> np.ndarray:
    """Thins a map until it no longer changes; (H, W) bool to (H, W) bool. Pixels outside of the image are empty.

    Two alternating parallel subiterations (Guo and Hall, CACM 1989), as MATLAB documents them.
    """
    maps = thin_levels(boundary.astype(np.int64), np.ones(1, np.int64))
    result = np.zeros(boundary.shape, bool)
    result.flat[maps.pixels] = True
    return result


def thin_levels(levels: np.ndarray, minima: np.ndarray) -> ThinMaps:
    """Thins the nested maps levels >= minimum.

    levels: (H, W) non-negative integers.
    minima: (maps,) integers >= 1, descending, so that each map contains the previous one.
    """
    flat = levels.ravel()
    pixels = np.flatnonzero(flat >= minima[-1]) if minima.size else np.zeros(0, np.int64)
    pixels = pixels[np.argsort(-flat[pixels], kind="stable")].astype(np.int32)
    ends = np.searchsorted(-flat[pixels], -minima, side="right")
    height, width = levels.shape
    return ThinMaps(*_thin_nested(pixels, ends, height, width, *_TABLES))


@numba.njit(cache=True, nogil=True)
def _thin_nested(pixels, ends, height, width, first_table, second_table):
    """Thins pixels[:end] for each end. Only pixels whose neighbourhood has changed are examined again."""
    stride = width + 2  # padded, so that no bounds checks are needed
    offsets = np.array([dy * stride + dx for dy, dx in _NEIGHBOURS])
    padded = np.empty(pixels.size, np.int64)
    for i, pixel in enumerate(pixels):
        padded[i] = (pixel // width + 1) * stride + pixel % width + 1
    full = np.zeros((height + 2) * stride, np.bool_)
    full_around = np.zeros(full.size, np.uint8)  # neighbourhood codes
    thinned = np.empty(ends.sum(), np.int32)
    starts = np.zeros(ends.size + 1, np.int64)
    todo = np.empty((2, pixels.size), np.int64)
    doomed = np.empty(pixels.size, np.int64)
    begin, total = 0, 0
    for m, end in enumerate(ends):
        for pixel in padded[begin:end]:
            full[pixel] = True
            for k, offset in enumerate(offsets):  # in the neighbour's code this pixel has the opposite bit
                full_around[pixel + offset] |= np.uint8(1 << ((k + 4) % 8))
        begin = end
        alive, around = full.copy(), full_around.copy()
        marks = np.zeros(full.size, np.uint8)
        marks[padded[:end]] = _FIRST | _SECOND
        todo[:, :end] = padded[:end]
        waiting = np.array([end, end])
        while waiting.sum():
            _thin_step(alive, around, marks, todo, waiting, 0, first_table, doomed, offsets)
            _thin_step(alive, around, marks, todo, waiting, 1, second_table, doomed, offsets)
        for i in range(end):
            if alive[padded[i]]:
                thinned[total] = pixels[i]
                total += 1
        starts[m + 1] = total
    return thinned[:total].copy(), starts


@numba.njit(cache=True, nogil=True)
def _thin_step(alive, around, marks, todo, waiting, step, table, doomed, offsets):
    """One parallel subiteration: decides on all pending pixels, then removes the doomed ones."""
    mark = np.uint8(1 << step)
    count = 0
    for pixel in todo[step, : waiting[step]]:
        marks[pixel] &= ~mark
        if alive[pixel] and table[around[pixel]]:
            doomed[count] = pixel
            count += 1
    waiting[step] = 0
    for pixel in doomed[:count]:
        alive[pixel] = False
    for pixel in doomed[:count]:
        for k, offset in enumerate(offsets):
            neighbour = pixel + offset
            around[neighbour] &= ~np.uint8(1 << ((k + 4) % 8))
            if not alive[neighbour]:
                continue
            for other in range(2):
                if not marks[neighbour] & (1 << other):
                    marks[neighbour] |= np.uint8(1 << other)
                    todo[other, waiting[other]] = neighbour
                    waiting[other] += 1


def _thinning_tables() -> tuple[np.ndarray, np.ndarray]:
    """Lookup tables by neighbourhood code, (256,) bool: pixels removed in the first and in the second subiteration."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1 == 1  # (256, 8)
    east, north_east, north, north_west, west, south_west, south, south_east = bits.T
    cyclic = np.concatenate([bits, bits[:, :1]], axis=1)
    straight, diagonal, following = cyclic[:, 0:8:2], cyclic[:, 1:8:2], cyclic[:, 2:9:2]  # (256, 4) each
    crossings = np.sum(~straight & (diagonal | following), axis=1)
    pairs = np.minimum(np.sum(straight | diagonal, axis=1), np.sum(diagonal | following, axis=1))
    removable = (crossings == 1) & (pairs >= 2) & (pairs <= 3)
    first = removable & ~((north_east | north | ~south_east) & east)
    second = removable & ~((south_west | south | ~north_west) & west)
    return first, second


_TABLES = _thinning_tables()
