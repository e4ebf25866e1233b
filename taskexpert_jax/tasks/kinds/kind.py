"""The record of a kind of value, and what several kinds share."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sums over the pixels of some labels.

    Attributes:
      pixels: all of them, and valid: those with a label that counts.
      histogram: pixels by class id, by 0 and 1, or by depth in steps of a centimetre; else empty.
      lowest: the least valid number, inf without any, and highest: the greatest, or -inf.
    """

    pixels: int = 0
    valid: int = 0
    histogram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    lowest: float = np.inf
    highest: float = -np.inf

    @property
    def invalid(self) -> float | None:
        """The share of the pixels that count nowhere."""
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

    "Values" are what a user sees, and what prediction files hold: (..., H, W), or (..., H, W, channels) for vectors.

    Attributes:
      name: of the kind.
      channels: channels of the prediction (logits or values).
      label_channels: channels of the label.
      label_dtype: the label's dtype in a batch: the smallest that keeps it.
      ignore: the label value of a pixel that counts nowhere.
      invalid_value: a pixel whose label has this value in every channel is invalid and becomes `ignore`; None: none is.
        Flipping and rescaling a label leave it as it is: 0 or nan.
      values: (..., H, W, channels) float32 predictions -> values.
      from_values: NumPy values -> NumPy predictions, as the metric takes them, that have these `values`.
      to_mean: (..., channels) float32 predictions -> the float32 numbers in which several predictions of a pixel are
        averaged: probabilities, metres or vectors.
      from_mean: such a mean -> the prediction that stands for it.
      read_label: (numbers of a label file (h, w, label_channels), zero_is_void) -> the label before its cast to
        `label_dtype`, `invalid_value` or `ignore` where there is none. ValueError: numbers that cannot be meant.
      label_form: what a label is to be saved as.
      read_prediction: numbers of a prediction file (h, w, c) -> prediction (h, w, channels). ValueError: as above.
      resize: (values, height, width) -> values of that size.
      limits: valid values (n,) or (n, channels) -> the numbers at the two ends of the colours.
      colour: -> (H, W, 3) uint8, anything at invalid pixels.
      key: (drawn values, width) -> a legend or a colour bar at least as wide.
      caption: one or two sentences that explain the colours.
      count: label (h, w, label_channels) with `ignore` in it -> its counts.
      figures: counts of a data set -> numbers by name, for people; None where nothing is valid.
      quantities: names among the figures that have the values' own unit; the others are shares.
      class_names: names of the classes, where the values are class ids.
      palettes: a palette PNG may hold a prediction: its numbers are no colours.
      smooth: colours may be averaged when a map is reduced.
      jpeg: small pictures may be JPEG; else they are PNG, and never averaged.
      invalid: the colour of invalid pixels.
      faintest: a set of predictions whose greatest value is less was saved in another range; None: any may be meant.
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
    read_prediction: Callable[[np.ndarray], np.ndarray]
    resize: Callable[[np.ndarray, int, int], np.ndarray]
    colour: Callable[[canvas.Drawn], np.ndarray]
    key: Callable[[canvas.Drawn, int], Image.Image]
    caption: str
    count: Callable[[np.ndarray], Counts]
    figures: Callable[[Counts], dict[str, Any]]
    quantities: tuple[str, ...] = ()
    invalid_value: float | None = None
    limits: Callable[[np.ndarray], canvas.Range] = lambda values: (0.0, 1.0)
    class_names: tuple[str, ...] = ()
    palettes: bool = False
    smooth: bool = True
    jpeg: bool = True
    invalid: canvas.Colour = canvas.INVALID
    faintest: float | None = None

    def label_values(self, label: np.ndarray) -> np.ndarray:
        """The label (..., label_channels) in the form of the values."""
        return label[..., 0] if self.label_channels == 1 else label

    def invalid_pixels(self, label: np.ndarray) -> np.ndarray | None:
        """(h, w) bool, where a stored label has the `invalid_value`: in every channel, or nan in any; None: nowhere."""
        if self.invalid_value is None:
            return None
        if np.isnan(self.invalid_value):
            invalid = np.asarray(np.isnan(label).any(axis=-1))
        else:
            invalid = label[..., 0] == self.invalid_value
            for channel in range(1, label.shape[2]):  # a channel at a time: a third of the time of `.all(axis=-1)`
                if invalid.any():
                    invalid &= label[..., channel] == self.invalid_value
        return invalid if invalid.any() else None

    @property
    def missing(self) -> float:
        """The label value of a pixel that has none, before invalid pixels are marked."""
        return self.ignore if self.invalid_value is None else self.invalid_value


def nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values (h, w) at another size, each that of the nearest pixel."""
    if values.shape[:2] == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Values (h, w) or (h, w, c) at another size, float32; each channel by itself, lengths are left as they come."""
    if values.shape[:2] == (height, width):
        return values
    planes = np.moveaxis(np.atleast_3d(values).astype(np.float32), -1, 0)
    resized = [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BILINEAR)) for p in planes]
    return resized[0] if values.ndim == 2 else np.stack(resized, axis=-1)


def form(numbers: np.ndarray) -> str:
    """The numbers (h, w, c) of a file, in words."""
    return f"{numbers.shape[2]} number(s) a pixel of type {numbers.dtype}"


def single(numbers: np.ndarray) -> np.ndarray:
    """(h, w, 1) -> (h, w).

    Raises:
      ValueError: several numbers a pixel.
    """
    if numbers.shape[2] != 1:
        raise ValueError(f"holds {form(numbers)}, but a prediction of this task is one number a pixel, in grey")
    return numbers[..., 0]


def share(part: float, whole: float) -> float | None:
    """part / whole, None of nothing."""
    return float(part / whole) if whole else None


def count_bytes(label: np.ndarray, ignore: int) -> Counts:
    """Counts of a uint8 label, with its histogram."""
    histogram = np.bincount(label.ravel(), minlength=256)
    histogram[ignore] = 0
    return Counts(label.size, int(histogram.sum()), np.trim_zeros(histogram, "b"))


def count_range(label: np.ndarray, ignore: float) -> Counts:
    """Counts of a label of real numbers (h, w, c), with the least and the greatest of them."""
    valid = label[(label != ignore).all(axis=-1)]
    pixels = label[..., 0].size
    if not valid.size:
        return Counts(pixels)
    return Counts(pixels, len(valid), lowest=float(valid.min()), highest=float(valid.max()))


def range_figures(counts: Counts, unit: str) -> dict[str, Any]:
    """The share of invalid pixels, and the least and the greatest number, named by `range_quantities`."""
    found = (counts.lowest, counts.highest) if counts.valid else (None, None)
    return {"invalid": counts.invalid, **dict(zip(range_quantities(unit), found, strict=True))}


def range_quantities(unit: str) -> tuple[str, str]:
    """Names of the two numbers, with the unit where there is one."""
    after = f" ({unit})" if unit else ""
    return f"least{after}", f"greatest{after}"
