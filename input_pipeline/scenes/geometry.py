"""Solids, pinhole cameras and the vectorised ray caster of the built-in scenes.

Frames, in metres. World: x right, y up, z into the room. Camera: x right, y down, z forward. Object: x to the side, y
up, z to the front. A ray through a pixel has the camera-frame direction (x, y, 1), so the ray parameter t is the planar
depth, as in NYUD, without conversion.

Every solid is the image of one of four unit shapes under a rotation, three scales and a shift:

    box      |x|, |y|, |z| <= 1
    ball     x^2 + y^2 + z^2 <= 1
    cylinder x^2 + z^2 <= 1, |y| <= 1
    capsule  points within 1 of the segment from (0, -h, 0) to (0, h, 0); h is the solid's `stretch`

Rays are transformed into the unit frame, which preserves t, so one intersection routine per shape suffices. The first
six entries of every scene are the faces of the room (kind WALLS), a box seen from inside.

Dims: P solids, N rays or pixels, M candidate (ray, solid) pairs.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

WALLS, BOX, BALL, CYLINDER, CAPSULE = range(5)
ROOM_FACES = 6  # solids 0..5: x low, x high, y low (floor), y high (ceiling), z low, z high
NEAR = 0.05  # metres, near clipping distance
TINY = np.float32(1e-9)


class Camera(NamedTuple):
    """A pinhole camera; `focal` is in image heights, hence independent of the image size."""

    position: np.ndarray  # (3,) float32, world
    rotation: np.ndarray  # (3, 3) float32, rows = the camera's right, down and forward axes in the world
    focal: float


@dataclasses.dataclass(frozen=True)
class Solids:
    """All solids of a scene, sorted by kind. Arrays of length P."""

    kind: np.ndarray  # (P,) int, WALLS..CAPSULE
    centre: np.ndarray  # (P, 3) float32, world
    unit: np.ndarray  # (P, 3, 3) float32, rows = the solid's axes, orthonormal, world
    semi: np.ndarray  # (P, 3) float32 metres along these axes
    stretch: np.ndarray  # (P,) float32, h of a capsule, else 0
    bounds: np.ndarray  # slice borders of the kinds: kind k is bounds[k]:bounds[k + 1]


class Hits(NamedTuple):
    """The nearest surface of each ray."""

    depth: np.ndarray  # (N,) float32 metres along the camera's z
    solid: np.ndarray  # (N,) int32, index of the solid


class Surface(NamedTuple):
    """Surface points hit by rays, one column per ray."""

    point: np.ndarray  # (3, N) float32 world
    normal: np.ndarray  # (3, N) float32 world, unit, pointing out of the solid (into the room for walls)
    local: np.ndarray  # (3, N) float32 metres in the solid's own axes from its centre
    unit: np.ndarray  # (3, N) float32, `local` divided by the solid's scales


class Pairs(NamedTuple):
    """Candidate (ray, solid) pairs, sorted by solid."""

    ray: np.ndarray  # (M,) int32
    count: np.ndarray  # (P,) int, number of candidate rays of each solid


def make_camera(position, forward, focal: float, roll: float = 0.0) -> Camera:
    """Camera at `position` that looks along `forward` (not vertical), rolled clockwise by `roll` radians."""
    ahead = np.asarray(forward, np.float64)
    ahead = ahead / np.linalg.norm(ahead)
    right = np.cross((0.0, 1.0, 0.0), ahead)
    right = right / np.linalg.norm(right)
    down = np.cross(right, ahead)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, ahead])
    return Camera(np.asarray(position, np.float32), rotation.astype(np.float32), float(focal))


def pixel_rays(camera: Camera, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rays through the pixel centres, row by row: x and y of the directions (x, y, 1), (H * W,) float32 each."""
    scale = np.float32(1.0 / (camera.focal * height))
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)) * scale
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)) * scale
    return np.tile(x, height), np.repeat(y, width)


