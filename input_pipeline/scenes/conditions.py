"""Conditions of the built-in scenes of `dataset.variety="wide"`: light, view and clutter, and what each changes.

The conditions of a scene are three fair, independent draws from a generator of their own, so they are known without
rendering, and the layout's generator draws as without them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

LIGHTS, VIEWS, CLUTTERS = ("light", "dark"), ("near", "far"), ("empty", "cluttered")
NAMES = (*LIGHTS, *VIEWS, *CLUTTERS)

Range = tuple[float, float]


class Condition(NamedTuple):
    """Conditions of a scene, one of each of LIGHTS, VIEWS and CLUTTERS."""

    light: str
    view: str
    clutter: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """Ranges from which a layout is drawn; the defaults are those of `dataset.variety="usual"`.

    Lengths are in metres, angles in degrees. Ranges of whole numbers include both ends.
    """

    # View. `scale` multiplies the distances from the camera at which people and objects are placed.
    scale: float = 1.0
    width: Range = (3.6, 6.0)
    length: Range = (4.2, 8.0)
    field: Range = (58, 70)  # horizontal field of view
    # Clutter.
    furniture: tuple[int, int | None] = (5, None)  # pieces of a theme; None: all of them
    themes: int = 1
    trinkets: tuple[int, int] | None = None  # small lamps, plants and drawers on the floor; None: not drawn
    rug: float = 0.6  # probability
    windows: tuple[int, int] = (1, 2)
    pictures: tuple[int, int] = (1, 3)
    # Light; colours are linear RGB.
    brightness: Range = (0.48, 0.64)  # mean display value
    strength: Range = (0.9, 1.6)  # of the light that casts shadows
    ambient: tuple[float, float, float] = (0.62, 0.64, 0.68)
    lamp_color: tuple[float, float, float] = (0.30, 0.22, 0.12)
    hanging_lamp: bool = False  # one more lamp
    noise: float = 2.0  # standard deviation of the sensor's noise, in display values


USUAL = Setting()

_CHANGES = {
    "light": {},
    "dark": {
        "brightness": (0.22, 0.32),
        "strength": (0.02, 0.1),
        "ambient": (0.065, 0.055, 0.05),
        "lamp_color": (0.50, 0.32, 0.15),
        "hanging_lamp": True,
        "noise": 5.0,
    },
    "near": {"scale": 0.5, "width": (2.4, 3.4), "length": (2.2, 3.2), "field": (54, 64)},
    "far": {"scale": 1.9, "width": (5.5, 9.0), "length": (9.5, 14.0), "field": (66, 80)},
    "empty": {"furniture": (0, 2), "rug": 0.2, "windows": (0, 1), "pictures": (0, 1)},
    "cluttered": {"furniture": (7, None), "themes": 2, "trinkets": (4, 8), "rug": 0.9, "pictures": (4, 8)},
}


def condition(index: int, seed: int = 0) -> Condition:
    """Conditions of scene number `index` of the wide family `seed`."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index, 1])))
    light, view, clutter = rng.integers(2, size=3)
    return Condition(LIGHTS[light], VIEWS[view], CLUTTERS[clutter])


def setting(of: Condition) -> Setting:
    """Ranges for the layout of a scene with these conditions."""
    changes = [item for name in of for item in _CHANGES[name].items()]
    return dataclasses.replace(USUAL, **dict(changes))
