"""Materials, textures, light and shadow of the built-in scenes: from surfaces to linear colours.

Colours are linear RGB in [0, 1]; the display curve is a square root. One light casts shadows, by a shadow map from the
ray caster that also computes the labels. Further light: an ambient term with occlusion in corners and around objects on
the floor, and a glow around lamps.

Dims: P solids, N pixels, O objects on the floor, L lamps.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from input_pipeline.scenes import geometry
from input_pipeline.scenes.geometry import Camera, Hits, Solids, Surface

(PLAIN, PLANKS, STRIPES, BANDS, CHECKER, PANELS, BOOKS, WINDOW, PICTURE, HAIR, SHADE, WALLPAPER, RUG) = range(13)

SHADOW_SIZE = 112  # height and width of the shadow map, pixels
SHADOW_FOCAL = 0.8  # in map heights: half of the view spans 1 / (2 * 0.8) of the light's distance
SHADOW_BIAS = 0.04  # metres; smaller values let surfaces shadow themselves
NOISE_SIZE = 64
_NOISE = np.random.Generator(np.random.Philox(20231002)).random(NOISE_SIZE * NOISE_SIZE, dtype=np.float32)


class Material(NamedTuple):
    """Appearance of a solid; colours are display RGB in [0, 1], lengths in metres."""

    color: tuple[float, float, float]
    second: tuple[float, float, float] = (0.0, 0.0, 0.0)
    texture: int = PLAIN
    scale: float = 1.0  # horizontal period
    rise: float = 1.0  # vertical period
    grain: float = 0.06  # strength of the noise
    fine: tuple[float, float] = (25.0, 25.0)  # noise cells per metre, along the two texture axes
    glow: float = 0.0  # emission of the second colour


@dataclasses.dataclass(frozen=True)
class Look:
    """Appearance of a scene, used for the image but not for the labels."""

    color: np.ndarray  # (3, P) float32 linear
    second: np.ndarray  # (3, P) float32 linear
    texture: np.ndarray  # (P,) int
    scale: np.ndarray  # (P,) float32
    rise: np.ndarray  # (P,) float32
    grain: np.ndarray  # (P,) float32
    fine: np.ndarray  # (2, P) float32
    glow: np.ndarray  # (P,) float32
    light: Camera  # the light that casts shadows, looking at the scene
    light_color: np.ndarray  # (3,) float32
    ambient: np.ndarray  # (3,) float32
    room: np.ndarray  # (3,) float32 metres: width, height, length
    feet: np.ndarray  # (O, 5) float32: x, z, half-extents and heading of objects on the floor
    lamps: np.ndarray  # (L, 3) float32 positions of glowing lamps
    lamp_color: np.ndarray  # (3,) float32
    brightness: float  # target of the exposure: mean display value
    noise: float  # standard deviation of the sensor's noise, in display values


def make_look(materials: list[Material], **rest) -> Look:
    """Stacks the materials, one per solid, into arrays; `rest`: the other fields of `Look`."""
    column = list(zip(*materials, strict=True))
    number = [np.array(values, np.float32) for values in column]
    return Look(
        color=number[0].T ** 2,
        second=number[1].T ** 2,
        texture=np.array(column[2]),
        scale=number[3],
        rise=number[4],
        grain=number[5],
        fine=number[6].T,
        glow=number[7],
        **rest,
    )


def shadow_map(solids: Solids, light: Camera) -> np.ndarray:
    """Shadow map (SHADOW_SIZE, SHADOW_SIZE) float32: depth from the light, inf without hit; walls cast no shadow."""
    pairs = geometry.candidate_pairs(solids, light, SHADOW_SIZE, SHADOW_SIZE)
    x, y = geometry.pixel_rays(light, SHADOW_SIZE, SHADOW_SIZE)
    return geometry.cast(solids, light, x, y, pairs, room=False).depth.reshape(SHADOW_SIZE, SHADOW_SIZE)


def radiance(look: Look, shadows: np.ndarray, camera: Camera, height: int, hits: Hits, seen: Surface) -> np.ndarray:
    """Linear colour (3, N) float32 of surfaces in the view of `camera`; height: of the image, pixels."""
    view = camera.position[:, None] - seen.point
    slant = np.abs(np.einsum("in,in->n", view, seen.normal)) / np.sqrt(np.einsum("in,in->n", view, view))
    # Pixel footprint on the surface in metres, the mean of along and across the slope: textures neither alias nor fade
    # too early.
    pixel = hits.depth * np.float32(1 / (camera.focal * height)) / np.sqrt(np.maximum(slant, np.float32(1 / 6)))
    albedo, glow = _albedo(look, hits, seen, pixel)
    to_light = look.light.position[:, None] - seen.point
    distance = np.sqrt(np.einsum("in,in->n", to_light, to_light))
    facing = np.maximum(np.einsum("in,in->n", to_light, seen.normal) / distance, 0)
    lit = facing * visibility(look.light, shadows, seen)
    # Surfaces that face up get more ambient light, from the bright ceiling, than those that face the floor.
    around = (0.97 + 0.03 * seen.normal[1]) * _openness(look, hits, seen)
    light = look.ambient[:, None] * around + look.light_color[:, None] * lit
    for lamp in look.lamps:
        towards = lamp[:, None] - seen.point
        square = np.einsum("in,in->n", towards, towards)
        shine = np.maximum(np.einsum("in,in->n", towards, seen.normal), 0) / (np.sqrt(square) * (square + 0.15))
        light += look.lamp_color[:, None] * shine
    return albedo * light + glow


def display(linear: np.ndarray, brightness: float, noise: np.ndarray) -> np.ndarray:
    """Tone-maps linear colours (H, W, 3) to uint8 with a mean display value of about `brightness` (0..1).

    noise: (H, W, 3), added, in display values (0..255).
    """
    exposed = linear * (brightness**2 / float(np.minimum(linear, 1).mean()))
    value = np.sqrt(exposed / (1 + 0.25 * exposed * exposed)) * 255 + noise
    return np.clip(np.rint(value), 0, 255).astype(np.uint8)


def visibility(light: Camera, shadows: np.ndarray, seen: Surface) -> np.ndarray:
    """Share (N,) of the light that reaches each point: shadow tests at 3x3 texels with B-spline weights."""
    lifted = seen.point + SHADOW_BIAS * seen.normal - light.position[:, None]
    x, y, z = np.einsum("ji,in->jn", light.rotation, lifted)
    scale = light.focal * SHADOW_SIZE / np.maximum(z, geometry.NEAR)
    column = np.clip(x * scale + SHADOW_SIZE / 2, 2, SHADOW_SIZE - 3)
    row = np.clip(y * scale + SHADOW_SIZE / 2, 2, SHADOW_SIZE - 3)
    # Centre texel and offset in [-0.5, 0.5); the weights are those of a quadratic B-spline.
    base_column, base_row = column.astype(np.int32), row.astype(np.int32)
    u, v = column - base_column - np.float32(0.5), row - base_row - np.float32(0.5)
    weights_u = (0.5 * (0.5 - u) ** 2, 0.75 - u * u, 0.5 * (0.5 + u) ** 2)
    weights_v = (0.5 * (0.5 - v) ** 2, 0.75 - v * v, 0.5 * (0.5 + v) ** 2)
    corner = (base_row - 1) * SHADOW_SIZE + base_column - 1
    flat, near = shadows.ravel(), z - SHADOW_BIAS
    visible = np.zeros_like(z)
    for j in range(3):
        for i in range(3):
            visible += weights_u[i] * weights_v[j] * (flat[corner + (j * SHADOW_SIZE + i)] > near)
    return visible


def _openness(look: Look, hits: Hits, seen: Surface) -> np.ndarray:
    """Share (N,) of the ambient light left by occlusion in corners of the room and around objects on the floor."""
    light = np.ones_like(hits.depth)
    for axis in range(3):
        for gap, towards in (
            (seen.point[axis], seen.normal[axis]),
            (look.room[axis] - seen.point[axis], -seen.normal[axis]),
        ):
            light *= 1 - 0.4 * np.exp(gap * np.float32(-3)) * (1 - np.maximum(towards, 0))
    ground = np.flatnonzero((seen.point[1] < 0.03) & (seen.normal[1] > 0.9))
    x, z = seen.point[0, ground], seen.point[2, ground]
    shade = np.ones_like(x)
    for foot_x, foot_z, half_x, half_z, heading in look.feet:
        c, s = np.cos(heading), np.sin(heading)
        across = np.abs((x - foot_x) * c - (z - foot_z) * s) - half_x
        ahead = np.abs((x - foot_x) * s + (z - foot_z) * c) - half_z
        gap = np.maximum(np.maximum(across, ahead), np.float32(-0.15))
        shade *= 1 - np.float32(0.42) * np.exp(-np.maximum(gap + np.float32(0.05), 0) * np.float32(7))
    light[ground] *= shade
    return light


def _albedo(look: Look, hits: Hits, seen: Surface, pixel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reflected share (3, N) and emitted light (3, N) of each surface."""
    solid = hits.solid
    # Texture axes: the two axes of the face, whose normal is the axis of the largest unit coordinate.
    size = np.abs(seen.unit)
    level, side = size[1] >= np.maximum(size[0], size[2]), size[0] > size[2]
    across = np.where(side & ~level, seen.local[2], seen.local[0]) * look.fine[0, solid]
    along = np.where(level, seen.local[2], seen.local[1]) * look.fine[1, solid]
    # Noise finer than a pixel would alias.
    fade = 1 / (1 + (pixel * np.minimum(look.fine[0], look.fine[1])[solid]) ** 2)
    gain = 1 + look.grain[solid] * fade * (_noise(across + 5.1 * solid, along) * 2 - 1)
    mix = np.zeros_like(gain)
    texture = look.texture[solid]
    for code, paint in _TEXTURES.items():
        chosen = np.flatnonzero(texture == code)
        if len(chosen):
            which = solid[chosen]
            part = Surface(*(np.take(field, chosen, axis=1) for field in seen))
            mix[chosen], factor = paint(part, look.scale[which], look.rise[which], pixel[chosen], which)
            gain[chosen] *= factor
    color, second = np.take(look.color, solid, axis=1), np.take(look.second, solid, axis=1)
    return (color + (second - color) * mix) * gain, second * (look.glow[solid] * mix)


