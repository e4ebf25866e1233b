"""From a batch's images to predictions: by one forward pass, or averaged over mirrored and resized images and windows.

`config.eval` says which:

  flip         the image and its mirror image
  scales       the image resized bilinearly, to multiples of the patch size; what depends on the size (depth: an image
               enlarged by s looks s times closer) is scaled back
  image_size   frames larger than the model's own size, `dataset.image_size`, are seen in windows of that size, which
               cover the picture evenly and overlap by `overlap` or more; a smaller picture gets one window around it

Averaged are probabilities, metres and unit vectors (`Task.to_mean`), each pixel over the views that it lies in, all of
one weight. Padding is 0 in every view, whatever its size, and has no part in the picture's resized predictions.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import frame_size, normalisation
from taskexpert_jax.evaluation.gate_statistics import GateStatistics
from taskexpert_jax.models import inputs
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.models.upsampling import resize_bilinear
from taskexpert_jax.tasks import Task

Size = tuple[int, int]  # height, width


@runtime_checkable
class Model(Protocol):
    """What inference needs of a model: its tasks and its forward pass."""

    tasks: tuple[Task, ...]

    def apply(self, variables: Any, image: jax.Array, *, train: bool) -> Any:
        """Predictions by task."""
        ...


Maps = dict[str, jax.Array]  # by task, (B, H, W, channels) float32
Inference = Callable[[Any, jax.Array, jax.Array], Maps]


class Views(NamedTuple):
    """What `config.eval` asks for.

    flip: with the mirror image too.
    scales: factors on the frame's sides; 1 leaves the frame as it is.
    window: the largest part of an image that the model sees at once; None: all of it.
    overlap: of neighbouring windows, as a share of their sides.
    patch: the resized sides are multiples of it.
    """

    flip: bool
    scales: tuple[float, ...]
    window: Size | None
    overlap: float
    patch: int


def views(config: ConfigDict) -> Views:
    """The views of a config."""
    model_size = tuple(config.dataset.image_size)
    window = None if frame_size(config) == model_size else model_size
    return Views(config.eval.flip, tuple(config.eval.scales), window, config.eval.overlap, config.model.patch_size)


def make_inference(model: Model, config: ConfigDict) -> Inference:
    """(variables, image, window) -> {task: (B, H, W, channels) float32}, to be called inside of a jitted step.

    image is (B, H, W, 3) uint8, in frames of any size that are multiples of the patch size or larger than
    `dataset.image_size`; window (B, 4) int32: top, left, height and width of the picture in it. Predictions in the
    padding have no meaning.
    """
    asked = views(config)
    by = normalisation(config)

    def infer(variables: Any, image: jax.Array, window: jax.Array) -> Maps:
        picture = inputs.normalise(image, window, by)
        if is_single(asked, _size(picture)):
            predictions: Any = model.apply(variables, picture, train=False)
            return predictions
        means = [_mean_at_scale(model, variables, asked, scale, picture, window) for scale in asked.scales]
        total = jax.tree.map(lambda *of: functools.reduce(jnp.add, of), *means)
        return {task.name: task.from_mean(total[task.name] / len(means)) for task in model.tasks}

    return infer


def with_gates(
    model: TaskExpert, variables: Any, image: jax.Array, window: jax.Array, mask: jax.Array
) -> tuple[Maps, jax.Array, GateStatistics]:
    """Predictions of one forward pass, its gates (S, T, B, N, choices) float32, and their sums over real pixels.

    image, window: see `make_inference`. mask: (B,), 0 for padding examples.
    """
    answer: Any = model.apply(
        variables, inputs.normalise(image, window, model.normalisation), return_gates=True, train=False
    )
    predictions, gates = answer
    statistics = GateStatistics.from_gates(gates, window, mask, _size(image), model.backbone.patch_size)
    return predictions, gates, statistics


def is_single(asked: Views, frame: Size) -> bool:
    """Whether one forward pass over the whole frame is all that is asked for."""
    one_window = asked.window is None or (frame[0] <= asked.window[0] and frame[1] <= asked.window[1])
    return one_window and not asked.flip and asked.scales == (1.0,)


def _mean_at_scale(
    model: Model, variables: Any, asked: Views, scale: float, picture: jax.Array, window: jax.Array
) -> Maps:
    """The mean over the views of the frame resized by `scale`, at the frame's size, as `Task.to_mean` gives it."""
    frame = _size(picture)
    size = resized(frame, scale, asked.patch)
    if size == frame:
        return _mean_of_views(model, variables, asked, picture, window, 1.0)
    small_window = resized_window(window, frame, size)
    small = resize_inside(picture, window, size, small_window)
    # Both sides' own factors may differ a little from `scale`, as they are multiples of the patch size.
    factor = math.sqrt(size[0] / frame[0] * size[1] / frame[1])
    means = _mean_of_views(model, variables, asked, small, small_window, factor)
    return {name: resize_inside(of, small_window, frame, window) for name, of in means.items()}


