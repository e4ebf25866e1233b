"""Joint transforms of an image and its labels, on dicts of NumPy arrays, computed with OpenCV.

An example has `image` (h,w,3) uint8 and, for each task, its label (h,w,c), with `Task.missing` at invalid pixels.
Random transforms are deterministic functions of (example, seed, arguments). Each uses its own random stream, so that
the strength of one does not change the draws of another. The Task records define what differs between tasks: the effect
of flip and scale on a label, and its invalid pixels.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from taskexpert_jax.tasks import Task

Example = dict[str, Any]
Seed = tuple[int, int]  # the run's seed, and the position in the stream of examples

cv2.setNumThreads(1)  # one example per thread, so threads within one example only compete

_REMAP_LIMIT = 2**15 - 1  # sides from which on cv2.remap refuses an array

# Random streams of one seed.
_SCALE, _CROP, _FLIP, _COLOUR = range(1, 5)


def generator(seed: Seed, stream: int) -> np.random.Generator:
    """Random generator of one stream at one position; counter-based, so that no earlier draws are needed."""
    run, position = seed  # `run` is below 2^32, so that every value has its own stream
    return np.random.Generator(np.random.Philox(key=[run, stream], counter=[0, 0, 0, position]))


def _scaled_size(image: np.ndarray, factor: float) -> tuple[int, int]:
    """Height and width of the image times `factor`, rounded down, at least 1."""
    height, width = image.shape[:2]
    return max(int(height * factor), 1), max(int(width * factor), 1)


def _nearest(length: int, new_length: int) -> np.ndarray:
    """Nearest source pixel of each pixel of a resized side, half-pixel centres; (new_length,) float32."""
    return ((2 * np.arange(new_length) + 1) * length // (2 * new_length)).astype(np.float32)


def _bits(label: np.ndarray) -> np.ndarray:
    """View of a float16 label as uint16, because OpenCV does not support float16."""
    return label.view(np.uint16) if label.dtype == np.float16 else label


def _take(label: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Gathers label[rows, columns] with cv2.remap, which moves all channels at once and releases the GIL.

    label: (h,w,c) of 1 to 4 channels; rows and columns: (H,W) float32, whole numbers.
    """
    if max(*label.shape, *rows.shape) >= _REMAP_LIMIT:
        return label[rows.astype(np.intp), columns.astype(np.intp)]
    taken = cv2.remap(_bits(label), columns, rows, cv2.INTER_NEAREST)
    return taken.reshape(*rows.shape, label.shape[2]).view(label.dtype)


def _grid(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(rows), len(columns))
    row, column = np.empty(shape, np.float32), np.empty(shape, np.float32)
    row[:], column[:] = rows[:, None], columns
    return row, column


def fill_missing(example: Example, tasks: Sequence[Task]) -> Example:
    """Example with image, id and a label for each task; missing labels and values out of range become invalid."""
    filled = {"image": example["image"], "id": example["id"]}
    size = example["image"].shape[:2]
    for task in tasks:
        label = example.get(task.name)
        empty = np.full((*size, task.label_channels), task.missing, task.label_dtype)
        filled[task.name] = empty if label is None else task.kind.in_range(label)
    return filled


def downscale(example: Example, tasks: Sequence[Task], factor: float) -> Example:
    """Downscales image and labels by `factor` in (0, 1]; depth in metres is unchanged, as for a coarser camera.

    Area averaging for the image, nearest neighbour for labels; sizes are rounded down.
    """
    if factor == 1.0:
        return example
    height, width = example["image"].shape[:2]
    size = _scaled_size(example["image"], factor)
    rows, columns = _grid(_nearest(height, size[0]), _nearest(width, size[1]))
    reduced = {"image": cv2.resize(example["image"], size[::-1], interpolation=cv2.INTER_AREA)}
    reduced |= {task.name: _take(example[task.name], rows, columns) for task in tasks}
    return {**example, **reduced}


