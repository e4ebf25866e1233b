"""Class maps: integer class ids from 0, with 255 for unlabelled pixels."""

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np
from PIL import Image

from taskexpert_jax.tasks import canvas, conversions
from taskexpert_jax.tasks.canvas import Drawn
from taskexpert_jax.tasks.kinds.kind import Counts, Kind, count_bytes, nearest, share, single
from taskexpert_jax.tasks.losses import IGNORE

UNNAMED = tuple(str(index) for index in range(255))  # class names for a data set without any


def classes(class_names: Sequence[str]) -> Kind:
    """Kind of class maps, predicted as one logit per class.

    class_names: 2 to 255 names, in the order of the class ids.
    """
    names = tuple(class_names)
    return Kind(
        name="classes",
        categorical=True,
        channels=len(names),
        label_channels=1,
        label_dtype="uint8",
        ignore=IGNORE,
        values=conversions.class_ids,
        from_values=conversions.one_hot(len(names)),
        to_mean=conversions.softmax,
        from_mean=conversions.log,
        read_label=functools.partial(_label, len(names)),
        label_form="a grey or palette PNG, or as such an array",
        array_form="class ids, (H, W) uint8",
        read_prediction=functools.partial(_prediction, len(names)),
        resize=nearest,
        colour=functools.partial(_colour, names),
        key=functools.partial(_key, names),
        caption="Colours as in the list of classes; black is unlabelled.",
        count=functools.partial(count_bytes, ignore=IGNORE),
        figures=functools.partial(_figures, names),
        bounds=(0, len(names) - 1),
        class_names=names,
        palettes=True,
        smooth=False,
        jpeg=False,
    )


def _label(count: int, numbers: np.ndarray, zero_is_void: bool) -> np.ndarray:
    if numbers.dtype.kind == "f":
        raise ValueError("holds floating-point numbers; class ids are integers")
    first = int(zero_is_void)
    unlabelled = (numbers == IGNORE) | (numbers < first)
    wrong = (numbers < 0) | ~(unlabelled | (numbers < first + count))
    if wrong.any():
        raise ValueError(
            f"holds {numbers[wrong][0]}, but with {count} classes a label holds {first} to {first + count - 1}, and "
            f"{'0 or ' * zero_is_void}255 where unlabelled; fix the file, the class names or dataset.zero_is_void"
        )
    return np.where(unlabelled, IGNORE, numbers.astype(np.int64) - first)


def _prediction(count: int, numbers: np.ndarray) -> np.ndarray:
    """Prediction from integer class ids, or from floating-point logits of all classes."""
    if numbers.dtype.kind == "f":
        if numbers.shape[2] != count:
            raise ValueError(f"holds floating-point numbers; give integer class ids, or logits of all {count} classes")
        return numbers
    ids = single(numbers)
    if ids.min() < 0 or ids.max() >= count:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"holds {wrong}, but the ids of the {count} classes are 0 to {count - 1}, and a prediction has no void"
        )
    return conversions.one_hot(count)(ids)


def _colours(names: tuple[str, ...]) -> np.ndarray:
    colours = canvas.palette(len(names)).copy()
    colours[[name == "background" for name in names]] = canvas.BACKGROUND
    return colours


def _colour(names: tuple[str, ...], drawn: Drawn) -> np.ndarray:
    return _colours(names)[np.where(drawn.valid, drawn.values, 0).astype(np.intp)]


def _key(names: tuple[str, ...], drawn: Drawn, width: int) -> Image.Image:
    """Legend of the classes that are present."""
    colours = _colours(names)
    present = np.unique(drawn.values[drawn.valid]).astype(int)
    entries = [(names[index], tuple(colours[index].tolist())) for index in present]
    if not drawn.valid.all():
        entries.append(("unlabelled", canvas.INVALID))
    return canvas.legend(entries, width)


def _figures(names: tuple[str, ...], counts: Counts) -> dict[str, Any]:
    """Share of each class among the valid pixels; unnamed classes only up to the last that occurs."""
    pixels = np.zeros(256, np.int64)
    pixels[: len(counts.histogram)] = counts.histogram
    shown = names[: len(counts.histogram)] if names == UNNAMED else names
    shares = {name: share(pixels[index], counts.valid) for index, name in enumerate(shown)}
    return {"ignored": counts.invalid, **shares}
