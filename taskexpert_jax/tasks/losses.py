"""Training losses of the dense tasks: means over the valid pixels of the batch, in float32.

Every loss is called as `loss(prediction, label, mask)`:
    prediction  (B, H, W, c) raw model output; logits for classification tasks
    label       (B, H, W, c_label) of any dtype, with its ignore value where there is no ground truth
    mask        (B,), 0 for padding examples, whose pixels are ignored; None when there are none
and returns a float32 scalar. Without any valid pixel the loss and its gradient are 0.

Definitions: those shared by ATRC, InvPT, TaskPrompter and MLoRE ("the family").
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

Loss = Callable[..., Array]  # (prediction, label, mask=None) -> float32 scalar

IGNORE = 255  # ignore value of classes, masks and normals
DEPTH_IGNORE = -1
DEPTH_MAX = 80.0  # metres; in the family's metric, depths of this size and more are invalid
DISPARITY_MAX = 256.0  # pixels; Cityscapes' files hold smaller ones
VECTOR_IGNORE = -65504.0  # ignore value of vectors of any length: the lowest finite float16
SHORTEST_VECTOR = 1e-12  # shorter vectors are treated as zero


def cross_entropy(prediction: Array, label: Array, mask: Array | None = None) -> Array:
    """Cross entropy over c classes, divided by the number of valid pixels.

    prediction (B, H, W, c) logits, label (B, H, W, 1) in 0..c-1 or 255 = ignored.
    """
    pixels = _cross_entropy_map(prediction.astype(jnp.float32), label[..., 0].astype(jnp.int32))
    return _mean(pixels, valid_pixels(label, mask))


def balanced_cross_entropy(prediction: Array, label: Array, mask: Array | None = None) -> Array:
    """Class-balanced two-class cross entropy: each class is weighted by the batch frequency of the other.

    With q = valid negatives / valid pixels, positives weigh q and negatives 1 - q; the weighted sum is divided by the
    number of valid pixels. A batch with a single class therefore has loss 0.
    prediction (B, H, W, 2) logits, label (B, H, W, 1) 0 or 1, 255 = ignored.
    """
    valid = valid_pixels(label, mask)
    positive = label[..., 0] == 1
    negatives = _number(valid & ~positive) / jnp.maximum(_number(valid), 1.0)
    weight = jnp.where(positive, negatives, 1.0 - negatives)
    margin = prediction[..., 1].astype(jnp.float32) - prediction[..., 0].astype(jnp.float32)
    return _mean(weight * jax.nn.softplus(jnp.where(positive, -margin, margin)), valid)


@functools.cache
def edge_cross_entropy(pos_weight: float) -> Loss:
    """Boundary loss for a weight of the positives (0.95 in the family): the mean of `edge_cross_entropy_map`.

    Cached: equal weights give the same function.
    prediction (B, H, W, 1) logit, label (B, H, W, 1) 0 or 1, 255 = ignored.
    """

    def loss(prediction: Array, label: Array, mask: Array | None = None) -> Array:
        return _mean(edge_cross_entropy_map(prediction, label, pos_weight), valid_pixels(label, mask))

    return loss


def edge_cross_entropy_map(prediction: Array, label: Array, pos_weight: float) -> Array:
    """Weighted binary cross entropy of each pixel, (B, H, W): positives weigh p = `pos_weight`, negatives 1 - p.

    The family's equivalent form, with f = 1 / (1 - p): positives weigh p * f, negatives 1, the mean is divided by f.
    Values at ignored pixels are undefined.
    """
    positive = label[..., 0] == 1
    logit = prediction[..., 0].astype(jnp.float32)
    weight = jnp.where(positive, pos_weight, 1.0 - pos_weight)
    return weight * jax.nn.softplus(jnp.where(positive, -logit, logit))


def normals_l1(prediction: Array, label: Array, mask: Array | None = None) -> Array:
    """L1 distance between the normalised prediction and the label, summed over the components.

    prediction (B, H, W, 3), label (B, H, W, 3) unit vectors; a pixel with any component 255 is ignored.
    """
    difference = unit_length(prediction.astype(jnp.float32)) - label.astype(jnp.float32)
    return _mean(jnp.sum(jnp.abs(difference), axis=-1), valid_pixels(label, mask))


def depth_l1(prediction: Array, label: Array, mask: Array | None = None) -> Array:
    """Mean absolute error of depth or disparity; prediction and label (B, H, W, 1) in one unit, -1 = ignored.

    Whether a depth is valid is decided by `valid_depth` where it is read, and not here: augmentation rescales labels.
    """
    difference = prediction[..., 0].astype(jnp.float32) - label[..., 0].astype(jnp.float32)
    return _mean(jnp.abs(difference), valid_pixels(label, mask, DEPTH_IGNORE))


def valid_pixels(label: Array, mask: Array | None, ignore: float = IGNORE) -> Array:
    """Valid pixels, (B, H, W) bool: no component of the label is `ignore`, and the example is not padding."""
    valid = jnp.all(label != ignore, axis=-1)
    return valid if mask is None else valid & (mask > 0)[:, None, None]


def valid_depth(metres: Any, maximum: float) -> Any:
    """Valid depths: more than 0 and less than `maximum`, not NaN; bool, for JAX's or NumPy's arrays of any shape."""
    return (metres > 0) & (metres < maximum)


def unit_length(vectors: Array) -> Array:
    """Vectors (..., c) scaled to length 1; those shorter than 1e-12 become 0, with gradient 0."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    has_direction = squares > SHORTEST_VECTOR**2
    # The inner `where` keeps the infinite derivative of the square root at 0 from making the gradient NaN.
    return jnp.where(has_direction, vectors / jnp.sqrt(jnp.where(has_direction, squares, 1.0)), 0.0)


