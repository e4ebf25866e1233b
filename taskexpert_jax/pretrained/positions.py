"""Position embeddings of weight files: which are those of patches, and of which grid.

A table (1, N, C) does not say it: 49 positions are 7x7 patches, or a class token and 6x8. The naming scheme, the file's
record of its image size and the run's grid decide; where they leave two readings, the table is refused.
"""

import dataclasses
import math

import numpy as np

from taskexpert_jax.errors import UserError

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PositionTable:
    """Facts that tell the grid of a file's position embeddings.

    Attributes:
      where: the file, for messages.
      before: possible numbers of positions before those of the patches: 1 is the class token's.
      patch_size: P of the file, in pixels.
      run_grid: token grid of the run.
      image_size: height and width of the images that the weights were trained with, in pixels; None if not recorded.
    """

    where: str
    before: tuple[int, ...]
    patch_size: int
    run_grid: Grid
    image_size: tuple[int, int] | None

    def patches(self, table: np.ndarray) -> np.ndarray:
        """Positions of the patches, (h, w, C)."""
        before, grid = self._reading(table)
        return table[0, before:].reshape(*grid, -1)

    def placed_class_token(self, token: np.ndarray, table: np.ndarray) -> np.ndarray:
        """The class token (1, 1, C) plus its position embedding, if the table has one; (C,)."""
        before, _ = self._reading(table)
        return token[0, 0] + (table[0, 0] if before else 0.0)

    def _reading(self, table: np.ndarray) -> tuple[int, Grid]:
        """Number of positions before the patches', and the patches' grid.

        Raises:
          UserError: no square grid nor one that is known fits, or several readings do.
        """
        count = table.shape[1]
        recorded = self._recorded()
        readings = []
        for before in self.before:
            side = math.isqrt(max(count - before, 0))
            grids = dict.fromkeys(((side, side), self.run_grid, recorded))
            readings += [(before, grid) for grid in grids if grid and grid[0] * grid[1] == count - before > 0]
        if not readings:
            raise UserError(
                f"{self.where}: its {count} position embeddings {table.shape} are no square grid of patches, nor this "
                f"run's {_text(self.run_grid)}, {' or '.join(map(_with, self.before))}; {_remedy()}"
            )
        known = [reading for reading in readings if reading[1] == recorded]
        # A square without the class token's position may also be n x (n + 2) with it, which only a record excludes.
        unsure = max(self.before) > readings[0][0]
        if len(known or readings) > 1 or (unsure and not known):
            texts = [f"{_text(grid)} patches {_with(before)}" for before, grid in readings]
            texts += [f"another grid {_with(1)}"] if len(texts) == 1 else []
            sizes = [(grid[0] * self.patch_size, grid[1] * self.patch_size) for _, grid in readings]
            raise UserError(
                f"{self.where}: its {count} position embeddings may be {' or '.join(texts)}; {_remedy(*sizes)}"
            )
        return (known or readings)[0]

    def _recorded(self) -> Grid | None:
        if self.image_size is None:
            return None
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def _text(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _with(before: int) -> str:
    return "with the class token's position" if before else "without a position of a class token"


def _remedy(*sizes: Grid) -> str:
    texts = [f'{{"image_size": [{height}, {width}]}}' for height, width in sizes or [("H", "W")]]
    return (
        "write the height and width of the images that they were trained with into a config.json next to the file: "
        f"{' or '.join(texts)}"
    )
