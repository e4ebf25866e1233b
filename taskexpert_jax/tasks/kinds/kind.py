"""Record of a kind of value, and functions shared by several kinds."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas


@dataclasses.dataclass(frozen=True)
class Counts:
    """Pixel statistics of a set of labels.

    Attributes:
      pixels: number of pixels.
      valid: number of pixels with a valid label.
      histogram: pixels per class id, per mask value 0 and 1, or per interval of depth; otherwise empty.
      lowest: smallest valid value; inf if there is none.
      highest: largest valid value; -inf if there is none.
    """

    pixels: int = 0
    valid: int = 0
    histogram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    lowest: float = np.inf
    highest: float = -np.inf

    @property
    def invalid(self) -> float | None:
        """Share of the pixels without a valid label; None without pixels."""
        return share(self.pixels - self.valid, self.pixels)

    def __add__(self, other: "Counts") -> "Counts":
        both = np.zeros(max(len(self.histogram), len(other.histogram)), np.int64)
        both[: len(self.histogram)] += self.histogram
        both[: len(other.histogram)] += other.histogram
        return Counts(
            self.pixels + other.pixels,
            self.valid + other.valid,
            both,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of value: how it is predicted, stored in files, resized, drawn and counted.

    "Values" are shown to users and stored in prediction files: (..., H, W), or (..., H, W, channels) for vectors.

    Attributes:
      name: name of the kind.
      channels: channels of the prediction (logits or values).
      label_channels: channels of the label.
      label_dtype: dtype of the label in a batch, the smallest that represents it.
      ignore: label value of an ignored pixel.
      invalid_value: a pixel whose label has this value in every channel is invalid and becomes `ignore`; 0 or NaN,
        which flipping and rescaling do not change. None: there are no such pixels.
      values: predictions (..., H, W, channels) float32 -> values.
      from_values: inverse of `values` in NumPy: values -> predictions in the form that the metric takes.
      to_mean: predictions (..., channels) float32 -> the form in which several predictions of a pixel are averaged:
        probabilities, metres or vectors, float32.
      from_mean: mean in the form of `to_mean` -> the corresponding prediction.
      read_label: (numbers of a label file (h, w, label_channels), zero_is_void) -> the label before its cast to
        `label_dtype`, with `invalid_value` or `ignore` at unlabelled pixels. ValueError: values that are no label.
      in_range: stored label (h, w, label_channels) -> the same with `missing` at values outside of the kind's range.
      label_form: file format for labels, in words.
      array_form: values, shape, dtype and unit of a prediction's array, in words.
      read_prediction: numbers of a prediction file (h, w, c) -> prediction (h, w, channels). ValueError: values that
        are no prediction.
      resize: (values, height, width) -> values of that size.
      limits: valid values (n,) or (n, channels) -> values at the two ends of the colour map.
      colour: drawn values -> (H, W, 3) uint8; undefined at invalid pixels.
      key: (drawn values, width) -> legend or colour bar of at least that width.
      caption: one or two sentences that explain the colours.
      count: label (h, w, label_channels), with `ignore` at invalid pixels -> its counts.
      figures: counts of a data set -> summary statistics by name; None where nothing is valid.
      quantities: names of the figures in the values' own unit; the others are shares.
      unit: unit of the values; empty: none.
      bounds: smallest and largest possible number in the values; None: unbounded.
      class_names: names of the classes, if the values are class ids.
      palettes: whether a palette PNG may hold a prediction; its indices are then class ids.
      smooth: whether colours may be averaged when a map is downscaled.
      categorical: whether the label is a class or a share of one, as in classification, not a measured value.
      jpeg: whether thumbnails may be JPEG; otherwise they are PNG and downscaled without averaging.
      invalid: colour of invalid pixels.
      faintest: if no value in a set of predictions reaches it, they were saved in a wrong range; None: no such check.
    """

    name: str
    channels: int
    label_channels: int
    label_dtype: str
    ignore: float
    values: Callable[[jax.Array], jax.Array]
    from_values: Callable[[np.ndarray], np.ndarray]
    to_mean: Callable[[jax.Array], jax.Array]
    from_mean: Callable[[jax.Array], jax.Array]
    read_label: Callable[[np.ndarray, bool], np.ndarray]
    label_form: str
    array_form: str
    read_prediction: Callable[[np.ndarray], np.ndarray]
    resize: Callable[[np.ndarray, int, int], np.ndarray]
    colour: Callable[[canvas.Drawn], np.ndarray]
    key: Callable[[canvas.Drawn, int], Image.Image]
    caption: str
    count: Callable[[np.ndarray], Counts]
    figures: Callable[[Counts], dict[str, Any]]
    quantities: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float | None, float | None] = (None, None)
    invalid_value: float | None = None
    in_range: Callable[[np.ndarray], np.ndarray] = lambda label: label
    limits: Callable[[np.ndarray], canvas.Range] = lambda values: (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    palettes: bool = False
    categorical: bool = False
    smooth: bool = True
    jpeg: bool = True
    invalid: canvas.Colour = canvas.INVALID
    faintest: float | None = None

    def label_values(self, label: np.ndarray) -> np.ndarray:
        """The label (..., label_channels) in the form of the values."""
        return label[..., 0] if self.label_channels == 1 else label

    def invalid_pixels(self, label: np.ndarray) -> np.ndarray | None:
        """Pixels of a stored label that are invalid, (h, w) bool; None if there are none.

        They have the `invalid_value` in every channel, or, where it is NaN, in any.
        """
        if self.invalid_value is None:
            return None
        if np.isnan(self.invalid_value):
            invalid = np.asarray(np.isnan(label).any(axis=-1))
        else:
            invalid = label[..., 0] == self.invalid_value
            for channel in range(1, label.shape[2]):  # by channel: a third of the time of `.all(axis=-1)`
                if invalid.any():
                    invalid &= label[..., channel] == self.invalid_value
        return invalid if invalid.any() else None

    @property
    def missing(self) -> float:
        """Label value of a pixel without ground truth, before invalid pixels are marked."""
        return self.ignore if self.invalid_value is None else self.invalid_value


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resizing of values (h, w)."""
    if values.shape[:2] == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resizing of values (h, w) or (h, w, c), float32; per channel, vectors are not renormalised."""
    if values.shape[:2] == (height, width):
        return values
    planes = np.moveaxis(np.atleast_3d(values).astype(np.float32), -1, 0)
    resized = [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BILINEAR)) for p in planes]
    return resized[0] if values.ndim == 2 else np.stack(resized, axis=-1)


