"""Layers that backbones and decoders share."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taskexpert_jax.parallel import sharding

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


def unrolled(setting: str, device: Any) -> bool:
    """True if scans are unrolled on a device; setting: `config.model.unroll`."""
    return device.platform == "cpu" if setting == "auto" else setting == "yes"


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
    """Layer normalisation over the last axis; float32 statistics."""

    dtype: Dtype
    epsilon: float = 1e-6  # as in ViT

    @nn.compact
    def __call__(self, inputs: Float[Array, "*shape C"]) -> Float[Array, "*shape C"]:
        return nn.LayerNorm(
            epsilon=self.epsilon,
            dtype=self.dtype,
            scale_init=logical(nn.initializers.ones, "norm"),
            bias_init=logical(nn.initializers.zeros, "norm"),
            name="norm",
        )(inputs)


class Norm(nn.Module):
    """Batch or layer normalisation over the channels; float32 statistics.

    Under a sharded jit the batch statistics are computed over the global batch (SyncBN).
    """

    kind: str
    dtype: Dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        if self.kind == "layer":
            return LayerNorm(self.dtype, name="layer")(inputs)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            scale_init=logical(nn.initializers.ones, "norm"),
            bias_init=logical(nn.initializers.zeros, "norm"),
            name="batch",
        )(inputs)


@jax.custom_vjp
def _gathered(kernel: jax.Array) -> jax.Array:
    """All-gathers a convolution kernel over its input features; the gradient is reduce-scattered over them.

    By default JAX gives the gradient the kernel's own sharding, so it is all-reduced before each device takes a shard.
    """
    return sharding.constrain(kernel, None, None, None, "feature_out")


def _scattered(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (sharding.constrain(gradient, None, None, "feature_in", "feature_out"),)


_gathered.defvjp(lambda kernel: (_gathered(kernel), None), _scattered)


def gathered_conv(conv: Any, inputs: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Applies the convolution `conv` with a kernel that is all-gathered over its input features first.

    Without the gather, XLA's partitioner computes a wrong input gradient when the kernel is sharded over both input and
    output features and the batch over the same mesh axis as the input features.
    """
    return conv(inputs, _gathered(kernel), *args, **kwargs)


def spatial_conv(
    features: int,
    kernel: int,
    dtype: Dtype,
    name: str,
    *,
    use_bias: bool = True,
    conv: Any = jax.lax.conv_general_dilated,
) -> nn.Conv:
    """A SAME-padded convolution with the project's initialisation and axis names; `conv` is the primitive it calls."""
    return nn.Conv(
        features,
        (kernel, kernel),
        padding="SAME",
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=logical(nn.initializers.he_normal(), None, None, "feature_in", "feature_out"),
        bias_init=logical(nn.initializers.zeros, "feature_out"),
        conv_general_dilated=functools.partial(gathered_conv, conv),
        name=name,
    )


def _on_own_examples(inputs: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    def local(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(inputs, kernel, *args, **kwargs)

    if jax.sharding.get_abstract_mesh().empty:
        return local(inputs, kernel)
    batch = sharding.spec(inputs.shape, "batch", None, None, None)
    return jax.shard_map(local, in_specs=(batch, PartitionSpec()), out_specs=batch)(inputs, kernel)


def depthwise_conv(features: int, kernel: int, dtype: Dtype, name: str) -> nn.Conv:
    """A SAME-padded convolution of each channel by itself, whose kernel is replicated.

    Each device convolves its own examples: for grouped convolutions XLA's partitioner computes a wrong gradient of the
    kernel on a mesh with the axes fsdp and tensor.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        padding="SAME",
        feature_group_count=features,
        dtype=dtype,
        conv_general_dilated=_on_own_examples,
        name=name,
    )


def dense(
    features: int,
    dtype: Dtype,
    name: str,
    *,
    use_bias: bool = True,
    zeros: bool = False,
    axes: tuple[str, str] = ("feature_in", "feature_out"),
) -> nn.Dense:
    """A 1x1 convolution, as a dense layer over the last axis.

    zeros: initialises the kernel with zeros. axes: logical names of the input and output features.
    """
    init = nn.initializers.zeros if zeros else nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=logical(init, *axes),
        bias_init=logical(nn.initializers.zeros, axes[1]),
        name=name,
    )
