"""Mean intersection over union (mIoU) for semantic segmentation and human parts."""

import functools
import math
from typing import Any, ClassVar

import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.tasks.losses import valid_pixels
from taskexpert_jax.tasks.metrics.sums import Count, PooledMetric, histogram, ratio


@flax.struct.dataclass
class MeanIoU(PooledMetric):
    """Mean IoU, pooled over the pixels of the set; `mean_iou` gives the metric for a number of classes.

    confusion: (num_classes, num_classes) confusion matrix: pixels by label (row) and prediction (column).
    """

    num_classes: ClassVar[int]
    confusion: Count

    @classmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """State of a batch. The predicted class is the argmax of the logits, the first one on ties.

        prediction (B, H, W, num_classes) logits, label (B, H, W, 1) in 0..num_classes-1 or 255 = ignored.
        """
        if prediction.shape[-1] != cls.num_classes:
            raise ValueError(f"prediction has {prediction.shape[-1]} channels, but there are {cls.num_classes} classes")
        predicted = largest_class(prediction)
        cell = label[..., 0].astype(jnp.int32) * cls.num_classes + predicted
        cells = cls.num_classes**2
        counts = histogram(jnp.where(valid_pixels(label, mask), cell, cells), cells)
        return {"confusion": Count.of(counts.reshape(cls.num_classes, cls.num_classes))}

    @classmethod
    def zeros(cls) -> dict[str, Any]:
        return {"confusion": Count.zeros((cls.num_classes, cls.num_classes))}

    def per_class(self) -> np.ndarray:
        """IoU of each class in percent, (num_classes,) float64; 0 for a class neither labelled nor predicted."""
        confusion = self.confusion.value().astype(np.float64)
        intersection = np.diagonal(confusion)
        union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
        return 100 * intersection / np.maximum(union, 1)

    def values(self) -> dict[str, float]:
        """`mIoU`, the mean of per_class() over all classes, absent ones included, and `pixel_accuracy`; in percent."""
        confusion = self.confusion.value()
        accuracy = 100 * ratio(np.trace(confusion), confusion.sum())
        return {"mIoU": float(self.per_class().mean()) if confusion.any() else math.nan, "pixel_accuracy": accuracy}

    def of_one_image(self, name: str) -> float:
        """Value for ranking an image; `mIoU` averages only the classes labelled or predicted in it, NaN if none."""
        value = super().of_one_image(name)
        if name != "mIoU" or math.isnan(value):
            return value
        confusion = self.confusion.value()
        seen = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
        return float(self.per_class()[seen].mean())


def largest_class(logits: Array) -> Array:
    """Argmax over the classes, the first one on ties; (..., classes) -> (...) int32."""
    return jax.lax.platform_dependent(logits, cpu=_largest_by_comparing, default=_largest)


def _largest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _largest_by_comparing(logits: Array) -> Array:
    """Argmax by a loop over the classes: beyond about 30 classes, XLA's reduction takes eight times as long on CPUs."""
    largest, index = logits[..., 0], jnp.zeros(logits.shape[:-1], jnp.int32)
    for k in range(1, logits.shape[-1]):
        index = jnp.where(logits[..., k] > largest, k, index)
        largest = jnp.maximum(largest, logits[..., k])
    return index


@functools.cache
def mean_iou(num_classes: int) -> type[MeanIoU]:
    """Metric over the classes 0..num_classes-1; cached: equal numbers give the same class."""
    members = {"__module__": __name__, "__doc__": MeanIoU.__doc__, "num_classes": num_classes}
    return flax.struct.dataclass(type(f"MeanIoU{num_classes}", (MeanIoU,), members))
