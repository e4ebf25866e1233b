"""Depth maps in metres, and disparity maps in pixels."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas, conversions
from taskexpert_jax.tasks.canvas import Drawn, Range
from taskexpert_jax.tasks.kinds.kind import Counts, Kind, bilinear, single
from taskexpert_jax.tasks.losses import DEPTH_IGNORE, DEPTH_MAX, DISPARITY_MAX, valid_depth

_FARTHEST_WHOLE = 1000.0  # metres; whole numbers beyond it are millimetres
_NEAR_IS_LEAST, _NEAR_IS_GREATEST = "turbo_r", "turbo"  # colour maps in which near is red
_NO_DEPTH = 65535  # the largest 16-bit number: a usual mark for pixels without depth
_STEPS = 8_000  # of the histogram up to the largest valid value: a centimetre at 80 m


def depth(maximum: float = DEPTH_MAX) -> Kind:
    """Kind of depth maps, predicted in metres; negative predictions become 0.

    maximum: metres; valid depths are more than 0 and less than this (`losses.valid_depth`).
    """
    return Kind(
        name="depth",
        channels=1,
        label_channels=1,
        label_dtype="float32",
        ignore=DEPTH_IGNORE,
        invalid_value=0,
        values=_values,
        from_values=conversions.one_channel,
        to_mean=conversions.unchanged,
        from_mean=conversions.unchanged,
        read_label=functools.partial(_label, maximum=maximum),
        in_range=functools.partial(_in_range, maximum=maximum),
        label_form="a grey or palette PNG, or as such an array",
        array_form="metres, (H, W) float32",
        read_prediction=_prediction,
        resize=bilinear,
        limits=_limits,
        colour=functools.partial(_colour, _NEAR_IS_LEAST),
        key=functools.partial(_key, _NEAR_IS_LEAST, "m"),
        caption="Near is red, far is blue, over the range of the ground truth; black has no depth.",
        count=functools.partial(_count, step=maximum / _STEPS),
        figures=functools.partial(_figures, "m", step=maximum / _STEPS),
        quantities=_quantities("m"),
        unit="m",
        bounds=(0, None),
        smooth=False,
    )


def disparity() -> Kind:
    """Kind of disparity maps, predicted in pixels of the image before `dataset.downscale`; negative ones become 0.

    Valid disparities are more than 0 and less than 256 (`losses.DISPARITY_MAX`).
    """
    step = DISPARITY_MAX / _STEPS
    return dataclasses.replace(
        depth(DISPARITY_MAX),
        name="disparity",
        read_label=_disparity,
        label_form="a 16-bit PNG or integers p of (p - 1) / 256 pixels, or pixels in a floating-point .npy",
        array_form="pixels of the image before dataset.downscale, (H, W) float32",
        read_prediction=_disparity_prediction,
        colour=functools.partial(_colour, _NEAR_IS_GREATEST),
        key=functools.partial(_key, _NEAR_IS_GREATEST, "px"),
        caption="Near is red, far is blue, over the range of the ground truth; black has no disparity.",
        figures=functools.partial(_figures, "px", step=step),
        quantities=_quantities("px"),
        unit="px",
    )


def decoded_disparity(stored: np.ndarray) -> np.ndarray:
    """Disparities of 16-bit integers p in Cityscapes' code, (p - 1) / 256 pixels float32; 0 where p is 0 (invalid)."""
    return np.maximum(stored.astype(np.float32) - np.float32(1), np.float32(0)) / np.float32(256)


def _pixels(numbers: np.ndarray) -> np.ndarray:
    """Disparities (h, w, c) float32 of a file: integers in Cityscapes' code, or floating-point pixels."""
    if numbers.dtype.itemsize == 1:
        raise ValueError("has 8 bits per pixel; save disparity as 16-bit PNG in Cityscapes' code, or as .npy in pixels")
    return numbers.astype(np.float32) if numbers.dtype.kind == "f" else decoded_disparity(numbers)


