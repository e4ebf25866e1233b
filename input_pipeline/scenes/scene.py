"""Built-in data set: rooms with furniture and people, rendered on the fly, with exact labels for all six tasks.

Nothing is downloaded: a scene is a function of (seed, index). One ray per pixel determines all labels, so they are
consistent with each other; the image is anti-aliased by more rays at edges. Depth is planar, in metres. With
variety "wide", light, view and clutter change from scene to scene, see `conditions`.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from input_pipeline.scenes import conditions, geometry, layout, shading
from input_pipeline.scenes.geometry import Hits, Pairs, Surface
from input_pipeline.scenes.layout import CLASSES, Scene
from taskexpert_jax import command_line, files, paths
from taskexpert_jax.errors import UserError

__all__ = ["CLASSES", "render", "source"]

# By variety; to be raised by every change of its rendered scenes.
VERSIONS = {"usual": "scenes-1", "wide": "scenes-wide-1"}
SPLITS = ("train", "val")
PARTS = {f"val_{name}": name for name in conditions.NAMES}  # of val, for variety "wide": the scenes of a condition
CHANNELS = {"image": 3, "semseg": 1, "depth": 1, "normals": 3, "edge": 1, "human_parts": 1, "sal": 1}
DTYPES = dict.fromkeys(CHANNELS, "uint8") | {"depth": "float32", "normals": "float16"}

# Offsets of the rays of an edge pixel from its centre, in pixels; no two share a row or a column.
SUB_X = np.array([-0.375, -0.125, 0.125, 0.375], np.float32)
SUB_Y = np.array([0.125, -0.375, 0.375, -0.125], np.float32)


def render(index: int, *, seed: int = 0, height: int = 96, width: int = 128, variety: str = "usual") -> dict[str, Any]:
    """Renders scene `index` of the family `seed`; deterministic and independent of earlier calls.

    Returns image (H,W,3) uint8; semseg (H,W,1) uint8, index into CLASSES; depth (H,W,1) float32 metres; normals
    (H,W,3) float16, unit, camera frame x right, y down, z forward, facing the camera; edge (H,W,1) uint8, 1 where class
    or instance differ from the pixel to the right or below; human_parts (H,W,1) uint8, 0 background, 1 head, 2 torso,
    3 upper arm, 4 lower arm, 5 upper leg, 6 lower leg; sal (H,W,1) uint8, 1 on all people, or without people on the
    most prominent object; id str. No pixel is invalid. Height and width set the resolution; the vertical field of view
    does not depend on them. variety: "usual", or "wide" for scenes under the conditions `condition(index, seed)`.
    """
    scene = layout.compose(index, seed, variety)
    pairs = geometry.candidate_pairs(scene.solids, scene.camera, height, width)
    x, y = geometry.pixel_rays(scene.camera, height, width)
    hits = geometry.cast(scene.solids, scene.camera, x, y, pairs)
    seen = geometry.surface(scene.solids, scene.camera, x, y, hits)

    labels = _labels(scene, hits, seen, (height, width))
    uneven = _changes(hits.solid.reshape(height, width)) | _creases(labels["normals"])
    image = _render_image(scene, pairs, (x, y), (hits, seen), uneven)
    name = {"usual": "scene", "wide": "wide"}[variety]
    return {"image": image, **labels, "id": f"{name}_{seed}_{index:06d}"}


def _labels(scene: Scene, hits: Hits, seen: Surface, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """All labels, (H, W, c), from the rays through the pixel centres."""
    normals = np.einsum("ji,in->nj", scene.camera.rotation, seen.normal)
    semseg, instance = (of[hits.solid].reshape(size) for of in (scene.semantic, scene.instance))
    labels = {
        "semseg": semseg,
        "depth": hits.depth,
        "normals": normals,
        "edge": _boundaries(instance),
        "human_parts": scene.body[hits.solid],
        "sal": _subject(semseg, instance),
    }
    return {name: label.reshape(*size, CHANNELS[name]).astype(DTYPES[name]) for name, label in labels.items()}


def _boundaries(instance: np.ndarray) -> np.ndarray:
    """Boundaries (H, W) bool, one pixel wide: the instance differs from the pixel to the right or below.

    All pixels of an instance have the same class, so these include the changes of class.
    """
    edge = np.zeros(instance.shape, bool)
    edge[:, :-1] |= instance[:, 1:] != instance[:, :-1]
    edge[:-1] |= instance[1:] != instance[:-1]
    return edge


def _subject(semseg: np.ndarray, instance: np.ndarray) -> np.ndarray:
    """Salient pixels (H, W) bool: all people; without people, the largest object, by centre-weighted area."""
    people = semseg == layout.PERSON
    if people.any():
        return people
    height, width = semseg.shape
    row = (np.arange(height) + 0.5) / height - 0.5
    column = (np.arange(width) + 0.5) / width - 0.5
    weight = np.exp(-6 * (row[:, None] ** 2 + column**2))
    score = np.bincount(instance.ravel(), (weight * (semseg >= layout.FOREGROUND)).ravel())
    return (instance == score.argmax()) & (score.max() > 0)


def _changes(label: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool on both sides of every change of a label."""
    change = np.zeros(label.shape, bool)
    for here, there in (np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1]):
        differs = label[here] != label[there]
        change[here] |= differs
        change[there] |= differs
    return change


