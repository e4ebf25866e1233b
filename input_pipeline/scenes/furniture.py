"""Furniture, lamps, plants, rugs, windows and pictures of the built-in scenes.

Each function returns a random design. Overlapping parts have no coplanar faces, which would show through each other.
"""

import math

import numpy as np

from input_pipeline.scenes.design import Design, Part, Seat, fabric, pick, timber, tint
from input_pipeline.scenes.geometry import BALL
from input_pipeline.scenes.shading import BOOKS, PANELS, PICTURE, RUG, SHADE, WINDOW, Material


def bed(rng: np.random.Generator) -> Design:
    """A bed with headboard, mattress and pillows."""
    half_x, half_z = rng.uniform(0.5, 0.9), rng.uniform(0.95, 1.05)
    top = rng.uniform(0.42, 0.54)
    wood, sheet = timber(rng), fabric(tint(rng, (0, 360), (0.0, 0.1), (0.85, 0.97)))
    blanket = fabric(tint(rng, (190, 350), (0.3, 0.7), (0.5, 0.85)))
    design = Design(
        "bed", half_x, half_z, top, seats=[Seat(rng.uniform(-0.3, 0.3) * half_x, half_z - 0.22, top + 0.03)]
    )
    design.block((-half_x, half_x), (0.06, top * 0.55), (-half_z, half_z), wood)
    design.block((-half_x + 0.02, half_x - 0.02), (top * 0.55, top), (-half_z + 0.05, half_z - 0.03), sheet)
    fold = rng.uniform(-0.45, -0.1) * half_z
    design.block((-half_x - 0.02, half_x + 0.02), (top * 0.4, top + 0.03), (fold, half_z + 0.01), blanket)
    edge = half_x + 0.01
    design.block((-edge, edge), (0, rng.uniform(0.8, 1.1)), (-half_z - 0.05, -half_z + 0.03), wood)
    pillows = 2 if half_x > 0.68 else 1
    for i in range(pillows):
        x = (i - (pillows - 1) / 2) * half_x
        design.ball((x, top + 0.05, -half_z + 0.3), (min(0.36, 0.85 * half_x / pillows), 0.1, 0.22), sheet)
    return design


def sofa(rng: np.random.Generator) -> Design:
    """A sofa with seats, back and arms."""
    places = pick(rng, (1, 2, 3), (3, 4, 2))
    arm, half_z = rng.uniform(0.12, 0.18), rng.uniform(0.4, 0.46)
    half_x = places * 0.29 + arm
    seat, back = rng.uniform(0.4, 0.45), rng.uniform(0.78, 0.92)
    hue = pick(rng, ((0, 20), (90, 140), (175, 225), (200, 260), (30, 45)))
    color = tint(rng, hue, (0.35, 0.8), (0.35, 0.7))
    cloth = fabric(color)
    cushion = fabric(tint(rng, hue, (0.3, 0.7), (0.45, 0.8)))
    design = Design("sofa", half_x, half_z, back)
    design.block((0.01 - half_x, half_x - 0.01), (0.07, seat - 0.13), (0.01 - half_z, half_z - 0.01), cloth)
    design.block((-half_x + arm, half_x - arm), (0.07, back), (-half_z, -half_z + 0.2), cloth)
    rest = seat + rng.uniform(0.14, 0.22)
    for side in (-1, 1):
        middle = side * (half_x - arm / 2)
        design.block((middle - arm / 2, middle + arm / 2), (0.03, rest), (-half_z, half_z), cloth)
        # A rounded top for the arm.
        design.limb((middle, rest, -half_z + arm / 2), (middle, rest, half_z - arm / 2), arm / 2, cloth)
    width = (half_x - arm) / places
    for i in range(places):
        x = (2 * i + 1 - places) * width
        design.block((x - width + 0.01, x + width - 0.01), (seat - 0.13, seat), (-half_z + 0.2, half_z + 0.02), cushion)
        design.ball((x, seat + 0.2, -half_z + 0.24), (width * 0.85, 0.2, 0.11), cushion)
        design.seats.append(Seat(x, half_z - 0.28, seat))
    return design