def _disparity(numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    """Pixels from a label file, 0 where there is no valid disparity.

    Raises:
      ValueError: 8 bits per pixel, or disparities of which none is valid.
    """
    del zero_is_void
    pixels = _pixels(numbers)
    known = pixels[valid_depth(pixels, np.inf)]
    if known.size and known.min() >= DISPARITY_MAX:
        raise ValueError(
            f"disparities of {known.min():g} to {known.max():g} px, but valid ones are below {DISPARITY_MAX:g} px; if "
            "these are numbers p of (p - 1) / 256, save them as integers"
        )
    return _in_range(pixels, maximum=DISPARITY_MAX)


def _disparity_prediction(numbers: np.ndarray) -> np.ndarray:
    return conversions.one_channel(single(_pixels(numbers)))


def _values(prediction: jax.Array) -> jax.Array:
    return jnp.maximum(prediction[..., 0], 0.0)


def _label(numbers: np.ndarray, zero_is_void: bool, *, maximum: float) -> np.ndarray:
    """Integer millimetres or floating-point metres -> metres, 0 where there is no valid depth.

    Raises:
      ValueError: 8 bits per pixel; or depths of which none is valid, or that are probably millimetres.
    """
    del zero_is_void
    if numbers.dtype.itemsize == 1:
        raise ValueError("has 8 bits per pixel; save depth as 16-bit PNG in millimetres, or as .npy in metres")
    metres = numbers.astype(np.float32)
    if numbers.dtype.kind in "iu":
        metres *= np.float32(0.001)
        metres[numbers == _NO_DEPTH] = 0
    known = metres[valid_depth(metres, np.inf)]
    if known.size and known.max() >= maximum:
        low, high = float(known.min()), float(known.max())
        if low >= maximum or (high > _FARTHEST_WHOLE and np.array_equal(known, np.rint(known))):
            raise ValueError(
                f"depths of {low:g} to {high:g} m, but valid depth is below config.dataset.depth_max={maximum:g} m; if "
                "these are millimetres, divide them by 1000; if they are metres, set --config.dataset.depth_max"
            )
    return _in_range(metres, maximum=maximum)


def _in_range(label: np.ndarray, *, maximum: float) -> np.ndarray:
    valid = valid_depth(label, maximum)
    return label if valid.all() else np.where(valid, label, np.float32(0))


def _prediction(numbers: np.ndarray) -> np.ndarray:
    if numbers.dtype.itemsize == 1:
        raise ValueError("has 8 bits per pixel; save depth as .npy in metres, or as 16-bit PNG in millimetres")
    metres = single(numbers).astype(np.float32)
    return conversions.one_channel(metres if numbers.dtype.kind == "f" else metres / np.float32(1000))


def _limits(metres: np.ndarray) -> Range:
    """0.5 and 99.5 percentiles of the depths, so that outliers do not compress the colour range."""
    if not metres.size:
        return 0.0, 1.0
    low, high = (float(limit) for limit in np.percentile(metres, (0.5, 99.5)))
    return (low, high) if high - low > 0.01 else (low, low + 0.01)


@functools.cache
def _colours(name: str) -> np.ndarray:
    import matplotlib  # imported lazily: slow, and only drawing needs it

    return np.round(matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _colour(colours: str, drawn: Drawn) -> np.ndarray:
    low, high = drawn.limits
    values = np.where(drawn.valid, drawn.values, low)
    place = np.clip((values - low) / (high - low), 0, 1)
    return _colours(colours)[np.round(place * 255).astype(np.uint8)]


def _key(colours: str, unit: str, drawn: Drawn, width: int) -> Image.Image:
    return canvas.bar(_colours(colours), bar_labels(drawn.limits, unit), width)


def bar_labels(limits: Range, unit: str = "m") -> list[str]:
    """Labels of the colour bar: five values evenly spaced over the range."""
    low, high = limits
    digits = 1 if high - low >= 1 else 2
    return [f"{value:.{digits}f} {unit}" for value in np.linspace(low, high, 5)]


def _count(label: np.ndarray, *, step: float) -> Counts:
    valid = label[label != DEPTH_IGNORE]
    if not valid.size:
        return Counts(label.size)
    steps = (valid / np.float32(step)).astype(np.int64)
    return Counts(label.size, valid.size, np.bincount(steps), float(valid.min()), float(valid.max()))


def _quantities(unit: str) -> tuple[str, str, str]:
    return f"least ({unit})", f"median ({unit})", f"greatest ({unit})"


def _figures(unit: str, counts: Counts, *, step: float) -> dict[str, Any]:
    names = _quantities(unit)
    figures: dict[str, Any] = {"invalid": counts.invalid, **dict.fromkeys(names)}
    if counts.valid:
        middle = int(np.searchsorted(np.cumsum(counts.histogram), counts.valid / 2))
        values = counts.lowest, (middle + 0.5) * step, counts.highest
        figures |= dict(zip(names, values, strict=True))
    return figures