def random_scale_and_crop(
    example: Example,
    tasks: Sequence[Task],
    seed: Seed,
    *,
    size: tuple[int, int],
    scale_min: float,
    scale_max: float,
    max_class_share: float,
    redraws: int,
) -> Example:
    """Scales image and labels by one factor, uniform in [scale_min, scale_max), then crops them to at most `size`.

    Scale: an image enlarged by s looks s times closer, so depth is divided by s. Sizes are rounded down; bilinear
    without antialiasing for the image, nearest neighbour for labels, both with half-pixel centres.

    Crop: a window at a uniform random position; a side smaller than `size` is kept whole. The window is redrawn up to
    `redraws` times, until the deciding label (`Task.decides_crop`) has more than one class and none covers more than
    `max_class_share` of its valid pixels; the last window is kept in any case. `max_class_share` 1 accepts the first.

    Scaled labels are computed only inside the window.
    """
    scale = float(generator(seed, _SCALE).uniform(scale_min, scale_max))
    image = example["image"]
    full = _scaled_size(image, scale)
    rows, columns = _nearest(image.shape[0], full[0]), _nearest(image.shape[1], full[1])
    window = min(full[0], size[0]), min(full[1], size[1])
    draw = generator(seed, _CROP)

    def place() -> tuple[int, int]:
        top, left = (int(draw.integers(all_ - kept + 1)) for all_, kept in zip(full, window, strict=True))
        return top, left

    def grid(top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        return _grid(rows[top : top + window[0]], columns[left : left + window[1]])

    deciding = [task for task in tasks if task.decides_crop] if max_class_share < 1 and window != full else []
    top, left = place()
    where = grid(top, left)
    deciding = [task for task in deciding if (example[task.name] != task.ignore).any()]  # else redrawing is futile
    for _ in range(redraws if deciding else 0):
        if all(_is_varied(_take(example[task.name], *where), task, max_class_share) for task in deciding):
            break
        top, left = place()
        where = grid(top, left)

    result = dict(example)
    scaled = image if full == image.shape[:2] else cv2.resize(image, full[::-1], interpolation=cv2.INTER_LINEAR)
    result["image"] = scaled[top : top + window[0], left : left + window[1]]
    for task in tasks:
        result[task.name] = task.rescale(_take(example[task.name], *where), np.float32(scale))
    return result


def _is_varied(label: np.ndarray, task: Task, max_share: float) -> bool:
    """True if a label (h,w,1) uint8 has several classes and none covers more than `max_share` of the valid pixels."""
    counts = cv2.calcHist([label], [0], None, [256], [0, 256]).ravel()
    counts[int(task.ignore)] = 0
    return bool(np.count_nonzero(counts) > 1 and counts.max() <= max_share * counts.sum(dtype=np.float64))


def flip(example: Example, tasks: Sequence[Task]) -> Example:
    """Mirrors image and labels left to right; the x component of normals changes sign."""
    flipped = {"image": cv2.flip(example["image"], 1)}
    for task in tasks:
        flipped[task.name] = task.flip(_mirrored(example[task.name]))
    return {**example, **flipped}


def _mirrored(label: np.ndarray) -> np.ndarray:
    return cv2.flip(_bits(label), 1).reshape(label.shape).view(label.dtype)


def random_flip(example: Example, tasks: Sequence[Task], seed: Seed, *, probability: float) -> Example:
    """Applies `flip` with the given probability."""
    return flip(example, tasks) if generator(seed, _FLIP).random() < probability else example


def _table(factor: float, amount: float) -> np.ndarray:
    """Look-up table of factor * v + amount for all bytes v, clipped to [0, 255] and rounded down as in the protocol."""
    return np.clip(np.arange(256, dtype=np.float32) * factor + amount, 0, 255).astype(np.uint8)


def photometric_distortion(
    image: np.ndarray,
    seed: Seed,
    *,
    brightness: float,
    contrast: tuple[float, float],
    saturation: tuple[float, float],
    hue: int,
    probability: float,
) -> np.ndarray:
    """Photometric distortion of an image (h,w,3) uint8; each of the four changes has the given probability.

    In order: brightness (adds a number in [-brightness, brightness)); contrast (multiplies by a factor in `contrast`)
    here or at the end, with equal probability; saturation (multiplies by a factor in `saturation`); hue (adds an
    integer in [-hue, hue), modulo 180). Values are integers in [0, 255] after each step; saturation and hue are changed
    in OpenCV's 8-bit HSV.
    """
    draw = generator(seed, _COLOUR)
    brighter, contrasted, saturated, turned = draw.random(4) < probability
    contrast_first = draw.random() < 0.5
    brightness_table = _table(1.0, draw.uniform(-brightness, brightness) if brightness else 0.0)
    contrast_table = _table(draw.uniform(*contrast), 0.0)
    hsv_tables = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 1, 3))
    saturation_table = _table(draw.uniform(*saturation), 0.0)
    turn = int(draw.integers(-hue, hue)) if hue else 0
    if saturated:
        hsv_tables[:, 0, 1] = saturation_table
    if turned:
        hsv_tables[:, 0, 0] = (np.arange(256) + turn) % 180

    if brighter:
        image = cv2.LUT(image, brightness_table)
    if contrasted and contrast_first:
        image = cv2.LUT(image, contrast_table)
    if saturated or turned:
        image = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), hsv_tables)
        image = cv2.cvtColor(image, cv2.COLOR_HSV2RGB)
    if contrasted and not contrast_first:
        image = cv2.LUT(image, contrast_table)
    return image


def _replaced(label: np.ndarray, where: np.ndarray, value: float) -> np.ndarray:
    """Copy of the label with `value` at the pixels `where` (h,w) bool, in a fifth of the time of np.where."""
    replaced = label.copy()
    cv2.copyTo(_bits(np.full_like(label, value)), where.view(np.uint8), _bits(replaced))
    return replaced


def mark_invalid(example: Example, tasks: Sequence[Task]) -> Example:
    """Sets invalid pixels to the task's ignore value, and all pixels of an empty label with `Task.ignore_if_empty`.

    Must follow all other label transforms, because labels with ignore values can be neither flipped nor rescaled.
    """
    marked = {}
    for task in tasks:
        label = example[task.name]
        invalid = task.kind.invalid_pixels(label)
        if invalid is not None:
            label = _replaced(label, invalid, task.ignore)
        if task.ignore_if_empty and not ((label != 0) & (label != task.ignore)).any():
            label = np.full_like(label, task.ignore)
        marked[task.name] = label
    return {**example, **marked}


def pad_centre(example: Example, tasks: Sequence[Task], *, size: tuple[int, int]) -> Example:
    """Pads image and labels to `size` (height, width), centred; they must fit. The last transform.

    The padding is 0 in the image and the ignore value in labels. (The training step sets the normalised input to 0
    there too, by `window`. The protocol pads depth and normals with 0 and marks invalid pixels afterwards, which is
    equivalent.) Adds `window` (4,) int32: top, left, height and width of the image in the frame.
    """
    height, width = example["image"].shape[:2]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2

    def padded(array: np.ndarray, value: float) -> np.ndarray:
        if (height, width) == size:
            return array
        frame = np.full((*size, array.shape[2]), value, array.dtype)
        frame[top : top + height, left : left + width] = array
        return frame

    framed = {"image": padded(example["image"], 0), "window": np.array([top, left, height, width], np.int32)}
    framed |= {task.name: padded(example[task.name], task.ignore) for task in tasks}
    return {**example, **framed}
