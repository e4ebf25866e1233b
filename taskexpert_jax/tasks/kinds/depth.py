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
from taskexpert_jax.tasks.losses import DEPTH_IGNORE, DEPTH_MAX, valid_depth

_FARTHEST_WHOLE = 1000.0  # metres; whole numbers beyond it are millimetres
_NO_DEPTH = 65535  # the largest 16-bit number: a usual mark for pixels without depth
_STEPS = 8_000  # of the histogram up to the largest valid depth: a centimetre at 80 m
_QUANTITIES = ("least (m)", "median (m)", "greatest (m)")


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
        colour=_colour,
        key=_key,
        caption="Near is red, far is blue, over the range of the ground truth; black has no depth.",
        count=functools.partial(_count, step=maximum / _STEPS),
        figures=functools.partial(_figures, step=maximum / _STEPS),
        quantities=_QUANTITIES,
        unit="m",
        bounds=(0, None),
        smooth=False,
    )


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


def _count(label: np.ndarray, *, step: float) -> Counts:
    valid = label[label != DEPTH_IGNORE]
    if not valid.size:
        return Counts(label.size)
    steps = (valid / np.float32(step)).astype(np.int64)
    return Counts(label.size, valid.size, np.bincount(steps), float(valid.min()), float(valid.max()))


def _figures(counts: Counts, *, step: float) -> dict[str, Any]:
    figures: dict[str, Any] = {"invalid": counts.invalid, **dict.fromkeys(_QUANTITIES)}
    if counts.valid:
        middle = int(np.searchsorted(np.cumsum(counts.histogram), counts.valid / 2))
        metres = counts.lowest, (middle + 0.5) * step, counts.highest
        figures |= dict(zip(_QUANTITIES, metres, strict=True))
    return figures