def _number(pixels: Array) -> Array:
    # Counted in integers: float32 cannot count beyond 2^24, the pixels of 64 images of 512x512.
    return jnp.sum(pixels, dtype=jnp.uint32).astype(jnp.float32)


def _mean(values: Array, valid: Array) -> Array:
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(_number(valid), 1.0)


@jax.custom_vjp
def _cross_entropy_map(logits: Array, classes: Array) -> Array:
    """Cross entropy of each pixel, (B, H, W); finite but undefined for a class outside 0..c-1 (ignored).

    The gradient, softmax minus one-hot label, is written by hand: one elementwise pass that saves no array of the size
    of the logits. The derived one scatters into a map of that size, which takes three times as long on CPUs.
    """
    return _cross_entropy_forward(logits, classes)[0]


def _cross_entropy_forward(logits: Array, classes: Array) -> tuple[Array, tuple[Array, ...]]:
    # Relative to the largest logit, so that the loss and softmax - 1 of a confident pixel keep their digits.
    largest = jnp.max(logits, axis=-1)  # (B, H, W)
    normaliser = jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    own = jax.lax.platform_dependent(logits, classes, tpu=_own_by_sum, default=_own_by_gather)
    return normaliser - (own - largest), (logits, classes, largest, normaliser)


def _cross_entropy_backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array, None]:
    logits, classes, largest, normaliser = residuals
    softmax = jnp.exp((logits - largest[..., None]) - normaliser[..., None])
    return cotangent[..., None] * (softmax - _is_class(classes, logits)), None


_cross_entropy_map.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _own_by_gather(logits: Array, classes: Array) -> Array:
    """Logit of each pixel's class, (B, H, W); that of some other class where the label is ignored."""
    return jnp.take_along_axis(logits, classes[..., None], axis=-1, mode="clip")[..., 0]


def _own_by_sum(logits: Array, classes: Array) -> Array:
    """`_own_by_gather` for TPUs, on which gathers are slow: a masked sum, fused with that of the exponentials."""
    return jnp.sum(jnp.where(_is_class(classes, logits), logits, 0.0), axis=-1)


def _is_class(classes: Array, logits: Array) -> Array:
    return classes[..., None] == jnp.arange(logits.shape[-1])
