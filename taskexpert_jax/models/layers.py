"""Layers that backbones and decoders share."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = jnp.dtype
PRODUCTS = ("dot_general", "conv_general_dilated")


def logical(initializer: nn.initializers.Initializer, *axes: str | None) -> nn.initializers.Initializer:
    """The initializer with the parameter's logical axis names; `sharding` maps them to mesh axes."""
    return nn.with_logical_partitioning(initializer, axes)


def recomputed(function: Any, *, keep: tuple[str, ...] = PRODUCTS, scanned: bool = True) -> Any:
    """`function` of a module and arrays, which keeps for its gradient only what `keep` made, and sums.

    What is elementwise is computed again in the backward pass: norms and activations cost few operations, but what they
    would keep is most of a step's traffic. Nor are weights kept in the computation's dtype.

    keep: names of JAX's primitives.
    scanned: whether it runs in a scan. Elsewhere XLA would take the forward pass's values, and must be kept from it.
    """

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in keep or primitive.name == "reduce_sum"

    return nn.remat(function, policy=kept, prevent_cse=not scanned)


@jax.custom_vjp
def gelu(inputs: jax.Array) -> jax.Array:
    """Exact GELU, in the dtype of its inputs; computed in float32, as PyTorch defines it.

    The gradient is written out. Of the derived one of `jax.nn.gelu` XLA's GPU compiler makes three kernels, with maps
    of the MLP's width in memory between them, where one will do.
    """
    values = inputs.astype(jnp.float32)
    return (values * _share_below(values)).astype(inputs.dtype)


def _share_below(values: jax.Array) -> jax.Array:
    """The standard normal distribution's integral up to each value."""
    return 0.5 + 0.5 * jax.lax.erf(math.sqrt(0.5) * values)


def _gelu_backward(inputs: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    values = inputs.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(values)) / math.sqrt(2 * math.pi)
    slope = _share_below(values) + values * density
    return ((slope * gradient.astype(jnp.float32)).astype(inputs.dtype),)


gelu.defvjp(lambda inputs: (gelu(inputs), inputs), _gelu_backward)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in float32, eps 1e-6 as in ViT."""

    dtype: Dtype

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return nn.LayerNorm(
            epsilon=1e-6,
            dtype=self.dtype,
            scale_init=logical(nn.initializers.ones, "norm"),
            bias_init=logical(nn.initializers.zeros, "norm"),
            name="norm",
        )(inputs)
