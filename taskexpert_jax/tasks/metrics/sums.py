"""Exact pixel counts and compensated sums over a whole data set, the accumulators of metrics.

float32 cannot count beyond 2^24, the pixels of 64 images of 512x512; int32 overflows at 2^31, 8192 such images; and
64-bit types are off by default in JAX and slow on TPUs. A count is therefore two 32-bit integers, and a sum of errors
a pair of float32: the sum and its rounding error.
"""

import abc
import math
import operator
from typing import Any, Self

from clu import metrics
import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Count:
    """64-bit unsigned integers, high * 2^32 + low; both fields are uint32 and have the shape of the counts."""

    low: Array
    high: Array

    @classmethod
    def of(cls, counts: Array) -> Self:
        """Count from integers of one batch, each below 2^32."""
        return cls(low=counts.astype(jnp.uint32), high=jnp.zeros(counts.shape, jnp.uint32))

    @classmethod
    def of_pixels(cls, pixels: Array) -> Self:
        """Number of true pixels in (B, H, W) bool."""
        return cls.of(jnp.sum(pixels, dtype=jnp.uint32))

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        # Two separate arrays: steps donate their state, and a buffer can be donated only once.
        return cls(low=jnp.zeros(shape, jnp.uint32), high=jnp.zeros(shape, jnp.uint32))

    def __add__(self, other: "Count") -> "Count":
        low = jnp.add(self.low, other.low)  # modulo 2^32
        carry = (low < self.low).astype(jnp.uint32)
        return Count(low=low, high=jnp.add(self.high, other.high) + carry)

    def value(self) -> np.ndarray:
        """Counts on the host, as uint64 of the same shape."""
        return (np.asarray(self.high).astype(np.uint64) << np.uint64(32)) + np.asarray(self.low)


@flax.struct.dataclass
class Sum:
    """Compensated sum of float32 values: `total` and its accumulated rounding `error`, float32 scalars.

    Merging any number of sums is exact to about 48 bits; the sum of one batch has a relative error of about 1e-8.
    """

    total: Array
    error: Array

    @classmethod
    def of(cls, values: Array, valid: Array) -> Self:
        """Sum of the values where `valid`, both (B, H, W); the other values may be NaN."""
        # Rows in plain float32, (B, H): compensated sums over pixels double the compilation time for a gain of 1e-9.
        total = jnp.sum(jnp.where(valid, values.astype(jnp.float32), 0.0), axis=2)
        error = jnp.zeros_like(total)
        for axis in (1, 0):  # images last: they may be on several devices, which then exchange one sum per image
            total, error = _add_up(total, error, axis)
        return cls(total=total.reshape(()), error=error.reshape(()))

    @classmethod
    def zeros(cls) -> Self:
        return cls(total=jnp.zeros((), jnp.float32), error=jnp.zeros((), jnp.float32))

    def __add__(self, other: "Sum") -> "Sum":
        total, error = _add(self.total, self.error, other.total, other.error)
        return Sum(total=total, error=error)

    def value(self) -> float:
        """Sum on the host, in float64; NaN if any value was NaN or Inf."""
        return float(np.float64(self.total) + np.float64(self.error))


