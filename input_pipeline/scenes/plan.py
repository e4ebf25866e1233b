"""Floor plan of a built-in scene: placed objects, occupied floor, and tests for free space and occlusion."""

import dataclasses
import math

import numpy as np

from input_pipeline.scenes.conditions import Setting
from input_pipeline.scenes.design import Design
from input_pipeline.scenes.geometry import Camera


@dataclasses.dataclass
class Placed:
    """A design and its position in the world."""

    design: Design
    x: float
    y: float
    z: float
    heading: float  # radians about the vertical; 0 faces along z


@dataclasses.dataclass
class Plan:
    """Floor plan under construction; lengths in metres."""

    rng: np.random.Generator
    setting: Setting
    width: float
    height: float
    length: float
    camera: Camera
    yaw: float
    half_view: float  # half of the horizontal field of view, radians
    whole_person: float  # least distance at which a standing person is fully in view
    placed: list[Placed] = dataclasses.field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = dataclasses.field(default_factory=list)  # x, z, half-extents
    sights: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)  # bearing, half width, distance
    hung: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)  # wall, place along it, half width

    def bearing(self, x: float, z: float) -> float:
        """Horizontal angle of a point from the camera's axis, radians, positive to the right."""
        turn = math.atan2(x - float(self.camera.position[0]), z - float(self.camera.position[2])) - self.yaw
        return (turn + math.pi) % (2 * math.pi) - math.pi

    def distance(self, x: float, z: float) -> float:
        return math.hypot(x - float(self.camera.position[0]), z - float(self.camera.position[2]))

    def polar(self, bearing: float, distance: float) -> tuple[float, float]:
        """Point (x, z) at a bearing and distance from the camera."""
        angle = self.yaw + bearing
        return (
            float(self.camera.position[0]) + distance * math.sin(angle),
            float(self.camera.position[2]) + distance * math.cos(angle),
        )

    def facing_camera(self, x: float, z: float, spread: float) -> float:
        """Random heading within `spread` degrees of the direction towards the camera."""
        towards = math.atan2(float(self.camera.position[0]) - x, float(self.camera.position[2]) - z)
        return towards + math.radians(self.rng.uniform(-spread, spread))

    def free(self, x: float, z: float, half_x: float, half_z: float) -> bool:
        """True if an axis-aligned rectangle lies in the room and overlaps no object on the floor."""
        gap = 0.04
        if not (half_x <= x <= self.width - half_x and half_z <= z <= self.length - half_z):
            return False
        return all(abs(x - a) >= half_x + c + gap or abs(z - b) >= half_z + d + gap for a, b, c, d in self.taken)

    def hides(self, x: float, z: float, radius: float, height: float) -> bool:
        """True if an object here would occlude a person or be too close to the camera."""
        near, bearing = self.distance(x, z), self.bearing(x, z)
        if near - radius < (1.1 if height < 0.8 else 1.5) * self.setting.scale:
            return True
        half = math.asin(min(1.0, radius / near))
        allowed = 0.4 if height < 0.5 else 1.0
        return any(
            near < far + 0.2
            and abs(bearing - other) < half + wide
            and (near > 0.8 * far or self.rng.random() < allowed)
            for other, wide, far in self.sights
        )

    def put(self, design: Design, x: float, z: float, heading: float, y: float = 0.0) -> None:
        """Adds a design; one that stands on the floor, except a rug, occupies its footprint."""
        self.placed.append(Placed(design, x, y, z, heading))
        if y == 0 and design.name != "rug":
            half_x, half_z = turned(design, heading)
            self.taken.append((x, z, half_x, half_z))


def turned(design: Design, heading: float) -> tuple[float, float]:
    """Half-extents along x and z of the axis-aligned bounding rectangle of a rotated footprint."""
    c, s = abs(math.cos(heading)), abs(math.sin(heading))
    return c * design.half_x + s * design.half_z, s * design.half_x + c * design.half_z
