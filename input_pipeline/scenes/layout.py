"""Random layout of the built-in scenes: room, camera, people, furniture and light.

`compose(index, seed)` draws everything from one generator seeded by the pair, so a scene is a function of the pair.
With `variety="wide"` the ranges of these draws follow the conditions of the scene, see `conditions`.
"""

import dataclasses
import math

import numpy as np

from input_pipeline.scenes import conditions, furniture, geometry, people, shading
from input_pipeline.scenes.conditions import Setting
from input_pipeline.scenes.design import Design, Part, pick, tint
from input_pipeline.scenes.geometry import Camera, Solids
from input_pipeline.scenes.plan import Placed, Plan, turned
from input_pipeline.scenes.shading import Look, Material

CLASSES = (
    "floor",
    "wall",
    "ceiling",
    "window",
    "picture",
    "rug",
    "bed",
    "sofa",
    "chair",
    "table",
    "cabinet",
    "lamp",
    "plant",
    "person",
)
PERSON = CLASSES.index("person")
FOREGROUND = CLASSES.index("bed")  # classes from here on can be the salient object

THEMES = {
    "living": ("sofa", "coffee", "cabinet", "floor lamp", "plant", "sofa", "chair", "cabinet"),
    "bedroom": ("bed", "drawers", "wardrobe", "chair", "plant", "cabinet", "floor lamp"),
    "dining": ("dining", "cabinet", "plant", "chair", "sofa", "floor lamp", "cabinet"),
    "study": ("shelves", "desk", "chair", "plant", "floor lamp", "shelves", "sofa", "drawers"),
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """Input of the renderer; arrays over the P solids."""

    camera: Camera
    solids: Solids
    semantic: np.ndarray  # (P,) uint8, index into CLASSES
    instance: np.ndarray  # (P,) int32, one number per object; floor, walls and ceiling are one each
    body: np.ndarray  # (P,) uint8, human part
    look: Look
    rng: np.random.Generator  # for random values per pixel


def compose(index: int, seed: int, variety: str = "usual") -> Scene:
    """Draws scene number `index` of the family `seed`; variety: "usual" or "wide"."""
    wide = variety == "wide"
    setting = conditions.setting(conditions.condition(index, seed)) if wide else conditions.USUAL
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    plan = _empty_room(rng, setting)
    count = pick(rng, (0, 1, 2), (12, 50, 38))
    for number in range(count):
        _add_person(plan, number, count)
    _add_furniture(plan)
    _add_decoration(plan)
    return _assemble(plan)


def _empty_room(rng: np.random.Generator, setting: Setting) -> Plan:
    width, height, length = rng.uniform(*setting.width), rng.uniform(2.4, 2.9), rng.uniform(*setting.length)
    position = (rng.uniform(0.3, 0.7) * width, rng.uniform(1.15, 1.6), rng.uniform(0.15, 0.4))
    aim = rng.uniform(0.25, 0.75) * width
    yaw = math.atan2(aim - position[0], length) + math.radians(rng.uniform(-10, 10))
    pitch = math.radians(rng.uniform(3, 11))
    half_view = math.radians(rng.uniform(*setting.field)) / 2
    ahead = (math.sin(yaw) * math.cos(pitch), -math.sin(pitch), math.cos(yaw) * math.cos(pitch))
    # The horizontal field of view is that of a 4:3 image; other aspect ratios keep the vertical one.
    focal = 4 / 3 / 2 / math.tan(half_view)
    camera = geometry.make_camera(position, ahead, focal, math.radians(rng.normal(0, 1.2)))
    # From this distance on, a person is in view from feet to head.
    lower, upper = math.atan(0.5 / focal) + pitch, math.atan(0.5 / focal) - pitch
    whole_person = max(2.1, 0.97 * position[1] / math.tan(lower), (1.76 - position[1]) / math.tan(upper))
    return Plan(rng, setting, width, height, length, camera, yaw, half_view, whole_person)


def _add_person(plan: Plan, number: int, count: int) -> None:
    """Adds a person, with a seat if sitting; in full view except from a near camera."""
    rng = plan.rng
    pose = pick(rng, ("stand", "walk", "sit"), (4, 3, 3))
    seat = None
    if pose == "sit":
        seat = pick(rng, (furniture.chair, furniture.sofa, furniture.bed), (5, 4, 1))(rng)
    for _ in range(12):
        reach = 0.55 * plan.half_view
        bearing = rng.uniform(-reach, reach) if count == 1 else (2 * number - 1) * rng.uniform(0.25, 1.15) * reach
        x, z = plan.polar(
            bearing, plan.setting.scale * plan.whole_person + rng.uniform(0.0, 0.5 if number == 0 else 1.2)
        )
        heading = plan.facing_camera(x, z, 45) if seat or rng.random() < 0.75 else plan.facing_camera(x, z, 180)
        body = seat or Design("person", 0.3, 0.3, 1.7)
        half_x, half_z = turned(body, heading)
        if not plan.free(x, z, half_x, half_z) or plan.hides(x, z, math.hypot(half_x, half_z), 2.0):
            continue
        if seat is None:
            plan.put(people.person(rng, pose), x, z, heading)
        else:
            place = pick(rng, seat.seats)
            plan.put(seat, x, z, heading)
            c, s = math.cos(heading), math.sin(heading)
            x, z = x + c * place.x + s * place.z, z - s * place.x + c * place.z
            sitter = people.person(rng, "sit", place.height)
            plan.placed.append(Placed(sitter, x, 0.0, z, heading + math.radians(rng.uniform(-6, 6))))
        far = plan.distance(x, z)
        plan.sights.append((plan.bearing(x, z), math.asin(min(1.0, 0.45 / far)), far))
        return


def _add_furniture(plan: Plan) -> None:
    """Adds the furniture of one theme or more, as far as there is room."""
    rng, (least, most) = plan.rng, plan.setting.furniture
    for _ in range(plan.setting.themes):
        theme = THEMES[pick(rng, tuple(THEMES))]
        count = int(rng.integers(least, (len(theme) if most is None else most) + 1))
        for name in theme[:count]:
            _add_piece(plan, name)
    for _ in range(_whole(rng, plan.setting.trinkets) if plan.setting.trinkets else 0):
        _stand(plan, _trinket(rng), near_wall=False)


def _add_piece(plan: Plan, name: str) -> None:
    """Adds a piece of furniture by its name in a theme."""
    rng = plan.rng
    if name in ("coffee", "dining", "desk"):
        _add_table(plan, name)
    elif name == "floor lamp":
        _stand(plan, furniture.lamp(rng, "floor"), near_wall=True)
    elif name == "plant":
        _stand(plan, furniture.plant(rng), near_wall=True)
    elif name == "chair":
        _stand(plan, furniture.chair(rng), near_wall=False)
    elif name in ("bed", "sofa"):
        _lean(plan, getattr(furniture, name)(rng))
    else:
        _add_cabinet(plan, None if name == "cabinet" else name)


def _add_cabinet(plan: Plan, kind: str | None) -> None:
    """Adds a cabinet at a wall, and on a low one at random a lamp or a small plant."""
    design = furniture.cabinet(plan.rng, kind)
    where = _lean(plan, design)
    if where is None or design.height > 1.2:
        return
    top = plan.rng.random()
    if top < 0.5:
        ornament = furniture.lamp(plan.rng, "table")
    elif top < 0.7:
        ornament = _small_plant(plan.rng)
    else:
        return
    along = plan.rng.uniform(-0.6, 0.6) * max(0.0, design.half_x - 0.15)
    c, s = math.cos(where.heading), math.sin(where.heading)
    plan.put(ornament, where.x + c * along, where.z - s * along, where.heading, design.height)


def _small_plant(rng: np.random.Generator) -> Design:
    """A plant for the top of a cabinet."""
    plant = furniture.plant(rng)
    plant.parts = [_shrink(part, 0.45) for part in plant.parts]
    return plant


def _trinket(rng: np.random.Generator) -> Design:
    """A small object for a cluttered floor."""
    kind = pick(rng, ("plant", "lamp", "drawers", "chair"), (4, 3, 2, 2))
    if kind == "plant":
        plant = _small_plant(rng)
        return dataclasses.replace(plant, half_x=0.45 * plant.half_x, half_z=0.45 * plant.half_z, height=0.45)
    if kind == "lamp":
        return furniture.lamp(rng, "table")
    return furniture.chair(rng) if kind == "chair" else furniture.cabinet(rng, "drawers")


def _whole(rng: np.random.Generator, of: tuple[int, int]) -> int:
    """Random whole number; both ends are included."""
    return int(rng.integers(of[0], of[1] + 1))


def _shrink(part: Part, by: float) -> Part:
    """Scales a part by the factor `by` about the origin of its design."""
    (a, b, c), (d, e, f) = part.bottom, part.top
    radii = (part.radii[0] * by, part.radii[1] * by)
    return part._replace(bottom=(a * by, b * by, c * by), top=(d * by, e * by, f * by), radii=radii)


def _add_table(plan: Plan, kind: str) -> None:
    """Adds a coffee table, a dining table with chairs and a hanging lamp, or a desk with a lamp."""
    rng = plan.rng
    design = furniture.table(rng, low=kind == "coffee")
    where = _lean(plan, design) if kind == "desk" else _stand(plan, design, near_wall=False, square=True)
    if where is None:
        return
    if kind == "dining":
        if rng.random() < 0.6:
            plan.put(furniture.lamp(rng, "hanging"), where.x, where.z, 0.0, plan.height)
        chair = furniture.chair(rng)
        for side in range(4):
            if rng.random() < 0.7:
                angle = where.heading + side * math.pi / 2
                gap = (design.half_z if side % 2 == 0 else design.half_x) + rng.uniform(0.24, 0.34)
                x, z = where.x + gap * math.sin(angle), where.z + gap * math.cos(angle)
                half_x, half_z = turned(chair, angle)
                if plan.free(x, z, half_x, half_z) and not plan.hides(x, z, 0.3, 0.9):
                    plan.put(chair, x, z, angle + math.pi)
    elif kind == "desk" and rng.random() < 0.6:
        plan.put(furniture.lamp(rng, "table"), where.x + rng.uniform(-0.2, 0.2), where.z, where.heading, design.height)


def _stand(plan: Plan, design: Design, near_wall: bool, square: bool = False) -> Placed | None:
    """Puts a design at a free place on the floor in view; returns None if none was found."""
    rng, scale = plan.rng, plan.setting.scale
    radius = math.hypot(design.half_x, design.half_z)
    for _ in range(10):
        if near_wall:
            gap = radius + 0.05
            x, z = rng.uniform(gap, plan.width - gap), rng.uniform(2.0 * scale, plan.length - gap)
            if rng.random() < 0.6:
                x = pick(rng, (gap, plan.width - gap))
            if rng.random() < 0.6:
                z = plan.length - gap
        else:
            distance = (2.0 * scale, min(4.5 * scale, plan.length - 0.8))
            x, z = plan.polar(rng.uniform(-0.9, 0.9) * plan.half_view, rng.uniform(*distance))
        heading = pick(rng, (0.0, math.pi / 2)) if square else rng.uniform(0, 2 * math.pi)
        half_x, half_z = turned(design, heading)
        if abs(plan.bearing(x, z)) > 0.95 * plan.half_view or not plan.free(x, z, half_x, half_z):
            continue
        if not plan.hides(x, z, radius, design.height):
            plan.put(design, x, z, heading)
            return plan.placed[-1]
    return None


def _lean(plan: Plan, design: Design) -> Placed | None:
    """Puts a design with its back to a wall in view; returns None if no free place was found."""
    rng = plan.rng
    for _ in range(10):
        wall = pick(rng, ("left", "right", "back"), (1, 1, 2))
        depth = design.half_z + 0.06
        if wall == "back":
            x, z, heading = rng.uniform(0, plan.width), plan.length - depth, math.pi
        else:
            x, z = (depth if wall == "left" else plan.width - depth), rng.uniform(1.5 * plan.setting.scale, plan.length)
            heading = math.pi / 2 if wall == "left" else -math.pi / 2
        half_x, half_z = turned(design, heading)
        if abs(plan.bearing(x, z)) > 0.95 * plan.half_view or not plan.free(x, z, half_x, half_z):
            continue
        if not plan.hides(x, z, max(half_x, half_z), design.height):
            plan.put(design, x, z, heading)
            return plan.placed[-1]
    return None


def _add_decoration(plan: Plan) -> None:
    """Adds a rug, windows and pictures."""
    rng, setting = plan.rng, plan.setting
    if rng.random() < setting.rug:
        design = furniture.rug(rng)
        x, z = plan.polar(rng.uniform(-0.4, 0.4) * plan.half_view, setting.scale * rng.uniform(2.0, 3.5))
        x = min(max(x, design.half_x), plan.width - design.half_x)
        z = min(z, plan.length - design.half_z)
        plan.put(design, x, z, 0.0)
    for _ in range(_whole(rng, setting.windows)):
        _hang(plan, furniture.window(rng), rng.uniform(1.45, 1.6))
    for _ in range(_whole(rng, setting.pictures)):
        _hang(plan, furniture.picture(rng), rng.uniform(1.5, 1.75))
    if setting.hanging_lamp:
        x, z = plan.polar(rng.uniform(-0.6, 0.6) * plan.half_view, rng.uniform(0.55, 0.85) * plan.length)
        x = min(max(x, 0.4), plan.width - 0.4)
        plan.put(furniture.lamp(rng, "hanging"), x, z, 0.0, plan.height)


def _hang(plan: Plan, design: Design, height: float) -> None:
    """Puts a design at a free place on a wall."""
    rng = plan.rng
    for _ in range(6):
        wall = pick(rng, (0, 1, 2), (1, 1, 2))  # left, right, back
        side = plan.width if wall == 2 else plan.length
        along = rng.uniform(design.half_x + 0.1, side - design.half_x - 0.1)
        if any(other == wall and abs(along - place) < design.half_x + half + 0.1 for other, place, half in plan.hung):
            continue
        x, z, heading = ((0.0, along, math.pi / 2), (plan.width, along, -math.pi / 2), (along, plan.length, math.pi))[
            wall
        ]
        if abs(plan.bearing(x, z)) < plan.half_view:
            plan.hung.append((wall, along, design.half_x))
            plan.put(design, x, z, heading, height)
            return


def _room_materials(plan: Plan) -> list[Material]:
    """Materials of the six faces of the room, in the order of solids 0..5 in `geometry`."""
    rng = plan.rng
    paper = tint(rng, pick(rng, ((30, 60), (180, 230), (90, 140), (340, 380))), (0.03, 0.28), (0.7, 0.92))
    fade = rng.uniform(0.9, 1.0) if rng.random() < 0.5 else 1.0
    second = (paper[0] * fade, paper[1] * fade, paper[2])
    wall = Material(paper, second, shading.WALLPAPER, rng.uniform(0.15, 0.4), plan.height / 2, 0.04, (6.0, 6.0))
    white = tint(rng, (40, 60), (0.0, 0.05), (0.88, 0.97))
    kind = pick(rng, ("planks", "tiles", "carpet"), (6, 2, 2))
    if kind == "planks":
        board = tint(rng, (22, 36), (0.4, 0.7), (0.4, 0.75))
        other = (board[0] * 0.82, board[1] * 0.78, board[2] * 0.75)
        floor = Material(board, other, shading.PLANKS, rng.uniform(0.12, 0.2), rng.uniform(1.0, 1.6), 0.16, (45.0, 5.0))
    elif kind == "tiles":
        tile = tint(rng, (20, 60), (0.02, 0.15), (0.6, 0.85))
        other = (tile[0] * 0.8, tile[1] * 0.8, tile[2] * 0.8)
        floor = Material(tile, other, shading.CHECKER, rng.uniform(0.5, 0.9), grain=0.05)
    else:
        floor = Material(tint(rng, (15, 50), (0.1, 0.35), (0.45, 0.7)), grain=0.2, fine=(70.0, 70.0))
    return [wall, wall, floor, Material(white, grain=0.02), wall, wall]


def _light(plan: Plan) -> dict:
    """Random values for the fields of `Look` that describe the light."""
    rng, setting = plan.rng, plan.setting
    target = np.array([*plan.polar(0.0, min(3.2 * setting.scale, plan.length / 2)), 0.9])[[0, 2, 1]]
    aside, up = math.radians(pick(rng, (-1, 1)) * rng.uniform(20, 100)), math.radians(rng.uniform(35, 60))
    towards = (math.sin(aside) * math.cos(up), math.sin(up), -math.cos(aside) * math.cos(up))
    warm = rng.uniform(0.0, 1.0)
    strength = rng.uniform(*setting.strength)
    away = 6.0 * max(setting.scale, 1.0)
    return {
        "light": geometry.make_camera(target + away * np.array(towards), -np.array(towards), shading.SHADOW_FOCAL),
        "light_color": np.array([1.0, 0.97 - 0.1 * warm, 0.93 - 0.25 * warm], np.float32) * np.float32(strength),
        "ambient": np.array(setting.ambient, np.float32),
        "room": np.array([plan.width, plan.height, plan.length], np.float32),
        "brightness": rng.uniform(*setting.brightness),
        "lamp_color": np.array(setting.lamp_color, np.float32),
        "noise": setting.noise,
    }


def _assemble(plan: Plan) -> Scene:
    """Stacks the room and all objects in it into arrays."""
    half = (plan.width / 2, plan.height / 2, plan.length / 2)
    wall_part = (geometry.WALLS, (0.0, -half[1], 0.0), (0.0, half[1], 0.0), (half[0], half[2]))
    kind, bottom, top, radii = (list(values) for values in zip(*[wall_part] * geometry.ROOM_FACES, strict=True))
    origin, heading = [half] * geometry.ROOM_FACES, [0.0] * geometry.ROOM_FACES
    semantic = [1, 1, 0, 2, 1, 1]
    instance, body, materials = list(semantic), [0] * geometry.ROOM_FACES, _room_materials(plan)
    feet, lamps = [], []
    for number, item in enumerate(plan.placed):
        design = item.design
        for part in design.parts:
            kind.append(part.kind)
            bottom.append(part.bottom)
            top.append(part.top)
            radii.append(part.radii)
            body.append(part.body)
            materials.append(part.material)
        size = len(design.parts)
        origin += [(item.x, item.y, item.z)] * size
        heading += [item.heading] * size
        semantic += [CLASSES.index(design.name)] * size
        instance += [3 + number] * size
        if item.y == 0 and design.name != "rug":
            feet.append((item.x, item.z, design.half_x, design.half_z, item.heading))
        if design.glow:
            lamps.append((item.x, item.y + design.glow[1], item.z))
    solids, order = geometry.make_solids(*(np.array(field) for field in (kind, bottom, top, radii, origin, heading)))
    look = shading.make_look(
        [materials[i] for i in order],
        feet=np.array(feet, np.float32).reshape(-1, 5),
        lamps=np.array(lamps, np.float32).reshape(-1, 3),
        **_light(plan),
    )
    labels = (np.array(semantic, np.uint8), np.array(instance, np.int32), np.array(body, np.uint8))
    return Scene(plan.camera, solids, *(label[order] for label in labels), look=look, rng=plan.rng)
