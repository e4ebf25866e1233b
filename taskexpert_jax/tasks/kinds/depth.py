"""Depth maps in metres."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas, conversions
from taskexpert_jax.tasks.canvas import Drawn, Range
from taskexpert_jax.tasks.kinds.kind import Counts, Kind, bilinear, single
from taskexpert_jax.tasks.losses import DEPTH_IGNORE

FARTHEST = 1000.0  # metres; if every depth is larger, the file is not in metres
_STEP = 0.01  # metres; precision of the median depth
_QUANTITIES = ("least (m)", "median (m)", "greatest (m)")


def depth() -> Kind:
    """Kind of depth maps, predicted in metres; negative predictions become 0."""
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
        read_label=_label,
        label_form="a grey or palette PNG, or as such an array",
        read_prediction=_prediction,
        resize=bilinear,
        limits=_limits,
        colour=_colour,
        key=_key,
        caption="Near is red, far is blue, over the range of the ground truth; black has no depth.",
        count=_count,
        figures=_figures,
        quantities=_QUANTITIES,
        smooth=False,
    )


def _values(prediction: jax.Array) -> jax.Array:
    return jnp.maximum(prediction[..., 0], 0.0)


def _label(numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    """Integer millimetres or floating-point metres -> metres, 0 where unknown."""
    del zero_is_void
    if numbers.dtype.itemsize == 1:
        raise ValueError("has 8 bits per pixel; save depth as 16-bit PNG in millimetres, or as .npy in metres")
    metres = numbers.astype(np.float32)
    if numbers.dtype.kind in "iu":
        metres *= np.float32(0.001)
    known = np.isfinite(metres) & (metres > 0)
    if known.any() and metres[known].min() > FARTHEST:
        raise ValueError(f"every depth is beyond {FARTHEST:.0f} m; floating-point depth must be in metres")
    return np.where(known, metres, 0)


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
def _colours() -> np.ndarray:
    import matplotlib  # imported lazily: slow, and only drawing needs it

    return np.round(matplotlib.colormaps["turbo_r"](np.arange(256))[:, :3] * 255).astype(np.uint8)


def _colour(drawn: Drawn) -> np.ndarray:
    low, high = drawn.limits
    metres = np.where(drawn.valid, drawn.values, low)
    place = np.clip((metres - low) / (high - low), 0, 1)
    return _colours()[np.round(place * 255).astype(np.uint8)]


def _key(drawn: Drawn, width: int) -> Image.Image:
    return canvas.bar(_colours(), bar_labels(drawn.limits), width)


def bar_labels(limits: Range) -> list[str]:
    """Labels of the colour bar: five depths evenly spaced over the range."""
    low, high = limits
    digits = 1 if high - low >= 1 else 2
    return [f"{metres:.{digits}f} m" for metres in np.linspace(low, high, 5)]


def _count(label: np.ndarray) -> Counts:
    valid = label[label != DEPTH_IGNORE]
    if not valid.size:
        return Counts(label.size)
    steps = np.minimum(valid / np.float32(_STEP), FARTHEST / _STEP).astype(np.int64)
    return Counts(label.size, valid.size, np.bincount(steps), float(valid.min()), float(valid.max()))


def _figures(counts: Counts) -> dict[str, Any]:
    figures: dict[str, Any] = {"invalid": counts.invalid, **dict.fromkeys(_QUANTITIES)}
    if counts.valid:
        middle = int(np.searchsorted(np.cumsum(counts.histogram), counts.valid / 2))
        metres = counts.lowest, (middle + 0.5) * _STEP, counts.highest
        figures |= dict(zip(_QUANTITIES, metres, strict=True))
    return figures
