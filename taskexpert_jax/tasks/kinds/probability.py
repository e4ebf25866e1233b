"""Probabilities: masks, boundaries, and shares in [0, 1] such as shading."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas, conversions
from taskexpert_jax.tasks.canvas import Drawn
from taskexpert_jax.tasks.kinds.kind import (
    Counts,
    Kind,
    bilinear,
    count_bytes,
    count_range,
    range_figures,
    range_quantities,
    share,
    single,
)
from taskexpert_jax.tasks.losses import IGNORE

UNKNOWN = 128  # grey value of a mask's unlabelled pixels
SHARE_IGNORE = -1.0


class _Logits(NamedTuple):
    values: Callable[[jax.Array], jax.Array]
    from_values: Callable[[np.ndarray], np.ndarray]
    to_mean: Callable[[jax.Array], jax.Array]
    from_mean: Callable[[jax.Array], jax.Array]


_LOGITS: Mapping[int, _Logits] = {
    1: _Logits(
        lambda logits: jax.nn.sigmoid(logits[..., 0]), conversions.logit, conversions.no_and_yes, conversions.log_odds
    ),
    2: _Logits(
        lambda logits: jax.nn.softmax(logits, axis=-1)[..., 1],
        conversions.logit_pair,
        conversions.softmax,
        conversions.log,
    ),
}


def probability(*, logits: int = 1, shares: bool = False) -> Kind:
    """Kind of probabilities, one number in [0, 1] per pixel.

    logits: channels of the prediction: 1 (sigmoid), or 2 (softmax over background and foreground).
    shares: True: labels are any numbers in [0, 1], float16 with -1 = ignored. False: labels are 0 or 1, uint8 with
      255 = ignored.
    """
    ignore = SHARE_IGNORE if shares else IGNORE
    return Kind(
        name="probability",
        categorical=True,
        channels=logits,
        label_channels=1,
        label_dtype="float16" if shares else "uint8",
        ignore=ignore,
        **_LOGITS[logits]._asdict(),
        read_label=_label_of_shares if shares else _label,
        label_form="a grey or palette PNG, or as such an array",
        array_form="probabilities in [0, 1], (H, W) float32",
        read_prediction=functools.partial(_prediction, _LOGITS[logits].from_values),
        resize=bilinear,
        colour=_colour,
        key=_key,
        caption="White is 1, black is 0; dark blue is unlabelled.",
        count=functools.partial(count_range if shares else count_bytes, ignore=ignore),
        figures=functools.partial(range_figures, unit="") if shares else _figures,
        quantities=range_quantities("") if shares else (),
        bounds=(0, 1),
        invalid=canvas.INVALID_GREY,
        faintest=1.5 / 255,
    )


def _label(numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    """Mask from file values: 0 and 255, or 0 and 1 -> 0 and 1; 128 -> the ignore value."""
    del zero_is_void
    yes, unknown = (numbers == 1) | (numbers == 255), numbers == UNKNOWN
    if not (yes | unknown | (numbers == 0)).all() or ((numbers == 1).any() and (numbers == 255).any()):
        present = ", ".join(str(value) for value in np.unique(numbers)[:6])
        raise ValueError(f"holds {present}; a mask holds 0 and 255, or 0 and 1, and {UNKNOWN} where unlabelled")
    return np.where(unknown, IGNORE, yes)


def _label_of_shares(numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    """Shares from unsigned integers, divided by their maximum, or from numbers in [0, 1]; NaN and Inf are ignored."""
    del zero_is_void
    found = numbers / np.iinfo(numbers.dtype).max if numbers.dtype.kind == "u" else numbers
    known = np.isfinite(found)
    if not ((found[known] >= 0) & (found[known] <= 1)).all():
        raise ValueError("holds numbers outside of [0, 1]; divide them by the largest possible value")
    return np.where(known, found, SHARE_IGNORE)


def shares(numbers: np.ndarray) -> np.ndarray:
    """Probabilities (h, w) float32 of the numbers (h, w, 1) of a prediction file; 255 or 65535 in integers is 1.

    Raises:
      ValueError: the numbers are no probabilities.
    """
    found = single(numbers)
    if found.dtype in (np.uint8, np.uint16):
        found = found / np.iinfo(found.dtype).max
    if found.min() < 0 or found.max() > 1:
        raise ValueError(f"holds numbers from {found.min():g} to {found.max():g}; a probability is in [0, 1]")
    return found.astype(np.float32)


def _prediction(from_values: Callable[[np.ndarray], np.ndarray], numbers: np.ndarray) -> np.ndarray:
    return from_values(shares(numbers))


def _colour(drawn: Drawn) -> np.ndarray:
    return canvas.grey(np.where(drawn.valid, drawn.values, 0), drawn.limits)


def _key(drawn: Drawn, width: int) -> Image.Image:
    del drawn
    return canvas.bar(canvas.grey(np.linspace(0, 1, 256), (0, 1)), ["0", "0.5", "1"], width)


def _figures(counts: Counts) -> dict[str, Any]:
    return {"ignored": counts.invalid, "positive": share(counts.histogram[1:].sum(), counts.valid)}