@flax.struct.dataclass
class PooledMetric(metrics.Metric, abc.ABC):
    """Metric whose fields are `Count`s and `Sum`s over pixels; states are merged by adding their fields.

    A subclass names its fields and implements `sums`, `zeros` and `values`.

    nonfinite: number of examples whose prediction has a NaN or Inf at any pixel, with a label or without. A single one
        makes every value NaN: the metrics alone would take NaN logits for class 0, or a NaN normal for 90 degrees.
    """

    nonfinite: Count

    @classmethod
    def from_model_output(cls, *, prediction: Array, label: Array, mask: Array | None = None) -> Self:
        """State of a batch; prediction (B, H, W, c), label (B, H, W, c_label), mask (B,) or None."""
        broken = nonfinite_examples(prediction)
        if mask is not None:
            broken &= mask > 0
        return cls(nonfinite=Count.of(jnp.sum(broken, dtype=jnp.uint32)), **cls.sums(prediction, label, mask))

    @classmethod
    def empty(cls) -> Self:
        """State of no data."""
        return cls(nonfinite=Count.zeros(), **cls.zeros())

    # clu annotates merge() with its base class and compute() with a single array; hence the two exceptions.
    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """State of both data."""
        return jax.tree.map(operator.add, self, other, is_leaf=lambda node: isinstance(node, Count | Sum))

    def compute(self) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`values`, from a state on the host or on devices; all NaN if any prediction is NaN or Inf."""
        values = self.values()
        return dict.fromkeys(values, math.nan) if self.nonfinite.value() else values

    @classmethod
    @abc.abstractmethod
    def sums(cls, prediction: Array, label: Array, mask: Array | None) -> dict[str, Any]:
        """The fields of the state of a batch, without `nonfinite`; arguments as for `from_model_output`."""

    @classmethod
    @abc.abstractmethod
    def zeros(cls) -> dict[str, Any]:
        """The fields of the state of no data, without `nonfinite`."""

    @abc.abstractmethod
    def values(self) -> dict[str, float]:
        """Values of the metric by name, computed in float64 NumPy; NaN without any valid pixel."""

    def of_one_image(self, name: str) -> float:
        """Value `name` of the state of a single image, used to rank images."""
        return self.compute()[name]


def nonfinite_examples(prediction: Array) -> Array:
    """True for each example whose prediction has a NaN or Inf: (B, H, W, c) -> (B,) bool."""
    return ~jnp.isfinite(prediction).all(axis=(1, 2, 3))


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator; NaN if the denominator is 0, i.e. without valid pixels."""
    return float(numerator) / float(denominator) if denominator else math.nan


def histogram(index: Array, bins: int) -> Array:
    """Histogram of the indices of a batch, (bins,) uint32.

    index (B, H, W) int32 in 0..bins; pixels with the index `bins` are not counted.
    """
    # One histogram per image first, so that devices exchange histograms and not pixels.
    per_image = jax.lax.platform_dependent(
        index.reshape(index.shape[0], -1),
        tpu=lambda pixels: _histogram_by_product(pixels, bins),
        default=lambda pixels: _histogram_by_scatter(pixels, bins),
    )
    return jnp.sum(per_image, axis=0, dtype=jnp.uint32)


def _histogram_by_scatter(index: Array, bins: int) -> Array:
    """Scatter-add, (B, pixels) -> (B, bins): a hundred times faster on CPUs than comparing with every bin."""
    zeros = jnp.zeros(bins, jnp.uint32)
    return jax.vmap(lambda image: zeros.at[image].add(jnp.uint32(1), mode="drop"))(index)


def _histogram_by_product(index: Array, bins: int) -> Array:
    """Matmul of one-hot matrices, (B, pixels) -> (B, bins), for TPUs, on which scatters are sequential.

    The index is split into two digits, so that both matrices have only about sqrt(bins) columns. Counts are exact up to
    2^24 pixels per image: 0 and 1 are exact in bfloat16, and the sums are float32.
    """
    base = math.isqrt(bins - 1) + 1  # smallest base with base^2 >= bins
    tens = jax.nn.one_hot(index // base, base, dtype=jnp.bfloat16)  # all zeros for the index base^2
    ones = jax.nn.one_hot(index % base, base, dtype=jnp.bfloat16)
    counts = jnp.einsum("bpt,bpo->bto", tens, ones, preferred_element_type=jnp.float32)
    return counts.reshape(index.shape[0], base * base)[:, :bins].astype(jnp.uint32)


def _add(total: Array, error: Array, other_total: Array, other_error: Array) -> tuple[Array, Array]:
    """Adds two compensated sums; the rounding error of total + other_total is computed exactly (Knuth's two-sum)."""
    rough = jnp.add(total, other_total)
    part = rough - total
    error = jnp.add(error, other_error) + ((total - (rough - part)) + (other_total - part))
    # Normalised, so that the error stays below the last bit of the total, for any number of additions.
    result = rough + error
    return result, error - (result - rough)


def _add_up(total: Array, error: Array, axis: int) -> tuple[Array, Array]:
    """Pairwise reduction of compensated sums along an axis, to length 1."""
    while (length := total.shape[axis]) > 1:
        half = (length + 1) // 2
        first = [jax.lax.slice_in_dim(part, 0, half, axis=axis) for part in (total, error)]
        second = [jax.lax.slice_in_dim(part, half, length, axis=axis) for part in (total, error)]
        if length % 2:
            widths = [(0, int(dim == axis)) for dim in range(total.ndim)]
            second = [jnp.pad(part, widths) for part in second]
        total, error = _add(*first, *second)
    return total, error
