"""People of the built-in scenes: clothed articulated figures of capsules, each with a human_parts label."""

import math

import numpy as np

from input_pipeline.scenes.design import Design, Point, fabric, pick, tint
from input_pipeline.scenes.shading import BANDS, HAIR, PLAIN, STRIPES, Material

# Labels of human_parts; 0 is background.
HEAD, TORSO, UPPER_ARM, LOWER_ARM, UPPER_LEG, LOWER_LEG = range(1, 7)


def person(rng: np.random.Generator, pose: str, seat: float = 0.0) -> Design:
    """A person facing the front, with feet on the floor and hips above the origin.

    pose: "stand", "walk" or "sit". seat: height of the seat in metres, for "sit" only.
    """
    size = rng.uniform(0.88, 1.08) if pose != "sit" else rng.uniform(0.94, 1.04)
    wear = _clothes(rng)
    thick = rng.uniform(0.95, 1.12)
    design = Design("person", 0.28, 0.28 if pose != "sit" else 0.5, 1.75 * size)
    swings, knees = _leg_angles(rng, pose)
    thigh, shin, ankle = 0.43 * size, 0.41 * size, 0.075 * size
    drops = [
        thigh * math.cos(math.radians(s)) + shin * math.cos(math.radians(s - k))
        for s, k in zip(swings, knees, strict=True)
    ]
    hip = max(drops) + ankle if pose != "sit" else seat + 0.075 * thick * size
    spread = rng.uniform(3, 8) if pose != "sit" else rng.uniform(4, 14)
    for side, swing, knee in zip((-1, 1), swings, knees, strict=True):
        start = (side * 0.095 * size, hip, 0.0)
        if pose == "sit":
            # The thigh is lowered until the shin reaches the floor; a shin that is too long points forward.
            swing = min(swing, math.degrees(math.acos(max(0.0, (hip - ankle - shin) / thigh))))
            fall = hip - thigh * math.cos(math.radians(swing)) - ankle
            knee = swing - math.degrees(math.acos(min(1.0, fall / shin)))
        joint = _reach(start, thigh, swing, side * spread)
        foot = _reach(joint, shin, swing - knee, side * spread * 0.3)
        design.limb(start, joint, 0.083 * thick * size, wear["trousers"], UPPER_LEG)
        design.limb(joint, foot, 0.062 * thick * size, wear["shin"], LOWER_LEG)
        toe_drop = min(0.06, max(0.0, foot[1] - ankle))  # a lifted foot points down
        heel = (foot[0], foot[1] - 0.025 * size, foot[2] - 0.03)
        toe = (foot[0] + side * 0.03, foot[1] - 0.025 * size - toe_drop, foot[2] + 0.14 * size)
        design.limb(heel, toe, 0.05 * size, wear["shoes"], LOWER_LEG)
    _upper_body(design, rng, hip, size, thick, wear, pose)
    return design


def _clothes(rng: np.random.Generator) -> dict[str, Material]:
    skin_color = tint(rng, (16, 28), (0.3, 0.55), (0.45, 0.95))
    skin = Material(skin_color, grain=0.03)
    hair = pick(
        rng, (tint(rng, (15, 35), (0.4, 0.7), (0.08, 0.3)), tint(rng, (35, 48), (0.4, 0.6), (0.55, 0.8))), (4, 1)
    )
    shirt_color = tint(rng, (0, 360), (0.3, 0.85), (0.45, 0.95))
    pattern = pick(rng, (PLAIN, BANDS, STRIPES), (6, 2, 1))
    shirt = Material(shirt_color, tint(rng, (0, 360), (0.0, 0.2), (0.8, 0.97)), pattern, 0.12, 0.13, 0.1, (40.0, 40.0))
    plain = shirt._replace(texture=PLAIN)
    trousers = fabric(
        pick(rng, (tint(rng, (205, 235), (0.3, 0.7), (0.2, 0.5)), tint(rng, (20, 45), (0.1, 0.4), (0.2, 0.65))))
    )
    return {
        "skin": skin,
        "head": Material(skin_color, hair, HAIR, grain=0.03),
        "hair": Material(hair),
        "shirt": shirt,
        "sleeve": plain,
        "forearm": pick(rng, (skin, plain)),
        "trousers": trousers,
        "shin": pick(rng, (trousers, skin), (4, 1)),
        "shoes": Material(
            pick(rng, (tint(rng, (0, 360), (0, 0.3), (0.08, 0.25)), tint(rng, (0, 360), (0, 0.5), (0.7, 0.95))))
        ),
    }