def _creases(normals: np.ndarray) -> np.ndarray:
    """Pixels (H, W) bool on both sides of a crease, detected by a change of which normal components exceed 0.3."""
    return _changes((normals > 0.3).astype(np.int8) @ np.array([1, 2, 4], np.int8))


def _render_image(
    scene: Scene,
    pairs: Pairs,
    rays: tuple[np.ndarray, np.ndarray],
    central: tuple[Hits, Surface],
    uneven: np.ndarray,
) -> np.ndarray:
    """Image (H, W, 3) uint8, with SUB_X.size rays per pixel where `uneven` (H, W) is True and one ray elsewhere.

    rays: x and y of the directions through the pixel centres. central: their hits.
    """
    solids, camera, look = scene.solids, scene.camera, scene.look
    height, width = uneven.shape
    shadows = shading.shadow_map(solids, look.light)
    color = shading.radiance(look, shadows, camera, height, *central)

    chosen = np.flatnonzero(uneven)
    pitch = np.float32(1 / (camera.focal * height))
    x, y = ((ray[chosen, None] + pitch * sub).ravel() for ray, sub in zip(rays, (SUB_X, SUB_Y), strict=True))
    finer = geometry.cast(solids, camera, x, y, geometry.keep_rays(pairs, chosen, uneven.size, SUB_X.size))
    finer_seen = geometry.surface(solids, camera, x, y, finer)
    finer_color = shading.radiance(look, shadows, camera, height, finer, finer_seen)
    color[:, chosen] = finer_color.reshape(3, -1, SUB_X.size).mean(axis=2)

    noise = np.float32(look.noise) * scene.rng.standard_normal((height, width, 3), dtype=np.float32)
    return shading.display(color.T.reshape(height, width, 3), look.brightness, noise)


class _Scenes:
    """One split: the scenes with the given numbers."""

    labels = tuple(name for name in CHANNELS if name != "image")

    def __init__(self, numbers: Sequence[int], config: ConfigDict):
        self.numbers = numbers
        height, width = config.image_size
        self._options = {"seed": config.seed, "height": height, "width": width, "variety": config.variety}

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int) -> dict[str, Any]:
        """See `records.Source.load`."""
        return render(self.numbers[index], **self._options)


def source(config: ConfigDict, split: str) -> _Scenes:
    """A split of the built-in scenes.

    "train" has the scenes with even numbers, "val" those with odd ones, so they are disjoint. A wide family also has
    the parts of val in PARTS.

    config: image_size (H, W); seed and variety of the family of scenes; train_scenes and val_scenes, the numbers of
    scenes.

    Raises:
      UserError: an unknown split, or a part of val without any scene.
    """
    wide = config.variety == "wide"
    if split not in (*SPLITS, *PARTS):
        more = f"; or a part of val: {', '.join(PARTS)}" if wide else ""
        raise UserError(f"the scenes have no split {split!r}; choose train or val{more}")
    if split == "train":
        return _Scenes(range(0, 2 * config.train_scenes, 2), config)
    val = range(1, 2 * config.val_scenes, 2)
    if split == "val":
        return _Scenes(val, config)
    if not wide:
        raise UserError(
            f"the split {split!r} is of wide scenes alone; set --config.dataset.variety=wide, or choose val"
        )
    part = [number for number in val if PARTS[split] in conditions.condition(number, config.seed)]
    if not part:
        raise UserError(f"no scene of {split!r} among {len(val)} of val; raise --config.dataset.val_scenes")
    return _Scenes(part, config)


def fingerprint(config: ConfigDict) -> str:
    """Version of the scenes; together with seed, counts and size in the config it determines the data."""
    return VERSIONS[config.variety]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes images of scenes, for `taskexpert predict`: taskexpert scenes --output=DIR."""
    parser = command_line.Parser("input_pipeline.scenes", main.__doc__)
    parser.add_argument("--output", type=paths.argument, required=True, help="folder to write SCENE.png to")
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument(
        "--first", type=int, default=1_000_000, help="number of the first scene; the default is far beyond training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--variety", choices=tuple(VERSIONS), default="usual", help="wide: light, view and clutter change by scene"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    options = parser.parse_args(arguments)

    def program() -> None:
        files.folder_for_results(options.output)
        for index in range(options.first, options.first + options.count):
            size = {"height": options.size[0], "width": options.size[1]}
            scene = render(index, seed=options.seed, variety=options.variety, **size)
            with files.replacing(options.output / f"{scene['id']}.png") as file:
                Image.fromarray(scene["image"]).save(file, "PNG")
        print(f"written: {options.count} pictures of unseen scenes in {options.output}")

    return command_line.ended(program)
