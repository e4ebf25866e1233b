"""Bilinear upsampling with half-pixel centres, and a 3x3 convolution of an upsampled map at low resolution.

Bilinear upsampling commutes with the channel mixing of the convolution, so the channel mixing runs at low resolution:
nine matmuls on the small map, 1 / factor**2 of the FLOPs, whose results are upsampled, shifted and added. The result is
exact, also at the borders.

Large maps stay in phases (u, u, B, h, w, c): [p, q, b, i, j] is the pixel (u * i + p, u * j + q) of an image of size
(u * h, u * w). Pointwise layers do not depend on the order of pixels, so the maps are not transposed. Dims:
docs/conventions.md.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np

OFFSETS = 3  # positions of a 3x3 kernel along one axis
NEIGHBOURS = 3  # low-resolution pixels, itself included, that a pixel's phases and their neighbours depend on


def resize_bilinear(maps: Float[Array, "B h w c"], height: int, width: int) -> Float32[Array, "B H W c"]:
    """Resizes maps to (height, width), bilinear with half-pixel centres, without antialiasing.

    bfloat16 maps are multiplied in TF32 or three bfloat16 passes, more precise than they are; float32 maps in float32.
    """
    precision = jax.lax.Precision.HIGH if maps.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    size = (maps.shape[0], height, width, maps.shape[3])
    with jax.named_scope("resize"):
        return jax.image.resize(maps.astype(jnp.float32), size, method="bilinear", antialias=False, precision=precision)


def conv_of_upsampled(
    maps: Float[Array, "B h w c"], kernel: Float[Array, "3 3 c d"], *_settings: Any, factor: int, **_more: Any
) -> Float[Array, "u u B h w d"]:
    """Zero-padded 3x3 convolution of maps upsampled by `factor`, in phases.

    Replaces `lax.conv_general_dilated` in `nn.Conv`; the settings it passes are those of such a convolution.
    """
    products = jnp.einsum("bhwc,xycd->bhwxyd", maps, kernel)
    with jax.named_scope("upsample"):
        return _spread(products, factor)


def interleave(phases: Float[Array, "u u B h w c"]) -> Float[Array, "B H W c"]:
    """Pixel shuffle: phases to an image of size (u * h, u * w)."""
    factor, _, batch, height, width, channels = phases.shape
    rows_first = phases.transpose(2, 3, 0, 4, 1, 5)
    return rows_first.reshape(batch, factor * height, factor * width, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(products: Array, factor: int) -> Array:
    """Sum over 3x3 offsets of maps upsampled by `factor` and shifted: (B, h, w, 3, 3, d) -> (u, u, B, h, w, d).

    TPUs compute it as matmuls with sparse matrices, other devices as weighted sums of neighbours: on each kind the
    other way takes about three times as long or twice the memory traffic (docs/performance.md). The gradient, a sum of
    the same form, is written by hand because the derived one would save every term as an array of its own.
    """
    return jax.lax.platform_dependent(
        products,
        tpu=functools.partial(_spread_by_products, factor=factor),
        default=functools.partial(_spread_by_sums, factor=factor),
    )


def _collect(factor: int, _: None, phases: Array) -> tuple[Array]:
    """Gradient of `_spread`: (u, u, B, h, w, d) -> (B, h, w, 3, 3, d)."""
    collected = jax.lax.platform_dependent(
        phases,
        tpu=functools.partial(_collect_by_products, factor=factor),
        default=functools.partial(_collect_by_sums, factor=factor),
    )
    return (collected,)


_spread.defvjp(lambda products, factor: (_spread(products, factor), None), _collect)


def _spread_by_sums(products: Array, *, factor: int) -> Array:
    _, height, width, *_ = products.shape
    rows = _sums([products[..., offset, :, :] for offset in range(OFFSETS)], mixing_weights(height, factor), axis=1)
    # Prevents fusion with the sums over columns, which would recompute every row for each phase and offset.
    kept = jax.lax.optimization_barrier(jnp.stack(rows))  # (factor, B, h, w, 3, d)
    phases = _sums([kept[..., offset, :] for offset in range(OFFSETS)], mixing_weights(width, factor), axis=3)
    return jnp.stack(phases, axis=1)


def _collect_by_sums(phases: Array, *, factor: int) -> Array:
    height, width = phases.shape[3:5]
    by_column = _sums([phases[:, phase] for phase in range(factor)], _transposed(mixing_weights(width, factor)), axis=3)
    kept = jax.lax.optimization_barrier(jnp.stack(by_column, axis=-2))  # (factor, B, h, w, 3, d)
    by_row = _sums([kept[phase] for phase in range(factor)], _transposed(mixing_weights(height, factor)), axis=1)
    return jnp.stack(by_row, axis=3)


def _spread_by_products(products: Array, *, factor: int) -> Array:
    _, height, width, *_ = products.shape
    along_rows, along_columns = mixing_matrix(height, factor), mixing_matrix(width, factor)
    rows = _einsum("pixj,bjlxyd->pbilyd", along_rows, products)
    return _einsum("qkyl,pbilyd->pqbikd", along_columns, rows)


def _collect_by_products(phases: Array, *, factor: int) -> Array:
    height, width = phases.shape[3:5]
    along_rows, along_columns = mixing_matrix(height, factor), mixing_matrix(width, factor)
    rows = _einsum("qkyl,pqbikd->pbilyd", along_columns, phases)
    return _einsum("pixj,pbilyd->bjlxyd", along_rows, rows)


def _einsum(subscripts: str, matrix: np.ndarray, maps: Array) -> Array:
    precision = jax.lax.Precision.DEFAULT if maps.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(subscripts, matrix.astype(maps.dtype), maps, precision=precision)


def _sums(maps: Sequence[Array], weights: np.ndarray, *, axis: int) -> list[Array]:
    """Weighted sums, in float32, of pixels and their neighbours along an axis; returns one map per result.

    maps: one per index of the weights' first axis. weights: (map, neighbour, result, pixel), the weight of pixel +
    neighbour - 1.
    """
    size, rank = maps[0].shape[axis], maps[0].ndim
    padded = [jnp.pad(of.astype(jnp.float32), [(int(i == axis),) * 2 for i in range(rank)]) for of in maps]
    shape = [size if i == axis else 1 for i in range(rank)]
    found = []
    for result in range(weights.shape[2]):
        terms = [
            weights[index, neighbour, result].reshape(shape)
            * jax.lax.slice_in_dim(padded[index], neighbour, neighbour + size, axis=axis)
            for index in range(len(maps))
            for neighbour in range(NEIGHBOURS)
            if weights[index, neighbour, result].any()
        ]
        found.append(functools.reduce(jnp.add, terms).astype(maps[0].dtype))
    return found


@functools.cache
def mixing_matrix(size: int, factor: int) -> np.ndarray:
    """Bilinear upsampling of a line of pixels by `factor`, shifted by -1, 0 or 1 high-resolution pixels.

    (phase, pixel, offset, source) float32: weight of `source` in the upsampled line at factor * pixel + phase +
    offset - 1; 0 outside of the line.
    """
    centres = (np.arange(factor * size) + 0.5) / factor - 0.5
    distances = np.abs(np.clip(centres, 0, size - 1)[:, None] - np.arange(size))
    upsampled = np.pad(np.maximum(0.0, 1.0 - distances), ((1, 1), (0, 0)))  # a line of 0 on either side
    phase, pixel, offset = np.ogrid[:factor, :size, :OFFSETS]
    return upsampled[factor * pixel + phase + offset].astype(np.float32)


@functools.cache
def mixing_weights(size: int, factor: int) -> np.ndarray:
    """`mixing_matrix` by neighbours: (offset, neighbour, phase, pixel), weight of the source pixel + neighbour - 1."""
    padded = np.pad(mixing_matrix(size, factor), ((0, 0), (0, 0), (0, 0), (1, 1)))
    offset, neighbour, phase, pixel = np.ogrid[:OFFSETS, :NEIGHBOURS, :factor, :size]
    return padded[phase, pixel, offset, pixel + neighbour]


def _transposed(weights: np.ndarray) -> np.ndarray:
    """Weights of the gradient: (phase, neighbour, offset, pixel)."""
    offsets, _, phases, size = weights.shape
    padded = np.pad(weights, ((0, 0), (0, 0), (0, 0), (1, 1)))
    phase, neighbour, offset, pixel = np.ogrid[:phases, :NEIGHBOURS, :offsets, :size]
    return padded[offset, NEIGHBOURS - 1 - neighbour, phase, pixel + neighbour]
