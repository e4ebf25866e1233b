"""Inference with test-time augmentation: one forward pass, or the mean over flips, scales and sliding windows.

Fields of `config.eval`:

  flip         averages the image and its mirror image
  scales       resizes the image bilinearly, to multiples of the patch size; values that depend on the scale are scaled
               back (in an image enlarged by s, depth appears divided by s)
  image_size   frames larger than the model's size, `dataset.image_size`, use sliding-window inference: windows of that
               size, evenly spaced over the image, with an overlap of at least `overlap`; an image smaller than a
               window gets a single window around it

Probabilities, metres and unit vectors (`Task.to_mean`) are averaged, per pixel with equal weights over the views that
contain it. Padding is 0 in every view and does not influence the predictions inside the image. Frame: image and its
padding; window argument: the image's rectangle in the frame. Dims: docs/conventions.md.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import frame_size, normalisation
from taskexpert_jax.evaluation.gate_statistics import GateStatistics
from taskexpert_jax.models import inputs
from taskexpert_jax.models.decoders.decoder import GATES
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.models.upsampling import resize_bilinear
from taskexpert_jax.tasks import Task

Size = tuple[int, int]  # height, width
Maps = dict[str, Float32[Array, "B H W _"]]  # by task; the channels differ
Inference = Callable[[Any, jax.Array, jax.Array], Maps]


@runtime_checkable
class Model(Protocol):
    """Model with `apply` as of a Flax module: (variables, normalised image, train=) -> predictions by task."""

    @property
    def tasks(self) -> tuple[Task, ...]: ...

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


class Views(NamedTuple):
    """Augmented views of an image that are averaged.

    flip: whether the mirror image is included.
    scales: scale factors of the frame; 1 leaves it unchanged.
    window: size of the sliding windows; None: the whole frame at once.
    overlap: minimum overlap of neighbouring windows, as a fraction of their sides.
    patch: patch size, of which resized sides are multiples.
    """

    flip: bool
    scales: tuple[float, ...]
    window: Size | None
    overlap: float
    patch: int


def views(config: ConfigDict) -> Views:
    """Views configured by `config.eval`."""
    model_size = tuple(config.dataset.image_size)
    window = None if frame_size(config) == model_size else model_size
    return Views(config.eval.flip, tuple(config.eval.scales), window, config.eval.overlap, config.model.patch_size)


def make_inference(model: Model, config: ConfigDict) -> Inference:
    """Inference function (variables, image, window) -> {task: (B, H, W, channels) float32}, to be called under jit.

    image: (B, H, W, 3) uint8 frames, whose sides are multiples of the patch size or larger than `dataset.image_size`.
    window: (B, 4) int32: top, left, height and width of the image in its frame. Predictions in the padding are
    undefined.
    """
    configured = views(config)
    by = normalisation(config)

    def infer(variables: Any, image: UInt8[Array, "B H W 3"], window: Int32[Array, "B 4"]) -> Maps:
        normalised = inputs.normalise(image, window, by)
        if is_single(configured, _size(normalised)):
            return model.apply(variables, normalised, train=False)
        means = [_mean_at_scale(model, variables, configured, scale, normalised, window) for scale in configured.scales]
        total = jax.tree.map(lambda *of: functools.reduce(jnp.add, of), *means)
        return {task.name: task.from_mean(total[task.name] / len(means)) for task in model.tasks}

    return infer


def with_gates(
    model: MultiTaskModel,
    variables: Any,
    image: UInt8[Array, "B H W 3"],
    window: Int32[Array, "B 4"],
    mask: Float32[Array, " B"],
) -> tuple[Maps, Float32[Array, "S T B N k"], GateStatistics]:
    """Predictions of one forward pass, its gate weights, and their sums over the pixels of the images.

    For a model whose decoder has gates.

    image, window: see `make_inference`. mask: 0 for padding examples.
    """
    outputs: Any = model.apply(
        variables, inputs.normalise(image, window, model.normalisation), return_aux=True, train=False
    )
    predictions, aux = outputs
    assert model.decoder.gating
    statistics = GateStatistics.from_gates(aux[GATES], window, mask, _size(image), model.decoder.gating.stride)
    return predictions, aux[GATES], statistics


def is_single(configured: Views, frame: Size) -> bool:
    """True if the views amount to one forward pass over the whole frame."""
    one_window = configured.window is None or (frame[0] <= configured.window[0] and frame[1] <= configured.window[1])
    return one_window and not configured.flip and configured.scales == (1.0,)


def _mean_at_scale(
    model: Model,
    variables: Any,
    configured: Views,
    scale: float,
    image: Float32[Array, "B H W 3"],
    window: Int32[Array, "B 4"],
) -> Maps:
    """Mean, in the form of `Task.to_mean`, over the views of the frame resized by `scale`, at the frame's size."""
    frame = _size(image)
    size = resized(frame, scale, configured.patch)
    if size == frame:
        return _mean_of_views(model, variables, configured, image, window, 1.0)
    new_window = resized_window(window, frame, size)
    new_image = resize_inside(image, window, size, new_window)
    # The actual factors of both sides differ a little from `scale`, because the sides are multiples of the patch size.
    factor = math.sqrt(size[0] / frame[0] * size[1] / frame[1])
    means = _mean_of_views(model, variables, configured, new_image, new_window, factor)
    return {name: resize_inside(of, new_window, frame, window) for name, of in means.items()}


