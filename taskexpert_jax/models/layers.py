"""Layers that backbones and decoders share."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Dtype = DTypeLike
MATMULS = ("dot_general", "conv_general_dilated")


def logical(initializer: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """Adds a parameter's logical axis names to its initializer; `parallel.sharding` maps them to mesh axes."""
    return nn.with_logical_partitioning(initializer, axes)


def recomputed(function: Any, *, keep: tuple[str, ...] = MATMULS, scanned: bool = True) -> Any:
    """Rematerialises `function`, a function of a module and arrays, except for the results of `keep` and sums.

    Elementwise work is recomputed in the backward pass: norms and activations cost few FLOPs, but saving their results
    is most of a step's memory traffic. Weights cast to the compute dtype are not saved either.

    keep: names of JAX primitives whose results are saved.
    scanned: whether the function runs in a scan; elsewhere XLA's common subexpression elimination must be prevented.
    """

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in keep or primitive.name == "reduce_sum"

    return nn.remat(function, policy=kept, prevent_cse=not scanned)


@jax.custom_vjp
def gelu(inputs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU as PyTorch defines it, computed in float32, in the dtype of its inputs.

    The gradient is written by hand: from the derived one of `jax.nn.gelu` XLA's GPU compiler makes three kernels, with
    maps of the MLP's width in memory between them, where one suffices.
    """
    values = inputs.astype(jnp.float32)
    return (values * _normal_cdf(values)).astype(inputs.dtype)


def _normal_cdf(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Cumulative distribution function of the standard normal distribution."""
    return 0.5 + 0.5 * jax.lax.erf(math.sqrt(0.5) * values)


def _gelu_backward(inputs: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    values = inputs.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(values)) / math.sqrt(2 * math.pi)
    slope = _normal_cdf(values) + values * density
    return ((slope * gradient.astype(jnp.float32)).astype(inputs.dtype),)


gelu.defvjp(lambda inputs: (gelu(inputs), inputs), _gelu_backward)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; float32 statistics, eps 1e-6 as in ViT."""

    dtype: Dtype

    @nn.compact
    def __call__(self, inputs: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
        return nn.LayerNorm(
            epsilon=1e-6,
            dtype=self.dtype,
            scale_init=logical(nn.initializers.ones, "norm"),
            bias_init=logical(nn.initializers.zeros, "norm"),
            name="norm",
        )(inputs)