def form(numbers: np.ndarray) -> str:
    """Channels and dtype of a file's numbers (h, w, c), in words."""
    return f"{numbers.shape[2]} number(s) per pixel of type {numbers.dtype}"


def single(numbers: np.ndarray) -> np.ndarray:
    """Drops the channel axis of a prediction file's numbers: (h, w, 1) -> (h, w).

    Raises:
      ValueError: more than one channel.
    """
    if numbers.shape[2] != 1:
        raise ValueError(f"holds {form(numbers)}, but a prediction of this task has one (a grey image)")
    return numbers[..., 0]


def share(part: float, whole: float) -> float | None:
    """part / whole; None if whole is 0."""
    return float(part / whole) if whole else None


def count_bytes(label: np.ndarray, ignore: int) -> Counts:
    """Counts of a uint8 label, with its histogram."""
    histogram = np.bincount(label.ravel(), minlength=256)
    histogram[ignore] = 0
    return Counts(label.size, int(histogram.sum()), np.trim_zeros(histogram, "b"))


def count_range(label: np.ndarray, ignore: float) -> Counts:
    """Counts of a label of real numbers (h, w, c), with the smallest and the largest of them."""
    valid = label[(label != ignore).all(axis=-1)]
    pixels = label[..., 0].size
    if not valid.size:
        return Counts(pixels)
    return Counts(pixels, len(valid), lowest=float(valid.min()), highest=float(valid.max()))


def range_figures(counts: Counts, unit: str) -> dict[str, Any]:
    """Share of invalid pixels, and the smallest and largest value, named by `range_quantities`."""
    found = (counts.lowest, counts.highest) if counts.valid else (None, None)
    return {"invalid": counts.invalid, **dict(zip(range_quantities(unit), found, strict=True))}


def range_quantities(unit: str) -> tuple[str, str]:
    """Names of the smallest and the largest value, with the unit if there is one."""
    after = f" ({unit})" if unit else ""
    return f"least{after}", f"greatest{after}"