def chair(rng: np.random.Generator) -> Design:
    """A chair with one seat."""
    half, seat, back = rng.uniform(0.2, 0.24), rng.uniform(0.43, 0.48), rng.uniform(0.85, 1.0)
    frame = pick(rng, (timber(rng), Material(tint(rng, (0, 360), (0.0, 0.1), (0.12, 0.25)))))
    pad = fabric(tint(rng, pick(rng, ((0, 25), (30, 50), (0, 360))), (0.4, 0.85), (0.35, 0.75)))
    design = Design("chair", half, half, back, seats=[Seat(0.0, 0.0, seat)])
    design.block((-half, half), (seat - 0.06, seat), (-half, half), pad)
    slats = rng.random() < 0.4
    if slats:
        for x in (-0.6 * half, 0.0, 0.6 * half):
            design.block((x - 0.025, x + 0.025), (seat, back), (-half, -half + 0.035), frame)
        design.block((-half, half), (back - 0.1, back), (-half - 0.01, -half + 0.04), frame)
    else:
        design.block((-half, half), (seat + 0.12, back), (-half, -half + 0.05), pad)
    for x in (-half + 0.02, half - 0.02):
        design.block((x - 0.025, x + 0.025), (0, seat - 0.05), (half - 0.045, half + 0.005), frame)
        design.block((x - 0.025, x + 0.025), (0, back - 0.02), (-half - 0.005, -half + 0.045), frame)
    return design


def table(rng: np.random.Generator, low: bool = False) -> Design:
    """A table with four legs or a single foot."""
    height = rng.uniform(0.36, 0.45) if low else rng.uniform(0.7, 0.78)
    half_x, half_z = (
        (rng.uniform(0.35, 0.55), rng.uniform(0.25, 0.35)) if low else (rng.uniform(0.5, 0.8), rng.uniform(0.35, 0.45))
    )
    top = pick(rng, (timber(rng, False), timber(rng, True), Material(tint(rng, (30, 50), (0.0, 0.1), (0.75, 0.92)))))
    leg = pick(rng, (top, Material(tint(rng, (0, 360), (0.0, 0.1), (0.15, 0.3)))))
    if rng.random() < 0.35:
        radius = min(half_x, 0.55)
        design = Design("table", radius, radius, height)
        design.pipe(0, (height - 0.05, height), 0, radius, top)
        design.pipe(0, (0.03, height - 0.05), 0, 0.05, leg)
        design.pipe(0, (0, 0.04), 0, radius * 0.55, leg)
        return design
    design = Design("table", half_x, half_z, height)
    design.block((-half_x, half_x), (height - 0.05, height), (-half_z, half_z), top)
    design.block((-half_x + 0.06, half_x - 0.06), (height - 0.13, height - 0.05), (-half_z + 0.06, half_z - 0.06), top)
    for x in (-half_x + 0.07, half_x - 0.07):
        for z in (-half_z + 0.07, half_z - 0.07):
            design.block((x - 0.035, x + 0.035), (0, height - 0.05), (z - 0.035, z + 0.035), leg)
    return design


def cabinet(rng: np.random.Generator, kind: str | None = None) -> Design:
    """A cabinet, dresser or shelf; kind: None for a random choice."""
    kind = kind or pick(rng, ("wardrobe", "sideboard", "shelves", "drawers"))
    width, height, depth = {
        "wardrobe": (rng.uniform(0.8, 1.5), rng.uniform(1.75, 2.15), rng.uniform(0.5, 0.6)),
        "sideboard": (rng.uniform(1.0, 1.6), rng.uniform(0.65, 0.9), rng.uniform(0.38, 0.48)),
        "shelves": (rng.uniform(0.7, 1.2), rng.uniform(1.2, 2.0), rng.uniform(0.28, 0.36)),
        "drawers": (rng.uniform(0.42, 0.6), rng.uniform(0.5, 0.7), rng.uniform(0.36, 0.45)),
    }[kind]
    paint = Material(tint(rng, (30, 55), (0.02, 0.15), (0.75, 0.92)), grain=0.04)
    body = pick(rng, (timber(rng, False), timber(rng, True), paint))
    texture = BOOKS if kind == "shelves" else PANELS
    doors = max(1, round(width / 0.5))
    rows = {"wardrobe": 1, "sideboard": 2, "shelves": round(height / 0.36), "drawers": 3}[kind]
    body = body._replace(
        texture=texture, scale=width / doors, rise=height / rows, second=tint(rng, (0, 360), (0.5, 0.8), (0.5, 0.8))
    )
    design = Design("cabinet", width / 2, depth / 2, height)
    # The doors' pattern is centred on the box; an even number of cells needs a seam in the middle.
    design.block((-width / 2, width / 2), (0.0, height), (-depth / 2, depth / 2), body)
    return design