def make_solids(kind, bottom, top, radii, origin, heading) -> tuple[Solids, np.ndarray]:
    """Places solids, given by their y axis in the object frame, in the world and sorts them by kind.

    Args:
      kind: (P,).
      bottom, top: (P, 3) metres, end points of the axis in the object frame: faces of a box or cylinder, poles of a
        ball, end points of a capsule's inner segment.
      radii: (P, 2) metres, half-extents across the axis, towards the object's x and z.
      origin: (P, 3) metres, position of the object in the world.
      heading: (P,) radians, rotation of the object about the vertical.

    Returns:
      the solids, and the order (P,): solid i of the result is entry order[i] of the arguments.
    """
    order = np.argsort(kind, kind="stable")
    kind, bottom, top, radii = kind[order], bottom[order], top[order], radii[order]
    along = top - bottom
    half = np.sqrt((along**2).sum(1)) / 2
    axis_y = along / (2 * half[:, None])
    # An axis along the object's x has no x component across it, so z is projected instead.
    hint = np.where(np.abs(axis_y[:, :1]) > 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    axis_x = hint - (hint * axis_y).sum(1, keepdims=True) * axis_y
    axis_x /= np.sqrt((axis_x**2).sum(1, keepdims=True))
    axes = np.stack([axis_x, axis_y, np.cross(axis_x, axis_y)], axis=1)  # (P, 3 axes, 3)

    capsule = kind == CAPSULE
    round_end = radii.min(axis=1)
    semi = np.stack([radii[:, 0], np.where(capsule, round_end, half), radii[:, 1]], axis=1)
    turn = np.zeros((len(kind), 3, 3))
    c, s = np.cos(heading[order]), np.sin(heading[order])
    turn[:, 0, 0], turn[:, 0, 2], turn[:, 1, 1], turn[:, 2, 0], turn[:, 2, 2] = c, -s, 1, s, c
    solids = Solids(
        kind=kind,
        centre=(origin[order] + np.einsum("pi,pij->pj", (bottom + top) / 2, turn)).astype(np.float32),
        unit=np.einsum("pki,pij->pkj", axes, turn).astype(np.float32),
        semi=semi.astype(np.float32),
        stretch=np.where(capsule, half / round_end, 0).astype(np.float32),
        bounds=np.searchsorted(kind, np.arange(CAPSULE + 2)),
    )
    return solids, order


def candidate_pairs(solids: Solids, camera: Camera, height: int, width: int) -> Pairs:
    """Pairs of each solid with the pixels of its bounding rectangle, grown by one pixel, for a whole image."""
    box = solids.unit * solids.semi[..., None]  # (P, 3 axes, 3)
    box[:, 1] *= 1 + solids.stretch[:, None]
    corner = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1]), np.float32).reshape(3, 8)
    world = np.einsum("pki,kc->pci", box, corner) + (solids.centre - camera.position)[:, None]  # (P, 8, 3)
    seen = np.einsum("pci,ji->jpc", world, camera.rotation)  # (3, P, 8)
    z = np.maximum(seen[2], NEAR)
    scale = camera.focal * height
    column = seen[0] / z * scale + width / 2
    row = seen[1] / z * scale + height / 2
    # The projection of a solid that reaches behind the camera is unbounded, so all pixels are candidates.
    crossing = seen[2].min(1) < NEAR
    left = np.where(crossing, 0, np.clip(column.min(1) - 1, 0, width)).astype(np.int32)
    right = np.where(crossing, width, np.clip(column.max(1) + 2, 0, width)).astype(np.int32)
    upper = np.where(crossing, 0, np.clip(row.min(1) - 1, 0, height)).astype(np.int32)
    lower = np.where(crossing, height, np.clip(row.max(1) + 2, 0, height)).astype(np.int32)
    count = (right - left) * (lower - upper)
    count[seen[2].max(1) < NEAR] = 0
    count[:ROOM_FACES] = 0

    wide = np.maximum(right - left, 1)
    start = np.cumsum(count) - count
    place = np.arange(count.sum(), dtype=np.int32) - np.repeat(start.astype(np.int32), count)
    across = np.repeat(wide, count)
    down = place // across
    ray = (np.repeat(upper * width + left, count) + down * (width - across) + place).astype(np.int32)
    return Pairs(ray, count)


def keep_rays(pairs: Pairs, chosen: np.ndarray, total: int, copies: int) -> Pairs:
    """Selects the pairs of some rays and replaces each of these rays by `copies` rays.

    chosen: (n,), indices of the selected rays, out of `total`. Ray chosen[i] becomes `copies` rays, from i * copies on.
    """
    number = np.full(total, -1, np.int32)
    number[chosen] = np.arange(len(chosen), dtype=np.int32)
    new = number[pairs.ray]
    solid = np.repeat(np.arange(len(pairs.count)), pairs.count)[new >= 0]
    ray = (new[new >= 0][:, None] * copies + np.arange(copies, dtype=np.int32)).ravel()
    return Pairs(ray, np.bincount(solid, minlength=len(pairs.count)) * copies)


