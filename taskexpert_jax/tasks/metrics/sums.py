"""What metrics are made of: exact pixel counts and sums of errors over a whole data set.

Adding ones, float32 stops at 2^24, the pixels of 64 images of 512x512; int32 overflows at 2^31, 8192 such images; and
JAX has no 64-bit numbers unless told to, nor have TPUs fast ones. So a count is two 32-bit integers, and a sum of
errors is a float32 with a second one for what rounding takes from the first.
"""

import abc
import math
import operator
from typing import Self

from clu import metrics
import flax.struct
import jax
from jax import Array
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Count:
    """Integers from 0 to 2^64 - 1, equal to high * 2^32 + low; both fields are uint32 and have the counts' shape."""

    low: Array
    high: Array

    @classmethod
    def of(cls, counts: Array) -> Self:
        """Integer counts of one batch, each below 2^32."""
        return cls(low=counts.astype(jnp.uint32), high=jnp.zeros(counts.shape, jnp.uint32))

    @classmethod
    def of_pixels(cls, pixels: Array) -> Self:
        """How many pixels of the batch, (B, H, W) bool, are true."""
        return cls.of(jnp.sum(pixels, dtype=jnp.uint32))

    @classmethod
    def zeros(cls, shape: tuple[int, ...] = ()) -> Self:
        # Two arrays and not one twice: steps donate their state, and a buffer can be donated once.
        return cls(low=jnp.zeros(shape, jnp.uint32), high=jnp.zeros(shape, jnp.uint32))

    def __add__(self, other: "Count") -> "Count":
        low = jnp.add(self.low, other.low)  # modulo 2^32
        carry = (low < self.low).astype(jnp.uint32)
        return Count(low=low, high=jnp.add(self.high, other.high) + carry)

    def value(self) -> np.ndarray:
        """The counts on the host: uint64, of their shape."""
        return (np.asarray(self.high).astype(np.uint64) << np.uint64(32)) + np.asarray(self.low)


@flax.struct.dataclass
class Sum:
    """A sum of float32 values, in float32 scalars: `total`, and `error`, what rounding took from it.

    To merge sums loses nothing above their 48th bit, however many; the sum of one batch is right to about 1e-8.
    """

    total: Array
    error: Array

    @classmethod
    def of(cls, values: Array, valid: Array) -> Self:
        """The sum of the batch's values where `valid`, both (B, H, W); other pixels may hold anything, even nan."""
        # Each row in float32, (B, H): summing single pixels in two numbers doubles the time to compile and gains 1e-9.
        total = jnp.sum(jnp.where(valid, values.astype(jnp.float32), 0.0), axis=2)
        error = jnp.zeros_like(total)
        for axis in (1, 0):  # images last: they may lie on several devices, and by then there is one sum an image
            total, error = _add_up(total, error, axis)
        return cls(total=total.reshape(()), error=error.reshape(()))

    @classmethod
    def zeros(cls) -> Self:
        return cls(total=jnp.zeros((), jnp.float32), error=jnp.zeros((), jnp.float32))

    def __add__(self, other: "Sum") -> "Sum":
        total, error = _add(self.total, self.error, other.total, other.error)
        return Sum(total=total, error=error)

    def value(self) -> float:
        """The sum on the host, in float64; nan if a value was not finite."""
        return float(np.float64(self.total) + np.float64(self.error))


class PooledMetric(metrics.Metric, abc.ABC):
    """A metric whose fields are counts and sums over pixels: two states are merged by adding their fields."""

    # clu types merge() for any metric and compute() for those whose result is one array; hence the two exceptions.
    def merge(self, other: Self) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        return jax.tree.map(operator.add, self, other, is_leaf=lambda node: isinstance(node, Count | Sum))

    @abc.abstractmethod
    def compute(self) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The metric's values by name; of a state on the host or on devices, in float64 NumPy."""

    def of_one_image(self, name: str) -> float:
        """The value `name` to rank images by, of the state of a single one."""
        return self.compute()[name]


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator; nan where the denominator is 0, that is, where nothing was measured."""
    return float(numerator) / float(denominator) if denominator else math.nan


def histogram(index: Array, bins: int) -> Array:
    """How many pixels of the batch have each index, (bins,) uint32.

    index (B, H, W) int32 in 0..bins; `bins` itself marks a pixel that is not counted.
    """
    # An image first has a histogram of its own, so that images on several devices need not be brought together.
    per_image = jax.lax.platform_dependent(
        index.reshape(index.shape[0], -1),
        tpu=lambda pixels: _histogram_by_product(pixels, bins),
        default=lambda pixels: _histogram_by_scatter(pixels, bins),
    )
    return jnp.sum(per_image, axis=0, dtype=jnp.uint32)


def _histogram_by_scatter(index: Array, bins: int) -> Array:
    """(B, pixels) -> (B, bins): adds 1 at each index. A hundred times faster on CPU than comparing with every bin."""
    zeros = jnp.zeros(bins, jnp.uint32)
    return jax.vmap(lambda image: zeros.at[image].add(jnp.uint32(1), mode="drop"))(index)


def _histogram_by_product(index: Array, bins: int) -> Array:
    """(B, pixels) -> (B, bins): a product of one-hot matrices, for TPUs, which scatter one element after the other.

    The index is written in two digits, so that both matrices have only about sqrt(bins) columns. 0 and 1 are exact in
    bfloat16, and so are their float32 sums up to 2^24 pixels an image.
    """
    base = math.isqrt(bins - 1) + 1  # the smallest with base^2 >= bins
    tens = jax.nn.one_hot(index // base, base, dtype=jnp.bfloat16)  # all zeros for the index base^2
    ones = jax.nn.one_hot(index % base, base, dtype=jnp.bfloat16)
    counts = jnp.einsum("bpt,bpo->bto", tens, ones, preferred_element_type=jnp.float32)
    return counts.reshape(index.shape[0], base * base)[:, :bins].astype(jnp.uint32)


def _add(total: Array, error: Array, other_total: Array, other_error: Array) -> tuple[Array, Array]:
    """Adds two sums. What float32 rounds off total + other_total is a float32 itself (Knuth's two-sum)."""
    rough = jnp.add(total, other_total)
    part = rough - total
    error = jnp.add(error, other_error) + ((total - (rough - part)) + (other_total - part))
    # Normalised, so that the error stays below the last digit of the total however many sums are added.
    result = rough + error
    return result, error - (result - rough)


def _add_up(total: Array, error: Array, axis: int) -> tuple[Array, Array]:
    """Adds the sums along an axis, which gets length 1: the second half to the first, again and again."""
    while (length := total.shape[axis]) > 1:
        half = (length + 1) // 2
        first = [jax.lax.slice_in_dim(part, 0, half, axis=axis) for part in (total, error)]
        second = [jax.lax.slice_in_dim(part, half, length, axis=axis) for part in (total, error)]
        if length % 2:
            widths = [(0, int(dim == axis)) for dim in range(total.ndim)]
            second = [jnp.pad(part, widths) for part in second]
        total, error = _add(*first, *second)
    return total, error