def _mean_of_views(
    model: Model, variables: Any, asked: Views, picture: jax.Array, window: jax.Array, scale: float
) -> Maps:
    """The mean over windows and mirror images of pictures (B, H, W, 3) that were resized by `scale`."""
    frame = _size(picture)
    tile = (min(frame[0], asked.window[0]), min(frame[1], asked.window[1])) if asked.window else frame
    starts = window_starts(window, frame, tile, asked.overlap)  # (n, B, 2)
    mirrored = np.repeat([False, True] if asked.flip else [False], len(starts))  # (views,)
    starts = jnp.tile(starts, (len(mirrored) // len(starts), 1, 1))

    def see(part: jax.Array, mirror: jax.Array) -> tuple[Maps, jax.Array]:
        predictions: Any = model.apply(variables, jnp.where(mirror, part[:, :, ::-1], part), train=False)
        seen = {}
        for task in model.tasks:
            direct = task.undo_rescale(predictions[task.name], scale)
            seen[task.name] = task.to_mean(jnp.where(mirror, task.undo_flip(direct[:, :, ::-1]), direct))
        return seen, jnp.ones((*part.shape[:3], 1))

    def add(sums: Any, view: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        start, mirror = view
        seen = see(_cut(picture, start, tile), mirror)
        return jax.tree.map(lambda total, of: _batched(total + _placed(of, start, frame)), sums, seen), None

    # Scanned, so that the program holds the model once, and one view's activations live at a time.
    shapes = jax.eval_shape(see, jax.ShapeDtypeStruct((len(picture), *tile, 3), picture.dtype), mirrored[0])
    zeros = jax.tree.map(lambda of: _batched(jnp.zeros((len(picture), *frame, of.shape[-1]))), shapes)
    (sums, views_of_pixel), _ = jax.lax.scan(add, zeros, (starts, jnp.asarray(mirrored)))
    return {name: of / jnp.maximum(views_of_pixel, 1.0) for name, of in sums.items()}


def _size(maps: jax.Array) -> Size:
    return maps.shape[1], maps.shape[2]


def _batched(maps: jax.Array) -> jax.Array:
    """The same, split over the devices as the batch is."""
    return nn.with_logical_constraint(maps, ("batch", None, None, None))


def _cut(maps: jax.Array, start: jax.Array, size: Size) -> jax.Array:
    """(B, H, W, c) -> (B, *size, c): of each example the part that begins at its `start` (B, 2)."""
    if _size(maps) == size:
        return maps

    def cut(of_one: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(of_one, (corner[0], corner[1], 0), (*size, of_one.shape[-1]))

    return jax.vmap(cut)(maps, start)


def _placed(maps: jax.Array, start: jax.Array, frame: Size) -> jax.Array:
    """(B, h, w, c) -> (B, *frame, c): the maps at their places in frames of 0."""
    if _size(maps) == frame:
        return maps

    def place(of_one: jax.Array, corner: jax.Array) -> jax.Array:
        zeros = jnp.zeros((*frame, of_one.shape[-1]), of_one.dtype)
        return jax.lax.dynamic_update_slice(zeros, of_one, (corner[0], corner[1], 0))

    return jax.vmap(place)(maps, start)


def window_starts(picture: jax.Array, frame: Size, tile: Size, overlap: float) -> jax.Array:
    """Top and left of windows of size `tile` that cover the pictures in their frames, (n, B, 2) int32.

    Every picture gets as many windows as a whole frame needs for neighbours to overlap by `overlap` at least: XLA wants
    to know how many. They are spread evenly over the picture; in a direction in which it is smaller than a window, all
    have it in the middle, as `pad_centre` puts it there.

    picture: (B, 4) int32, top, left, height and width.
    """
    axes = []
    for axis in (0, 1):
        first, length = picture[:, axis], picture[:, axis + 2]
        stride = max(1, int(tile[axis] * (1 - overlap)))
        steps = -(-(frame[axis] - tile[axis]) // stride)
        spare = length - tile[axis]
        along = (2 * jnp.arange(steps + 1)[:, None] * jnp.maximum(spare, 0) + steps) // max(1, 2 * steps)  # rounded
        begin = first - jnp.maximum(-spare, 0) // 2
        axes.append(jnp.clip(begin + along, 0, frame[axis] - tile[axis]))  # (steps + 1, B)
    rows, columns = axes
    pairs = jnp.broadcast_arrays(rows[:, None], columns[None])
    return jnp.stack(pairs, axis=-1).reshape(-1, len(picture), 2).astype(jnp.int32)


def resized(frame: Size, scale: float, patch: int) -> Size:
    """The frame's size times `scale`, at the nearest multiples of the patch size; with scale 1 as it is."""
    if scale == 1:
        return frame
    height, width = (max(1, round(side * scale / patch)) * patch for side in frame)
    return height, width


def resized_window(window: jax.Array, frame: Size, size: Size) -> jax.Array:
    """Where the pictures are in frames that were resized from `frame` to `size`, (B, 4) int32.

    They have the pixels whose centres lie in the picture, and one at least.
    """

    def pixel(edge: jax.Array, axis: int) -> jax.Array:
        return (2 * edge * size[axis] + frame[axis] - 1) // (
            2 * frame[axis]
        )  # the first with its centre behind the edge

    top, left, height, width = (window[:, i] for i in range(4))
    corners = [jnp.minimum(pixel(top, 0), size[0] - 1), jnp.minimum(pixel(left, 1), size[1] - 1)]
    ends = [pixel(top + height, 0), pixel(left + width, 1)]
    sizes = [jnp.maximum(end - corner, 1) for corner, end in zip(corners, ends, strict=True)]
    return jnp.stack([*corners, *sizes], axis=1).astype(jnp.int32)


def resize_inside(maps: jax.Array, window: jax.Array, size: Size, new_window: jax.Array) -> jax.Array:
    """Bilinear, of the pixels in `window` alone: (B, H, W, c) -> (B, *size, c), 0 outside of `new_window`."""
    inside = inputs.inside(window, *_size(maps))[..., None].astype(jnp.float32)
    mixed = resize_bilinear(maps * inside, *size)
    share = resize_bilinear(inside, *size)  # of each pixel, how much of it comes from the inside
    kept = (share > 0) & inputs.inside(new_window, *size)[..., None]
    return jnp.where(kept, mixed / jnp.where(kept, share, 1.0), 0.0)