def _mean_of_views(
    model: Model,
    variables: Any,
    configured: Views,
    image: Float32[Array, "B H W 3"],
    window: Int32[Array, "B 4"],
    scale: float,
) -> Maps:
    """Mean, in the form of `Task.to_mean`, over windows and mirror images of images resized by `scale`."""
    frame = _size(image)
    tile = frame
    if configured.window:
        tile = (min(frame[0], configured.window[0]), min(frame[1], configured.window[1]))
    starts = window_starts(window, frame, tile, configured.overlap)  # (n, B, 2)
    mirrored = np.repeat([False, True] if configured.flip else [False], len(starts))  # (views,)
    starts = jnp.tile(starts, (len(mirrored) // len(starts), 1, 1))

    def predict(part: Float32[Array, "B h w 3"], mirror: Bool[Array, ""]) -> tuple[Any, Float32[Array, "B h w 1"]]:
        predictions: Any = model.apply(variables, jnp.where(mirror, part[:, :, ::-1], part), train=False)
        summands = {}
        for task in model.tasks:
            direct = task.undo_rescale(predictions[task.name], scale)
            summands[task.name] = task.to_mean(jnp.where(mirror, task.undo_flip(direct[:, :, ::-1]), direct))
        return summands, jnp.ones((*part.shape[:3], 1))

    def add(sums: Any, view: tuple[Array, Array]) -> tuple[Any, None]:
        start, mirror = view
        summands = predict(_cut(image, start, tile), mirror)
        return jax.tree.map(lambda total, of: _batched(total + _placed(of, start, frame)), sums, summands), None

    # Scanned, so that the program contains the model once and the activations of one view are live at a time.
    shapes = jax.eval_shape(predict, jax.ShapeDtypeStruct((image.shape[0], *tile, 3), image.dtype), mirrored[0])
    zeros = jax.tree.map(lambda of: _batched(jnp.zeros((image.shape[0], *frame, of.shape[-1]))), shapes)
    (sums, views_per_pixel), _ = jax.lax.scan(add, zeros, (starts, jnp.asarray(mirrored)))
    return {name: of / jnp.maximum(views_per_pixel, 1.0) for name, of in sums.items()}


def _size(maps: Array) -> Size:
    return maps.shape[1], maps.shape[2]


def _batched(maps: Float[Array, "B H W c"]) -> Float[Array, "B H W c"]:
    """The maps with the sharding of the batch."""
    return nn.with_logical_constraint(maps, ("batch", None, None, None))


def _cut(maps: Float[Array, "B H W c"], start: Int32[Array, "B 2"], size: Size) -> Float[Array, "B h w c"]:
    """Crops of the given size, whose top left corners are at `start` (row, column)."""
    if _size(maps) == size:
        return maps

    def cut(of_one: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(of_one, (corner[0], corner[1], 0), (*size, of_one.shape[-1]))

    return jax.vmap(cut)(maps, start)


def _placed(maps: Float[Array, "B h w c"], start: Int32[Array, "B 2"], frame: Size) -> Float[Array, "B H W c"]:
    """Inverse of `_cut`: the maps at `start` in frames of zeros."""
    if _size(maps) == frame:
        return maps

    def place(of_one: jax.Array, corner: jax.Array) -> jax.Array:
        zeros = jnp.zeros((*frame, of_one.shape[-1]), of_one.dtype)
        return jax.lax.dynamic_update_slice(zeros, of_one, (corner[0], corner[1], 0))

    return jax.vmap(place)(maps, start)


def window_starts(window: Int32[Array, "B 4"], frame: Size, tile: Size, overlap: float) -> Int32[Array, "n B 2"]:
    """Top left corners (row, column) of sliding windows of size `tile` that cover the images in their frames.

    The number n is static, as XLA requires: every image gets as many windows as an image of the frame's size needs for
    an overlap of at least `overlap`. They are evenly spaced over the image. Along an axis on which the image is smaller
    than a window, all windows have it in the centre, where `pad_centre` would put it.

    window: top, left, height and width of the image in its frame.
    """
    axes = []
    for axis in (0, 1):
        first, length = window[:, axis], window[:, axis + 2]
        stride = max(1, int(tile[axis] * (1 - overlap)))
        steps = -(-(frame[axis] - tile[axis]) // stride)
        spare = length - tile[axis]
        along = (2 * jnp.arange(steps + 1)[:, None] * jnp.maximum(spare, 0) + steps) // max(1, 2 * steps)  # rounded
        begin = first - jnp.maximum(-spare, 0) // 2
        axes.append(jnp.clip(begin + along, 0, frame[axis] - tile[axis]))  # (steps + 1, B)
    rows, columns = axes
    pairs = jnp.broadcast_arrays(rows[:, None], columns[None])
    return jnp.stack(pairs, axis=-1).reshape(-1, window.shape[0], 2).astype(jnp.int32)


def resized(frame: Size, scale: float, patch: int) -> Size:
    """Frame size times `scale`, rounded to multiples of the patch size; unchanged for scale 1."""
    if scale == 1:
        return frame
    height, width = (max(1, round(side * scale / patch)) * patch for side in frame)
    return height, width


def resized_window(window: Int32[Array, "B 4"], frame: Size, size: Size) -> Int32[Array, "B 4"]:
    """Rectangles of the images after their frames were resized from `frame` to `size`.

    A rectangle contains the pixels whose centres are inside the image, and at least one pixel.
    """

    def pixel(edge: Array, axis: int) -> Array:
        # First pixel whose centre is not before the edge.
        return (2 * edge * size[axis] + frame[axis] - 1) // (2 * frame[axis])

    top, left, height, width = (window[:, i] for i in range(4))
    corners = [jnp.minimum(pixel(top, 0), size[0] - 1), jnp.minimum(pixel(left, 1), size[1] - 1)]
    ends = [pixel(top + height, 0), pixel(left + width, 1)]
    sizes = [jnp.maximum(end - corner, 1) for corner, end in zip(corners, ends, strict=True)]
    return jnp.stack([*corners, *sizes], axis=1).astype(jnp.int32)


def resize_inside(
    maps: Float[Array, "B H W c"], window: Int32[Array, "B 4"], size: Size, new_window: Int32[Array, "B 4"]
) -> Float32[Array, "B h w c"]:
    """Bilinear resizing that ignores pixels outside of `window`; 0 outside of `new_window`."""
    inside = inputs.inside(window, *_size(maps))[..., None].astype(jnp.float32)
    mixed = resize_bilinear(maps * inside, *size)
    share = resize_bilinear(inside, *size)  # total weight of the pixels in `window`
    kept = (share > 0) & inputs.inside(new_window, *size)[..., None]
    return jnp.where(kept, mixed / jnp.where(kept, share, 1.0), 0.0)