def cast(solids: Solids, camera: Camera, x: np.ndarray, y: np.ndarray, pairs: Pairs, room: bool = True) -> Hits:
    """Nearest hit of each ray (x, y, 1).

    room: whether the six faces of the room stop rays. Without them, a ray without hit has depth inf and solid 0.
    """
    inverse = solids.unit / solids.semi[..., None]  # (P, 3, 3), rows map a world vector to unit coordinates
    matrix = np.einsum("pki,ji->pkj", inverse, camera.rotation)
    origin = np.einsum("pki,pi->pk", inverse, camera.position - solids.centre)
    if room:
        depth, solid = _room_exit(matrix[0], origin[0], x, y)
    else:
        depth, solid = np.full(x.shape, np.inf, np.float32), np.zeros(x.shape, np.int32)

    ends = np.concatenate([[0], np.cumsum(pairs.count)])
    found_depth, found_ray, found_solid = [], [], []
    for kind in (BOX, BALL, CYLINDER, CAPSULE):
        first, last = solids.bounds[kind], solids.bounds[kind + 1]
        rays = pairs.ray[ends[first] : ends[last]]
        repeat = pairs.count[first:last]
        if not len(rays):
            continue
        along, from_point = [], []
        ray_x, ray_y = x[rays], y[rays]
        for k in range(3):
            m = np.repeat(matrix[first:last, k], repeat, axis=0).T  # (3, M)
            along.append(m[0] * ray_x + m[1] * ray_y + m[2])
            from_point.append(np.repeat(origin[first:last, k], repeat))
        stretch = np.repeat(solids.stretch[first:last], repeat)
        t = _ENTRY[kind](from_point, along, stretch)
        hit = np.flatnonzero((t > NEAR) & (t < depth[rays]))
        found_depth.append(t[hit])
        found_ray.append(rays[hit])
        found_solid.append(np.repeat(np.arange(first, last, dtype=np.int32), repeat)[hit])
    if found_depth:
        t, rays, which = map(np.concatenate, (found_depth, found_ray, found_solid))
        np.minimum.at(depth, rays, t)
        nearest = np.flatnonzero(t == depth[rays])
        solid[rays[nearest]] = which[nearest]
    return Hits(depth, solid)


def surface(solids: Solids, camera: Camera, x: np.ndarray, y: np.ndarray, hits: Hits) -> Surface:
    """Points, normals and local coordinates of the hits of rays (x, y, 1)."""
    ray = np.stack([x * hits.depth, y * hits.depth, hits.depth])
    point = np.einsum("ij,in->jn", camera.rotation, ray) + camera.position[:, None]
    inverse = solids.unit / solids.semi[..., None]
    axes = np.take(solids.unit.reshape(-1, 9).T, hits.solid, axis=1).reshape(3, 3, -1)  # (axis, xyz, N)
    semi = np.take(solids.semi.T, hits.solid, axis=1)
    local = np.einsum("kin,in->kn", axes, point - np.take(solids.centre.T, hits.solid, axis=1))
    unit = local / semi

    gradient = _gradient(solids, hits.solid, unit, np.einsum("pki,pi->kp", inverse, camera.position - solids.centre))
    # The normal is the gradient, transformed to the world by the inverse scales and the rotation.
    normal = np.einsum("kin,kn->in", axes, gradient / semi)
    normal /= np.sqrt(np.einsum("in,in->n", normal, normal))
    return Surface(point, normal, local, unit)


