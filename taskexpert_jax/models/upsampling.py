"""Bilinear upsampling with half-pixel centres, and a 3x3 convolution of upsampled maps that is computed before it.

A convolution mixes channels at each of its nine places; upsampling and shifting move pixels and mix no channels. So
they may change places: the nine products are made of the small map, 1 / factor**2 as many operations, and their results
are upsampled, shifted and added. That is exact, at the borders too.

Large maps are left in phases: (factor, factor, B, h, w, c) has at [p, q, b, i, j] the pixel (factor * i + p,
factor * j + q) of the image (factor * h, factor * w). What works on single pixels needs no other order, and to make it
would be to move all of them. Dims: docs/conventions.md.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

OFFSETS = 3  # a 3x3 convolution looks at the pixel before, the pixel itself, and the one after
NEIGHBOURS = 3  # of a small map's pixel, itself among them: all that its phases and theirs are mixed from


def resize_bilinear(maps: Array, height: int, width: int) -> Array:
    """(B, h, w, c) -> (B, height, width, c) float32, bilinear with half-pixel centres.

    bfloat16 maps are multiplied in TF32 or three bfloat16 passes, which keeps more digits than they have; float32 ones
    as such.
    """
    precision = jax.lax.Precision.HIGH if maps.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    size = (maps.shape[0], height, width, maps.shape[3])
    return jax.image.resize(maps.astype(jnp.float32), size, method="bilinear", antialias=False, precision=precision)


def conv_of_upsampled(maps: Array, kernel: Array, *_settings: Any, factor: int, **_more: Any) -> Array:
    """The 3x3 convolution, padded with zeros, of maps that are upsampled by `factor`: in phases.

    (B, h, w, c), (3, 3, c, d) -> (factor, factor, B, h, w, d), of the maps' dtype. Called by `nn.Conv`, whose further
    settings are those of such a convolution.
    """
    products = jnp.einsum("bhwc,xycd->bhwxyd", maps, kernel)
    with jax.named_scope("upsample"):
        return _spread(products, factor)


def interleave(phases: Array) -> Array:
    """(factor, factor, B, h, w, c) -> (B, factor * h, factor * w, c): pixels at their places in the image."""
    factor, _, batch, height, width, channels = phases.shape
    rows_first = phases.transpose(2, 3, 0, 4, 1, 5)
    return rows_first.reshape(batch, factor * height, factor * width, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _spread(products: Array, factor: int) -> Array:
    """The sum, over 3x3 offsets, of maps upsampled by `factor` and shifted by their offset.

    (B, h, w, 3, 3, d) -> (factor, factor, B, h, w, d). TPUs make it of products with matrices that are nearly all 0,
    others of sums of neighbours: where that was compared, each took a third of the other's time or half of its traffic
    (docs/performance.md). The gradient, which is such a sum again, is written out: the derived one would keep every
    term as an array of its own.
    """
    return jax.lax.platform_dependent(
        products,
        tpu=functools.partial(_spread_by_products, factor=factor),
        default=functools.partial(_spread_by_sums, factor=factor),
    )


def _collect(factor: int, _: None, phases: Array) -> tuple[Array]:
    """The gradient of `_spread`: (factor, factor, B, h, w, d) -> (B, h, w, 3, 3, d)."""
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
    # Made once: fused with what follows, every row would be made again for each phase and offset of its columns.
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
    """Weighted sums, in float32, of pixels and their neighbours along an axis.

    maps: one for each index of the weights' first axis. weights: (map, neighbour, result, pixel), that of pixel +
    neighbour - 1. Returns a map for each result.
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
    """How a line of pixels is upsampled by `factor` and shifted by an offset of -1, 0 or 1 of the new pixels.

    (phase, pixel, offset, source) float32: the weight of `source` in the upsampled line at factor * pixel + phase +
    offset - 1, which is 0 outside of the line.
    """
    centres = (np.arange(factor * size) + 0.5) / factor - 0.5
    distances = np.abs(np.clip(centres, 0, size - 1)[:, None] - np.arange(size))
    upsampled = np.pad(np.maximum(0.0, 1.0 - distances), ((1, 1), (0, 0)))  # a line of 0 on either side
    phase, pixel, offset = np.ogrid[:factor, :size, :OFFSETS]
    return upsampled[factor * pixel + phase + offset].astype(np.float32)


@functools.cache
def mixing_weights(size: int, factor: int) -> np.ndarray:
    """The same by neighbours: (offset, neighbour, phase, pixel), the weight of the source pixel + neighbour - 1."""
    padded = np.pad(mixing_matrix(size, factor), ((0, 0), (0, 0), (0, 0), (1, 1)))
    offset, neighbour, phase, pixel = np.ogrid[:OFFSETS, :NEIGHBOURS, :factor, :size]
    return padded[phase, pixel, offset, pixel + neighbour]


def _transposed(weights: np.ndarray) -> np.ndarray:
    """Weights of the gradients: (phase, neighbour, offset, pixel)."""
    offsets, _, phases, size = weights.shape
    padded = np.pad(weights, ((0, 0), (0, 0), (0, 0), (1, 1)))
    phase, neighbour, offset, pixel = np.ogrid[:phases, :NEIGHBOURS, :offsets, :size]
    return padded[offset, NEIGHBOURS - 1 - neighbour, phase, pixel + neighbour]