def _leg_angles(rng: np.random.Generator, pose: str) -> tuple[list[float], list[float]]:
    """Swing of the two thighs (forward positive) and bend of the two knees, degrees."""
    if pose == "sit":
        return list(rng.uniform(80, 92, 2)), [0.0, 0.0]
    if pose == "stand":
        return list(rng.uniform(-5, 6, 2)), list(rng.uniform(0, 8, 2))
    stride = rng.uniform(18, 30)
    swings, knees = [stride, -0.7 * stride], [rng.uniform(0, 12), rng.uniform(18, 40)]
    return (swings, knees) if rng.random() < 0.5 else (swings[::-1], knees[::-1])


def _reach(start: Point, length: float, swing: float, spread: float) -> Point:
    """Far end of a limb that hangs from `start`, swung forward and spread towards +x, both in degrees."""
    forward, aside = math.radians(swing), math.radians(spread)
    down = length * math.cos(aside)
    return (
        start[0] + length * math.sin(aside),
        start[1] - down * math.cos(forward),
        start[2] + down * math.sin(forward),
    )


def _upper_body(
    design: Design, rng: np.random.Generator, hip: float, size: float, thick: float, wear, pose: str
) -> None:
    lean = math.radians(rng.uniform(-8, 6) if pose == "sit" else rng.uniform(-2, 6))

    def above(x: float, up: float, ahead: float = 0.0) -> Point:
        """Point of the upper body, which is rotated about the hips by `lean`."""
        up, ahead, x = up * size, ahead * size, x * size
        return (x, hip + up * math.cos(lean) - ahead * math.sin(lean), up * math.sin(lean) + ahead * math.cos(lean))

    design.limb(above(-0.075, 0.03), above(0.075, 0.03), 0.1 * thick * size, wear["trousers"], TORSO)
    design.limb(above(0, 0.16), above(0, 0.4), (0.165 * thick * size, 0.105 * thick * size), wear["shirt"], TORSO)
    design.limb(above(-0.13, 0.47), above(0.13, 0.47), 0.07 * thick * size, wear["sleeve"], TORSO)
    design.limb(above(0, 0.5), above(0, 0.6), 0.052 * size, wear["skin"], TORSO)
    head = above(0, 0.7, 0.015)
    design.ball(head, (0.09 * size, 0.128 * size, 0.105 * size), wear["head"], HEAD)
    if rng.random() < 0.4:
        length = rng.uniform(0.1, 0.18)
        design.ball(above(0, 0.77 - length, -0.055), (0.095 * size, length * size, 0.06 * size), wear["hair"], HEAD)
    stride = rng.uniform(-30, 30) if pose == "walk" else 0.0
    for side in (-1, 1):
        swing, spread, elbow, inward = _arm_angles(rng, pose)
        shoulder = above(side * 0.185, 0.475)
        joint = _reach(shoulder, 0.28 * size, swing + side * stride, side * spread)
        wrist = _reach(joint, 0.24 * size, swing + side * stride + elbow, -side * inward)
        hand = _reach(wrist, 0.06 * size, swing + side * stride + elbow, -side * inward)
        design.limb(shoulder, joint, 0.06 * thick * size, wear["sleeve"], UPPER_ARM)
        design.limb(joint, wrist, 0.05 * thick * size, wear["forearm"], LOWER_ARM)
        design.limb(wrist, hand, 0.05 * size, wear["skin"], LOWER_ARM)


def _arm_angles(rng: np.random.Generator, pose: str) -> tuple[float, float, float, float]:
    """Swing and spread of the upper arm, bend of the elbow, and inward angle of the forearm, degrees."""
    gesture = pick(rng, ("down", "bent", "raised", "hip"), (5, 2, 1, 1) if pose != "sit" else (0, 5, 1, 0))
    if gesture == "down":
        return rng.uniform(-12, 12), rng.uniform(10, 20), rng.uniform(5, 30), rng.uniform(-8, 2)
    if gesture == "bent":
        return rng.uniform(5, 30), rng.uniform(8, 18), rng.uniform(45, 95), rng.uniform(0, 25)
    if gesture == "raised":
        return rng.uniform(60, 100), rng.uniform(40, 75), rng.uniform(40, 80), rng.uniform(-30, 0)
    return rng.uniform(-25, -10), rng.uniform(38, 50), rng.uniform(20, 35), rng.uniform(40, 55)