def _gradient(solids: Solids, solid: np.ndarray, unit: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """Gradients (3, N) of the unit shapes' implicit equations at points `unit` (3, N) of the solids `solid` (N,).

    eye: (3, P), camera position in unit coordinates. Rounding may put a point at a rim on either face; a face that is
    not visible from the eye is never chosen.
    """
    gradient = unit.copy()
    kind = solids.kind[solid]
    flat = np.flatnonzero(kind <= BOX)
    sides = unit[:, flat]
    inside = kind[flat] == WALLS
    size = np.where((np.sign(sides) * np.take(eye, solid[flat], axis=1) > 1) | inside, np.abs(sides), 0)
    outward = np.where(inside, -np.sign(sides), np.sign(sides))
    gradient[:, flat] = np.where(size == size.max(axis=0), outward, 0)

    pipe = np.flatnonzero(kind == CYLINDER)
    px, py, pz = unit[:, pipe]
    eye_x, eye_y, eye_z = np.take(eye, solid[pipe], axis=1)
    hidden_side = px * eye_x + pz * eye_z < px * px + pz * pz
    cap = (np.sign(py) * eye_y > 1) & ((py * py > px * px + pz * pz) | hidden_side)
    gradient[0, pipe], gradient[1, pipe], gradient[2, pipe] = px * ~cap, py * cap, pz * ~cap

    pill = np.flatnonzero(kind == CAPSULE)
    reach = solids.stretch[solid[pill]]
    gradient[1, pill] -= np.clip(unit[1, pill], -reach, reach)
    return gradient


def _room_exit(matrix, origin, x, y) -> tuple[np.ndarray, np.ndarray]:
    """Depth (N,) and face 0..5 (N,) at which rays from inside the unit box leave it."""
    along = [_nonzero(m[0] * x + m[1] * y + m[2]) for m in matrix]
    exits = np.stack([(np.sign(d) - o) / d for d, o in zip(along, origin, strict=True)])
    axis = exits.argmin(axis=0)
    high = np.take_along_axis(np.stack(along), axis[None], axis=0)[0] > 0
    return exits.min(axis=0), (2 * axis + high).astype(np.int32)


def _nonzero(d: np.ndarray) -> np.ndarray:
    """Replaces values near 0 by TINY, for division."""
    return np.where(np.abs(d) < TINY, TINY, d)


def _box_entry(o, d, _) -> np.ndarray:
    inverse = [1 / _nonzero(along) for along in d]
    middle = [-start * per for start, per in zip(o, inverse, strict=True)]
    half = [np.abs(per) for per in inverse]
    enter = np.maximum(np.maximum(middle[0] - half[0], middle[1] - half[1]), middle[2] - half[2])
    leave = np.minimum(np.minimum(middle[0] + half[0], middle[1] + half[1]), middle[2] + half[2])
    return np.where(enter < leave, enter, np.inf)


def _ball_entry(o, d, _) -> np.ndarray:
    a = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    c = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - 1
    return _smaller_root(a, b, c)


def _cylinder_entry(o, d, _) -> np.ndarray:
    a = np.maximum(d[0] * d[0] + d[2] * d[2], TINY)
    b = o[0] * d[0] + o[2] * d[2]
    square = b * b - a * (o[0] * o[0] + o[2] * o[2] - 1)
    root = np.sqrt(np.maximum(square, 0))
    inverse = 1 / _nonzero(d[1])
    middle, half = -o[1] * inverse, np.abs(inverse)
    enter = np.maximum((-b - root) / a, middle - half)
    leave = np.minimum((-b + root) / a, middle + half)
    return np.where((square > 0) & (enter < leave), enter, np.inf)


def _capsule_entry(o, d, stretch) -> np.ndarray:
    a = np.maximum(d[0] * d[0] + d[2] * d[2], TINY)
    b = o[0] * d[0] + o[2] * d[2]
    c = o[0] * o[0] + o[2] * o[2] - 1
    side = _smaller_root(a, b, c)
    met = np.isfinite(side)
    y = np.where(met, o[1] + d[1] * np.where(met, side, 0), 0)
    # Beyond an end of the segment a ray can only hit the ball at that end.
    end = o[1] - np.where(y < 0, -stretch, stretch)
    ball = _smaller_root(a + d[1] * d[1], b + end * d[1], c + end * end)
    return np.where(met & (np.abs(y) <= stretch), side, np.where(met, ball, np.inf))


def _smaller_root(a, b, c) -> np.ndarray:
    """Smaller root t of a t^2 + 2 b t + c, inf if none; it is the entry, because rays start outside of the shape."""
    square = b * b - a * c
    return np.where(square > 0, (-b - np.sqrt(np.maximum(square, 0))) / a, np.inf)


_ENTRY = {BOX: _box_entry, BALL: _ball_entry, CYLINDER: _cylinder_entry, CAPSULE: _capsule_entry}
