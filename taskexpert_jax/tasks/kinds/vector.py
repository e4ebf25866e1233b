"""Vector fields without normalisation: optical flow, albedo."""

import functools

import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas, conversions
from taskexpert_jax.tasks.canvas import Drawn, Range
from taskexpert_jax.tasks.kinds.kind import (
    Kind,
    bilinear,
    count_range,
    form,
    range_figures,
    range_quantities,
)
from taskexpert_jax.tasks.losses import VECTOR_IGNORE

# Sections of the wheel: number of hues, channel at its maximum, channel that rises (1) or falls (-1).
_WHEEL = ((15, 0, 1, 1), (6, 1, 0, -1), (4, 1, 2, 1), (11, 2, 1, -1), (13, 2, 0, 1), (6, 0, 2, -1))
_DISC = 96  # diameter of a key's colour wheel in pixels


def vector(channels: int, *, unit: str = "", limits: Range | None = None, label_dtype: str = "float32") -> Kind:
    """Kind of vectors of `channels` real components, predicted without any transformation.

    Labels are floating-point arrays; a pixel with a NaN in any component is unlabelled.

    Args:
      channels: 2 are drawn as directions on the colour wheel, 3 as RGB, 1 as grey, more as the grey of their length.
      unit: unit of the components, for keys and summaries.
      limits: smallest and largest possible component. Labels outside are an error, colours span the limits, and files
        with 3 channels may be 8-bit RGB PNG, black at the smallest and white at the largest. None: unbounded; colours
        span nearly all (99 %) of the values shown.
      label_dtype: dtype of labels in a batch: float32, or float16 where 3 significant digits are enough.
    """
    if channels < 1:
        raise ValueError(f"channels={channels}: a vector has at least 1 component")
    one = channels == 1
    return Kind(
        name="vector",
        channels=channels,
        label_channels=channels,
        label_dtype=label_dtype,
        ignore=VECTOR_IGNORE,
        invalid_value=np.nan,  # unchanged by flips and rescaling; 0 is a valid vector
        values=conversions.first_channel if one else conversions.unchanged,
        from_values=conversions.one_channel if one else conversions.unchanged,
        to_mean=conversions.unchanged,
        from_mean=conversions.unchanged,
        read_label=functools.partial(_label, limits),
        label_form=_label_form(channels, limits),
        array_form=_array_form(channels, unit),
        read_prediction=functools.partial(_prediction, channels, limits),
        resize=bilinear,
        limits=functools.partial(_limits, channels, limits),
        colour=_colour_wheel if channels == 2 else _colour_numbers,
        key=functools.partial(_key_wheel if channels == 2 else _key_numbers, unit),
        caption=_caption(channels, limits, unit),
        count=functools.partial(count_range, ignore=VECTOR_IGNORE),
        figures=functools.partial(range_figures, unit=unit),
        quantities=range_quantities(unit),
        unit=unit,
        invalid=canvas.INVALID if channels == 2 else canvas.INVALID_GREY,
    )


def _array_form(channels: int, unit: str) -> str:
    what = "numbers" if channels == 1 else f"vectors of {channels} components"
    return f"{what}{f' in {unit}' * bool(unit)}, {'(H, W)' if channels == 1 else f'(H, W, {channels})'} float32"


def _label_form(channels: int, limits: Range | None) -> str:
    return f"{'an RGB PNG, or as ' * _png(channels, limits)}a floating-point .npy of shape (h, w, {channels})"


def _png(channels: int, limits: Range | None) -> bool:
    """True if files may be RGB PNGs."""
    return channels == 3 and limits is not None


def _numbers(limits: Range | None, numbers: np.ndarray) -> np.ndarray:
    """Components from a file: unsigned integers are scaled to the limits, floating-point numbers are kept.

    Raises:
      ValueError: integers that are not those of an RGB image, or integers without limits.
    """
    if numbers.dtype.kind == "f":
        return numbers
    if limits is None or not _png(numbers.shape[2], limits) or numbers.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"holds {form(numbers)}; save it as {_label_form(numbers.shape[2], limits)}")
    low, high = limits
    return numbers / np.float32(np.iinfo(numbers.dtype).max) * np.float32(high - low) + np.float32(low)