def lamp(rng: np.random.Generator, kind: str) -> Design:
    """A lamp of the kind "floor", "table" or "hanging", whose origin is at the ceiling."""
    metal = Material(tint(rng, (30, 50), (0.1, 0.5), (0.25, 0.6)))
    warm = tint(rng, (30, 48), (0.15, 0.4), (0.92, 1.0))
    shade = Material(warm, warm, SHADE, grain=0.02, glow=rng.uniform(0.8, 1.3))
    height = {"floor": rng.uniform(1.35, 1.7), "table": rng.uniform(0.4, 0.55), "hanging": -rng.uniform(0.6, 0.9)}[kind]
    radius = {"floor": rng.uniform(0.17, 0.23), "table": rng.uniform(0.11, 0.15), "hanging": rng.uniform(0.17, 0.26)}[
        kind
    ]
    design = Design("lamp", radius, radius, height, glow=(0.0, height - 0.1, 0.0))
    if kind == "hanging":
        design.pipe(0, (height, 0), 0, 0.015, metal)
    else:
        design.pipe(0, (0, height - 0.1), 0, 0.025 if kind == "floor" else 0.035, metal)
        design.pipe(0, (0, 0.03), 0, radius * 0.75, metal)
    if rng.random() < 0.4:
        design.ball((0, height - 0.1, 0), (radius, radius, radius), shade)
    else:
        tall = {"floor": 0.3, "table": 0.2, "hanging": 0.22}[kind]
        design.pipe(0, (height - tall, height), 0, radius, shade)
    return design


def plant(rng: np.random.Generator) -> Design:
    """A potted plant."""
    size = rng.uniform(0.8, 1.35)
    pot = Material(
        pick(rng, (tint(rng, (10, 20), (0.5, 0.7), (0.5, 0.7)), tint(rng, (0, 360), (0.0, 0.15), (0.6, 0.9))))
    )
    design = Design("plant", 0.36 * size, 0.36 * size, size)
    pot_height = rng.uniform(0.26, 0.34) * size
    design.pipe(0, (0, pot_height), 0, 0.15 * size, pot)
    design.pipe(0, (pot_height, pot_height + 0.01), 0, 0.13 * size, Material((0.2, 0.14, 0.1)))
    leaves = int(rng.integers(7, 10))
    turn = rng.uniform(0, 360)
    for i in range(leaves):
        green = Material(tint(rng, (85, 140), (0.45, 0.75), (0.3, 0.6)), grain=0.25, fine=(14.0, 14.0))
        lean = math.radians(rng.uniform(8, 25) if i % 2 else rng.uniform(28, 45))
        around = math.radians(turn + i * 360 / leaves)
        length = size - pot_height if i % 2 else 0.8 * (size - pot_height)
        out, up = length * math.sin(lean), length * math.cos(lean)
        tip = (out * math.cos(around), pot_height + up, out * math.sin(around))
        base = (0.2 * tip[0], pot_height + 0.05, 0.2 * tip[2])
        design.parts.append(Part(BALL, base, tip, (0.1 * size, 0.05 * size), green))
    return design


def rug(rng: np.random.Generator) -> Design:
    """A rug on the floor."""
    half_x, half_z = rng.uniform(0.8, 1.3), rng.uniform(0.6, 1.0)
    hue = pick(rng, ((0, 30), (200, 260), (340, 360)))
    weave = Material(
        tint(rng, hue, (0.35, 0.7), (0.45, 0.75)),
        tint(rng, (25, 50), (0.1, 0.35), (0.6, 0.9)),
        RUG,
        scale=half_x * pick(rng, (0.3, 0.5, 20.0)),
        grain=0.2,
        fine=(50.0, 50.0),
    )
    # Thinner than a pixel, so that all pixels of a rug have the floor's normals.
    design = Design("rug", half_x, half_z, 0.001)
    design.block((-half_x, half_x), (0, 0.001), (-half_z, half_z), weave)
    return design


def window(rng: np.random.Generator) -> Design:
    """A window on a wall at z = 0, centred at the origin."""
    width, height = rng.uniform(0.9, 1.6), rng.uniform(0.95, 1.25)
    sky = tint(rng, (195, 215), (0.1, 0.4), (0.9, 1.0))
    pane = Material(
        tint(rng, (40, 60), (0.0, 0.1), (0.85, 0.95)),
        sky,
        WINDOW,
        scale=width,
        rise=height,
        grain=0.0,
        glow=rng.uniform(0.7, 1.1),
    )
    design = Design("window", width / 2, 0.012, height / 2)
    design.block((-width / 2, width / 2), (-height / 2, height / 2), (0, 0.012), pane)
    return design


def picture(rng: np.random.Generator) -> Design:
    """A picture on a wall at z = 0, centred at the origin."""
    width, height = rng.uniform(0.4, 0.9), rng.uniform(0.35, 0.7)
    paint = Material(
        tint(rng, (0, 360), (0.4, 0.8), (0.3, 0.6)),
        tint(rng, (0, 360), (0.3, 0.7), (0.6, 0.9)),
        PICTURE,
        scale=width,
        rise=height,
        grain=0.3,
        fine=(12.0, 12.0),
    )
    design = Design("picture", width / 2, 0.015, height / 2)
    design.block((-width / 2, width / 2), (-height / 2, height / 2), (0, 0.015), paint)
    return design