def _noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth noise in [0, 1] with cells of size 1, periodic in NOISE_SIZE cells."""
    floor_u, floor_v = np.floor(u), np.floor(v)
    du, dv = u - floor_u, v - floor_v
    du, dv = du * du * (3 - 2 * du), dv * dv * (3 - 2 * dv)
    left, upper = floor_u.astype(np.int32) % NOISE_SIZE, floor_v.astype(np.int32) % NOISE_SIZE * NOISE_SIZE
    right, lower = (left + 1) % NOISE_SIZE, (upper + NOISE_SIZE) % (NOISE_SIZE * NOISE_SIZE)
    top = _NOISE[upper + left] * (1 - du) + _NOISE[upper + right] * du
    bottom = _NOISE[lower + left] * (1 - du) + _NOISE[lower + right] * du
    return top * (1 - dv) + bottom * dv


def _pick(*numbers: np.ndarray) -> np.ndarray:
    """Deterministic pseudo-random value in [0, 1] for each tuple of integers."""
    key = np.zeros(numbers[0].shape, np.int32)
    for factor, number in zip((1, 191, 2711), numbers, strict=False):
        key += np.int32(factor) * number.astype(np.int32)
    return _NOISE[key % (NOISE_SIZE * NOISE_SIZE)]


def _wave(u: np.ndarray, blur: np.ndarray) -> np.ndarray:
    """Square wave of period 1 between 0 and 1, with steps smoothed over `blur` periods; constant for a large blur."""
    ramp = np.abs(u - np.floor(u) - np.float32(0.5)) * 2 - np.float32(0.5)
    sharp = np.clip(0.5 + ramp / np.maximum(2 * blur, np.float32(0.02)), 0, 1)
    return 0.5 + (sharp - 0.5) * np.clip(2 - 2 * blur, 0, 1)


def _line(u: np.ndarray, width: np.ndarray | float, pixel: np.ndarray) -> np.ndarray:
    """Share of a pixel covered by a line of the given width at distance u, metres."""
    half = np.maximum(pixel, width) / 2
    return np.clip(1.5 - np.abs(u) / half, 0, 1) * np.minimum(width / pixel, 1)


def _planks(s, scale, rise, pixel, solid):
    board = np.floor(s.local[0] / scale)
    length = s.local[2] / rise + 7 * _pick(board)
    piece = np.floor(length)
    seam = np.minimum(s.local[0] - board * scale, (board + 1) * scale - s.local[0])
    end = np.minimum(length - piece, piece + 1 - length) * rise
    gain = 1 - 0.5 * np.maximum(_line(seam, 0.008, pixel), _line(end, 0.008, pixel))
    return _pick(board, piece), gain


def _stripes(s, scale, rise, pixel, solid):
    return _wave((s.local[0] + s.local[2]) / scale, pixel / scale), 1


def _wallpaper(s, scale, rise, pixel, solid):
    above_floor = s.local[1] + rise  # for walls, `rise` is half the height of the room
    board = np.clip(0.5 + (0.1 - above_floor) / pixel, 0, 1)  # skirting board
    stripes = _wave((s.local[0] + s.local[2]) / scale, pixel / scale) * (1 - board)
    return stripes, 1 + 0.35 * board


def _bands(s, scale, rise, pixel, solid):
    return _wave(s.local[1] / rise, pixel / rise), 1


def _checker(s, scale, rise, pixel, solid):
    a, b = _wave(s.local[0] / scale, pixel / scale), _wave(s.local[2] / scale, pixel / scale)
    return a + b - 2 * a * b, 1


def _rug(s, scale, rise, pixel, solid):
    border = np.max(np.abs(s.unit[[0, 2]]), axis=0) > 0.84
    mix, gain = _checker(s, scale, rise, pixel, solid)
    return np.where(border, 1, mix), gain


def _panels(s, scale, rise, pixel, solid):
    front = s.unit[2] > 0.99
    column, row = np.floor(s.local[0] / scale + 0.5), np.floor(s.local[1] / rise + 0.5)
    u, v = s.local[0] - column * scale, s.local[1] - row * rise
    seam = np.maximum(_line(scale / 2 - np.abs(u), 0.015, pixel), _line(rise / 2 - np.abs(v), 0.015, pixel))
    knob = _line(np.sqrt((np.abs(u) - 0.36 * scale) ** 2 + v * v), 0.04, pixel)
    return np.zeros_like(u), 1 - np.where(front, np.maximum(0.55 * seam, 0.6 * knob), 0)


def _books(s, scale, rise, pixel, solid):
    front = s.unit[2] > 0.99
    shelf = np.floor(s.local[1] / rise)
    up = s.local[1] - shelf * rise
    book = np.floor(s.local[0] / 0.055 + 9 * _pick(shelf))
    height = (0.6 + 0.3 * _pick(book, shelf)) * rise
    inside = front & (np.abs(s.unit[0]) < 0.93) & (np.abs(s.unit[1]) < 0.95) & (up > 0.03)
    spine = inside & (up < height)
    gain = np.where(spine, 0.5 + 1.2 * _pick(book, shelf, solid), np.where(inside, 0.35, 1))
    return np.where(spine, _pick(book, solid, shelf), 0), gain


def _window(s, scale, rise, pixel, solid):
    x, y = np.abs(s.local[0]), s.local[1]
    edge_x, edge_y = (1 - np.abs(s.unit[0])) * scale / 2, (1 - np.abs(s.unit[1])) * rise / 2
    frame = np.maximum(
        _line(np.minimum(edge_x, edge_y), 0.12, pixel), np.maximum(_line(x, 0.05, pixel), _line(y, 0.05, pixel))
    )
    return 1 - frame, 1


def _picture(s, scale, rise, pixel, solid):
    edge = np.minimum((1 - np.abs(s.unit[0])) * scale, (1 - np.abs(s.unit[1])) * rise) / 2
    frame = _line(edge, 0.06, pixel)
    phase = 6 * _pick(solid)
    hills = s.unit[1] - 0.45 * np.sin(2.5 * s.unit[0] + phase) - 0.2 * np.sin(6 * s.unit[0] + 2 * phase)
    return np.clip(0.5 + 3 * hills, 0, 1), (1 - 0.8 * frame) * (0.85 + 0.3 * s.unit[1])


def _hair(s, scale, rise, pixel, solid):
    x, y, z = s.unit
    return ((y > 0.42) | ((z < 0.15) & (y > -0.55)) | ((np.abs(x) > 0.85) & (y > 0))).astype(np.float32), 1


def _shade(s, scale, rise, pixel, solid):
    return 1 - 0.45 * s.unit[1] ** 2, 1


_TEXTURES = {
    PLANKS: _planks,
    STRIPES: _stripes,
    BANDS: _bands,
    CHECKER: _checker,
    PANELS: _panels,
    BOOKS: _books,
    WINDOW: _window,
    PICTURE: _picture,
    HAIR: _hair,
    SHADE: _shade,
    WALLPAPER: _wallpaper,
    RUG: _rug,
}