def _label(limits: Range | None, numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    """Vectors from a file; NaN in all channels where any is NaN or Inf."""
    del zero_is_void
    vectors = _numbers(limits, numbers)
    known = np.asarray(np.isfinite(vectors).all(axis=-1))
    found = vectors[known]
    least, greatest = limits or (VECTOR_IGNORE / 2, -VECTOR_IGNORE / 2)  # far from the ignore value
    if found.size and (found.min() < least or found.max() > greatest):
        raise ValueError(
            f"holds numbers from {found.min():g} to {found.max():g}, outside of [{least:g}, {greatest:g}]; "
            "rescale them, and use nan for unlabelled pixels"
        )
    return np.where(known[..., None], vectors, np.nan)


def _prediction(channels: int, limits: Range | None, numbers: np.ndarray) -> np.ndarray:
    if numbers.shape[2] != channels:
        raise ValueError(f"holds {form(numbers)}; save it as {_label_form(channels, limits)}")
    return _numbers(limits, numbers).astype(np.float32)


def _limits(channels: int, limits: Range | None, vectors: np.ndarray) -> Range:
    """Ends of the colour map: the given limits, or percentiles of the values; lengths start at 0."""
    if channels in (1, 3):
        low, high = limits or (np.percentile(vectors, (0.5, 99.5)) if vectors.size else (0, 1))
    elif limits:
        low, high = 0, max(map(abs, limits)) * (1 if channels == 2 else channels**0.5)
    else:
        low, high = 0, np.percentile(np.linalg.norm(vectors, axis=-1), 99.5) if vectors.size else 1
    return float(low), float(high) if high > low else float(low) + 1


def wheel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colours of vectors, x to the right and y down, as (..., 3) uint8: white at 0, saturated at length 1.

    Longer vectors are darker. Middlebury's colour wheel of optical flow (Baker et al., "A database and evaluation
    methodology for optical flow", 2011).
    """
    hues = []
    for steps, full, changing, sign in _WHEEL:
        ramp = np.zeros((steps, 3))
        ramp[:, full] = 1
        ramp[:, changing] = np.arange(steps) / steps if sign > 0 else 1 - np.arange(steps) / steps
        hues.append(ramp)
    hues = np.concatenate(hues)
    place = (np.arctan2(y, x) / (2 * np.pi) % 1) * len(hues)  # 0 to the right, growing downwards
    first = place.astype(int) % len(hues)
    share = (place - np.floor(place))[..., None]
    hue = (1 - share) * hues[first] + share * hues[(first + 1) % len(hues)]
    length = np.hypot(x, y)[..., None]
    return np.round(255 * np.where(length <= 1, 1 - np.minimum(length, 1) * (1 - hue), 0.75 * hue)).astype(np.uint8)


def _colour_wheel(drawn: Drawn) -> np.ndarray:
    vectors = np.where(drawn.valid[..., None], drawn.values, 0).astype(np.float32) / drawn.limits[1]
    return wheel(vectors[..., 0], vectors[..., 1])


def _key_wheel(unit: str, drawn: Drawn, width: int) -> Image.Image:
    """Colour wheel, labelled with the length at its rim."""
    x, y = np.meshgrid(*[np.linspace(-1, 1, _DISC)] * 2)
    disc = np.where(np.hypot(x, y)[..., None] <= 1, wheel(x, y), np.array(canvas.PAPER, np.uint8))
    return canvas.beside(
        Image.fromarray(disc), [f"rim: {drawn.limits[1]:.3g} {unit}".rstrip(), "centre: 0", "darker: longer"], width
    )


def _numbers_shown(drawn: Drawn) -> np.ndarray:
    """Values drawn as grey (H, W) or as RGB (H, W, 3)."""
    values = drawn.values
    if values.ndim == 2:
        return np.where(drawn.valid, values, 0)
    vectors = np.where(drawn.valid[..., None], values, 0).astype(np.float32)
    return vectors if vectors.shape[-1] == 3 else np.linalg.norm(vectors, axis=-1)


def _colour_numbers(drawn: Drawn) -> np.ndarray:
    return canvas.grey(_numbers_shown(drawn), drawn.limits)


def _key_numbers(unit: str, drawn: Drawn, width: int) -> Image.Image:
    labels = [f"{number:.3g} {unit}".rstrip() for number in np.linspace(*drawn.limits, 3)]
    return canvas.bar(canvas.grey(np.linspace(0, 1, 256), (0, 1)), labels, width)


def _caption(channels: int, limits: Range | None, unit: str) -> str:
    unit = f" {unit}" * bool(unit)
    if channels == 2:
        reach = f"at {max(map(abs, limits)):g}{unit}" if limits else "at the end of the ground truth's range"
        return (
            f"Red points right, yellow down, light blue left, violet up; 0 is white, the colour is full {reach}; "
            "black is unlabelled."
        )
    what = {1: "The value is", 3: "Red, green and blue are the three components,"}.get(channels, "The length is")
    reach = "over the range of the ground truth" if limits is None else f"from {limits[0]:g} to {limits[1]:g}{unit}"
    if limits is not None and channels not in (1, 3):
        reach = f"from 0 to {_limits(channels, limits, np.zeros(0))[1]:.3g}{unit}"
    return f"{what} shown from dark to bright {reach}; dark blue is unlabelled."
