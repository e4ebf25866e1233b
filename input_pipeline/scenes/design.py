"""Building blocks of the furniture and people of the built-in scenes.

A design is a list of solids in its object frame: x to the side, y up from the floor, z to the front. The layout places
it in the room. Lengths are in metres, angles in degrees.
"""

import colorsys
import dataclasses
from typing import NamedTuple

import numpy as np

from input_pipeline.scenes.geometry import BALL, BOX, CAPSULE, CYLINDER
from input_pipeline.scenes.shading import Material

Point = tuple[float, float, float]


class Part(NamedTuple):
    """One solid of a design; `body` is its label in human_parts."""

    kind: int
    bottom: Point
    top: Point
    radii: tuple[float, float]
    material: Material
    body: int = 0


class Seat(NamedTuple):
    """Place for a sitting person: hips at (x, height, z), facing the front."""

    x: float
    z: float
    height: float


@dataclasses.dataclass
class Design:
    """An object of one semantic class.

    half_x, half_z: half-extents of the footprint. height: of its top, or of the surface on which objects may stand.
    """

    name: str
    half_x: float
    half_z: float
    height: float
    parts: list[Part] = dataclasses.field(default_factory=list)
    seats: list[Seat] = dataclasses.field(default_factory=list)
    glow: Point | None = None  # position of a light inside

    def block(self, x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], material: Material) -> None:
        """Adds an upright box."""
        middle_x, middle_z = (x[0] + x[1]) / 2, (z[0] + z[1]) / 2
        radii = ((x[1] - x[0]) / 2, (z[1] - z[0]) / 2)
        self.parts.append(Part(BOX, (middle_x, y[0], middle_z), (middle_x, y[1], middle_z), radii, material))

    def pipe(self, x: float, y: tuple[float, float], z: float, radius: float, material: Material) -> None:
        """Adds an upright cylinder."""
        self.parts.append(Part(CYLINDER, (x, y[0], z), (x, y[1], z), (radius, radius), material))

    def ball(self, centre: Point, radius: Point, material: Material, body: int = 0) -> None:
        """Adds an upright ellipsoid."""
        x, y, z = centre
        self.parts.append(
            Part(BALL, (x, y - radius[1], z), (x, y + radius[1], z), (radius[0], radius[2]), material, body)
        )

    def limb(self, a: Point, b: Point, radii: float | tuple[float, float], material: Material, body: int = 0) -> None:
        """Adds a capsule around the segment from a to b."""
        both = radii if isinstance(radii, tuple) else (radii, radii)
        self.parts.append(Part(CAPSULE, a, b, both, material, body))


def tint(rng: np.random.Generator, hue, saturation, value) -> tuple[float, float, float]:
    """Random display colour; hue (degrees), saturation and value (0..1) are uniform in the given ranges."""
    h, s, v = rng.uniform((hue[0], saturation[0], value[0]), (hue[1], saturation[1], value[1]))
    return colorsys.hsv_to_rgb(h / 360 % 1, s, v)


def pick(rng: np.random.Generator, options, weights=None):
    """Random choice among `options` with the given weights, equal by default."""
    if weights is None:
        return options[int(rng.integers(len(options)))]
    total, draw = 0.0, rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        total += weight
        if draw < total:
            return option
    return options[-1]


def timber(rng: np.random.Generator, dark: bool | None = None) -> Material:
    """Wood or painted wood of a random colour; dark: None for a random choice."""
    if dark is None:
        dark = rng.random() < 0.4
    color = tint(rng, (18, 32), (0.5, 0.75), (0.3, 0.45) if dark else (0.55, 0.75))
    return Material(color, grain=0.22, fine=(9.0, 60.0))


def fabric(color: tuple[float, float, float]) -> Material:
    return Material(color, grain=0.16, fine=(60.0, 60.0))
