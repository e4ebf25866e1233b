"""The three linear paths of a mixture of low-rank experts, separate or merged into one convolution per image and task.

An expert is a 3x3 convolution to its rank and a 1x1 convolution back to D, without a norm or an activation in between.
All experts together are one convolution to R channels, the sum of their ranks: a router's weights scale each expert's
channels. Dims: docs/conventions.md; R, r and k as in `mlore`.
"""

from collections.abc import Sequence
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
import numpy as np

from taskexpert_jax.models.layers import Dtype, gathered_conv, logical
from taskexpert_jax.parallel import sharding

_AREA = 9  # positions of a 3x3 kernel


def multiply_adds(ranks: Sequence[int], task_rank: int, tokens: int, width: int) -> int:
    """Multiply-adds of the separate paths of one task and image."""
    return tokens * width * (_AREA * width + (_AREA + 1) * (sum(ranks) + task_rank))


def merged_multiply_adds(ranks: Sequence[int], task_rank: int, tokens: int, width: int) -> int:
    """Multiply-adds of the merged convolution of one task and image, and of the merging."""
    return _AREA * width**2 * (tokens + sum(ranks) + task_rank)


class Paths(nn.Module):
    """Sum of the shared convolution, the weighted experts and each task's own low-rank convolution."""

    ranks: tuple[int, ...]
    task_rank: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, features: Float[Array, "T B h w D"], gates: Float32[Array, "T B k"], merged: bool
    ) -> Float[Array, "T B h w D"]:
        tasks, depth, rank = len(features), features.shape[-1], sum(self.ranks)
        spatial, back = (None, None, "feature_in", "feature_out"), ("feature_out", "feature_in")
        he, xavier = nn.initializers.he_normal(), nn.initializers.xavier_uniform()
        of_each_task = nn.initializers.he_normal(batch_axis=0), nn.initializers.xavier_uniform(batch_axis=0)
        shapes = {
            "shared": (he, spatial, (3, 3, depth, depth)),
            "experts_in": (he, spatial, (3, 3, depth, rank)),
            "experts_out": (xavier, back, (rank, depth)),
            "own_in": (of_each_task[0], ("tasks", *spatial), (tasks, 3, 3, depth, self.task_rank)),
            "own_out": (of_each_task[1], ("tasks", *back), (tasks, self.task_rank, depth)),
        }
        kernels = {
            name: self.param(name, logical(init, *axes), shape, jnp.float32).astype(self.dtype)
            for name, (init, axes, shape) in shapes.items()
        }
        bias = self.param("bias", logical(nn.initializers.zeros, "feature_out"), (depth,), jnp.float32)
        weights = jnp.repeat(gates, np.array(self.ranks), axis=-1, total_repeat_length=rank)  # (T, B, R)
        run = _merged if merged else _separate
        return run(features, weights.astype(self.dtype), kernels) + bias.astype(self.dtype)


def _separate(features: jax.Array, weights: jax.Array, kernels: dict[str, jax.Array]) -> jax.Array:
    """The paths one after the other."""
    tasks, batch, *rest = features.shape
    flat = features.reshape(tasks * batch, *rest)
    shared = _conv(flat, kernels["shared"]).reshape(features.shape)
    low = _conv(flat, kernels["experts_in"]).reshape(*features.shape[:-1], -1)
    low = sharding.constrain(low, "tasks", "batch", None, None, "feature_out")
    mixed = (low * weights[:, :, None, None]) @ kernels["experts_out"]
    own = [_conv(of, kernel) for of, kernel in zip(features, kernels["own_in"], strict=True)]
    return shared + mixed + jnp.einsum("tbhwr,tre->tbhwe", jnp.stack(own), kernels["own_out"])


def _merged(features: jax.Array, weights: jax.Array, kernels: dict[str, jax.Array]) -> jax.Array:
    """One convolution of each image and task, whose kernel is the sum of the paths' kernels."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scaled = weights[..., None] * kernels["experts_out"]  # (T, B, R, D)
    kernel = product("ijdr,tbre->tbijde", kernels["experts_in"], scaled)
    kernel = kernel + product("tijdr,tre->tijde", kernels["own_in"], kernels["own_out"])[:, None]
    kernel = (kernel + kernels["shared"].astype(jnp.float32)).astype(features.dtype)
    kernel = sharding.constrain(kernel, "tasks", "batch", None, None, None, "feature_out")
    # As nine matmuls: a convolution with a kernel for each image would be a grouped one, many times slower.
    height, width = features.shape[2:4]
    padded = jnp.pad(features, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    total = jnp.zeros((), jnp.float32)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            total = total + product("tbhwd,tbde->tbhwe", shifted, kernel[:, :, row, column])
    return total.astype(features.dtype)


def _conv(inputs: Float[Array, "n h w D"], kernel: Float[Array, "3 3 D E"]) -> Float[Array, "n h w E"]:
    """A SAME-padded convolution."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return gathered_conv(convolve, inputs, kernel)
