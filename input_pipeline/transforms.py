"""Joint transforms of an image and its labels, on dicts of TensorFlow tensors.

An example holds `image` (h,w,3) uint8 and, for each task, its label (h,w,c), with 0 (depth, normals) or 255 (classes)
where it is invalid. The random transforms are stateless: the same example, seed and strengths give the same result.
What differs between tasks (what a flip or a scale does to a label, what counts as invalid) is in the Task records.
"""

from collections.abc import Sequence

import tensorflow as tf

from taskexpert_jax.tasks import Task

Example = dict[str, tf.Tensor]
Seed = tf.Tensor  # (2,) int64


def _floor_size(image: tf.Tensor, factor: tf.Tensor | float) -> tf.Tensor:
    """Height and width of the image times `factor`, rounded down, at least one pixel; (2,) int32."""
    size = tf.cast(tf.shape(image)[:2], tf.float32) * factor
    return tf.maximum(tf.cast(tf.floor(size), tf.int32), 1)


def _nearest(length: tf.Tensor, new_length: tf.Tensor) -> tf.Tensor:
    """For each of `new_length` pixels of a resized side, the nearest of its `length` pixels; (new_length,) int32."""
    step = tf.cast(length, tf.float32) / tf.cast(new_length, tf.float32)
    centres = (tf.range(tf.cast(new_length, tf.float32)) + 0.5) * step
    return tf.minimum(tf.cast(tf.floor(centres), tf.int32), length - 1)


def _resize(example: Example, tasks: Sequence[Task], size: tf.Tensor, image_method: str) -> Example:
    """The image by `image_method`, labels by nearest neighbour; both with half-pixel centres, so that they agree."""
    image = tf.image.resize(example["image"], size, method=image_method, antialias=False)
    resized = {"image": tf.cast(tf.round(image), tf.uint8)}
    full = tf.shape(example["image"])
    rows, columns = _nearest(full[0], size[0]), _nearest(full[1], size[1])
    for task in tasks:  # two gathers: three times as fast as tf.image.resize, with the same result
        resized[task.name] = tf.gather(tf.gather(example[task.name], columns, axis=1), rows, axis=0)
    return {**example, **resized}


def downscale(example: Example, tasks: Sequence[Task], factor: float) -> Example:
    """The example as a camera with `factor` times the resolution sees it: depth keeps its metres.

    The image is averaged over areas, labels take the nearest pixel, sizes are rounded down. `factor` in (0, 1].
    """
    if factor == 1.0:
        return example
    return _resize(example, tasks, _floor_size(example["image"], factor), "area")


def random_scale(example: Example, tasks: Sequence[Task], seed: Seed, *, scale_min: float, scale_max: float) -> Example:
    """Image and labels scaled by one factor, uniform in [scale_min, scale_max); depth is divided by it.

    A picture scaled by s looks like one taken s times closer, hence the depth. Protocol: sizes rounded down, image
    bilinear without antialiasing, labels nearest.
    """
    scale = tf.random.stateless_uniform((), seed, scale_min, scale_max, alg="philox")
    scaled = _resize(example, tasks, _floor_size(example["image"], scale), "bilinear")
    for task in tasks:
        scaled[task.name] = task.rescale(scaled[task.name], scale)
    return scaled


def random_crop(example: Example, tasks: Sequence[Task], seed: Seed, *, size: tuple[int, int]) -> Example:
    """A window of at most `size` (height, width), at a uniformly drawn place; a smaller side is kept whole."""
    full = tf.shape(example["image"])[:2]
    window = tf.minimum(full, tf.constant(size))
    free = tf.cast(full - window, tf.float32)
    drawn = tf.random.stateless_uniform((2,), seed, alg="philox")
    # drawn < 1, yet drawn * (free + 1) can round up to free + 1.
    top, left = tf.unstack(tf.cast(tf.minimum(tf.floor(drawn * (free + 1)), free), tf.int32))
    height, width = tf.unstack(window)
    cropped = {
        name: example[name][top : top + height, left : left + width] for name in ["image", *(t.name for t in tasks)]
    }
    return {**example, **cropped}


def flip(example: Example, tasks: Sequence[Task]) -> Example:
    """Image and labels mirrored left to right; the x component of normals changes sign."""
    flipped = {"image": tf.reverse(example["image"], [1])}
    for task in tasks:
        flipped[task.name] = task.flip(tf.reverse(example[task.name], [1]))
    return {**example, **flipped}


def random_flip(example: Example, tasks: Sequence[Task], seed: Seed, *, probability: float) -> Example:
    """`flip` with the given probability."""
    draw = tf.random.stateless_uniform((), seed, alg="philox")
    return tf.cond(draw < probability, lambda: flip(example, tasks), lambda: dict(example))


def pad_centre(example: Example, tasks: Sequence[Task], *, size: tuple[int, int]) -> Example:
    """Image and labels in the middle of a frame of `size` (height, width), which must hold them.

    Around them the image is 0 (the training step makes its input 0 there after normalisation, by means of `window`) and
    each label has its task's `pad`. Adds `window` (4,) int32: top, left, height and width of the picture in the frame.
    """
    inner = tf.shape(example["image"])[:2]
    before = (tf.constant(size) - inner) // 2
    after = tf.constant(size) - inner - before
    paddings = tf.concat([tf.stack([before, after], axis=1), [[0, 0]]], axis=0)

    def padded(tensor: tf.Tensor, value: float, channels: int) -> tf.Tensor:
        result = tf.pad(tensor, paddings, constant_values=tf.cast(value, tensor.dtype))
        return tf.ensure_shape(result, (*size, channels))

    frame = {"image": padded(example["image"], 0, 3), "window": tf.concat([before, inner], axis=0)}
    for task in tasks:
        frame[task.name] = padded(example[task.name], task.pad, task.label_channels)
    return {**example, **frame}


def mark_invalid(example: Example, tasks: Sequence[Task]) -> Example:
    """Invalid pixels get the task's ignore value; a label that is ignored when empty gets it everywhere.

    The last of the transforms: labels can be neither flipped nor rescaled once ignore values are among them.
    """
    marked = {}
    for task in tasks:
        label = example[task.name]
        ignore = tf.cast(task.ignore, label.dtype)
        if task.invalid_value is not None:
            invalid = tf.reduce_all(label == tf.cast(task.invalid_value, label.dtype), axis=-1, keepdims=True)
            label = tf.where(invalid, ignore, label)
        if task.ignore_if_empty:
            empty = tf.reduce_all((label == 0) | (label == ignore))
            label = tf.where(empty, ignore, label)
        marked[task.name] = label
    return {**example, **marked}
