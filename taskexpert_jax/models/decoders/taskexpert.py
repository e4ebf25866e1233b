"""The memorial mixture of experts: experts decompose a tap's features, gates assemble them for each task, and a
multi-task memory takes part as one more expert and is written at each tap (TaskExpert, ICCV 2023).

Dense work (1x1 experts, gates, reads) is batched or vmapped over tasks. Spatial convolutions are unrolled over experts
and tasks: a vmapped 3x3 convolution becomes a grouped one, many times slower than plain ones.
Dims: B batch, h w token grid, N = h * w, C backbone width, D feature width, T tasks, K experts: docs/conventions.md.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from taskexpert_jax.models.backbones import vit
from taskexpert_jax.models.backbones.vit import Dtype, logical
from taskexpert_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The experts of a tap: their number K, the second convolution's kernel size and the normalisation between."""

    count: int
    kernel: int
    norm: str


@dataclasses.dataclass(frozen=True)
class GateSpec:
    """How a task weighs the experts.

    input: what the gate sees: each token's feature, the image's mean feature (context), or both.
    granularity: one set of weights a token, an image, or a stage (static: learned, blind to the input); uniform: the
      experts' plain mean, no gate.
    width: hidden units of the gate.
    top_k: 0 keeps the full softmax; k > 0 keeps the k largest weights and renormalises them.
    temperature: the logits are divided by it: below 1 choices are sharper, above 1 more even.
    noise: standard deviation of the normal noise that training adds to the logits; 0: none.
    init: random, the weights first differ by token; even: all choices first have the same weight.
    """

    input: str
    granularity: str
    width: int
    top_k: int
    temperature: float = 1.0
    noise: float = 0.0
    init: str = "random"


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """The multi-task feature memory.

    init: the memory before the first tap: a learned vector a task, broadcast, or zeros.
    read: what the gate sees of it as expert K+1: its normalised, projected form (1x1 or 3x3), itself, or nothing (then
      the memory only sums the taps' features for the heads).
    write: residual adds a 3x3 convolution of the task feature; gated blends it in by a learned sigmoid; replace drops
      the past.
    """

    init: str
    read: str
    write: str


class Norm(nn.Module):
    """Batch or layer normalisation over the channels; float32 statistics.

    Under a sharded jit the batch statistics are those of the global batch: synchronised by construction.
    """

    kind: str
    dtype: Dtype

    @nn.compact
    def __call__(self, inputs: jax.Array, train: bool) -> jax.Array:
        if self.kind == "layer":
            return vit.LayerNorm(self.dtype, name="layer")(inputs)
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
    """A convolution's kernel, whole over its input features on every device; its gradient is sharded over them.

    JAX would have the gradient laid out as the kernel is: reduced whole over all devices, before each takes its shard.
    """
    return sharding.constrain(kernel, None, None, None, "feature_out")


def _scattered(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (sharding.constrain(gradient, None, None, "feature_in", "feature_out"),)


_gathered.defvjp(lambda kernel: (_gathered(kernel), None), _scattered)


def gathered_conv(conv: Any, inputs: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """The convolution `conv`, whose kernel is gathered over its shards of input features first.

    Left alone, XLA's partitioner gets the gradient of the input wrong where the kernel is sharded over input features
    and over output features, and the batch over the former's mesh axis too.
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
    """A same-padded convolution with the project's initialisation and axis names; `conv` computes it."""
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


def dense(features: int, dtype: Dtype, name: str, *, use_bias: bool = True, zeros: bool = False) -> nn.Dense:
    """A 1x1 convolution, as a dense layer over the last axis; its kernel starts at zero where asked."""
    init = nn.initializers.zeros if zeros else nn.initializers.xavier_uniform()
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=logical(init, "feature_in", "feature_out"),
        bias_init=logical(nn.initializers.zeros, "feature_out"),
        name=name,
    )


class Experts(nn.Module):
    """Decomposes a feature map (B, h, w, C) into K task-generic ones, (K, B, h, w, D)."""

    spec: ExpertSpec
    width: int  # D
    dtype: Dtype

    @nn.compact
    def __call__(self, features: jax.Array, train: bool) -> jax.Array:
        count, width = self.spec.count, self.width
        # All K 1x1 convolutions as one matmul; the norm that follows has the bias.
        hidden = dense(count * width, self.dtype, "reduce", use_bias=False)(features)
        hidden = sharding.constrain(hidden, "batch", None, None, "feature_out")
        hidden = vit.gelu(Norm(self.spec.norm, self.dtype, name="norm")(hidden, train))
        parts = jnp.split(hidden, count, axis=-1)
        return jnp.stack(
            [spatial_conv(width, self.spec.kernel, self.dtype, f"expert_{k}")(part) for k, part in enumerate(parts)]
        )


class Gate(nn.Module):
    """One task's gate: (B, N, C) features and (B, C) context -> (B, N, choices) logits. Vmapped over tasks."""

    spec: GateSpec
    choices: int  # K, or K + 1 with the memory
    dtype: Dtype

    @nn.compact
    def __call__(self, features: jax.Array, context: jax.Array) -> jax.Array:
        batch, tokens, _ = features.shape
        if self.spec.granularity == "static":
            logits = self.param("logits", logical(nn.initializers.zeros, None), (self.choices,), jnp.float32)
            return jnp.broadcast_to(logits, (batch, tokens, self.choices))
        hidden = jnp.zeros((), self.dtype)
        if self.spec.input in ("local", "both"):
            hidden = hidden + dense(self.spec.width, self.dtype, "local")(features)
        if self.spec.input in ("context", "both"):
            hidden = hidden + dense(self.spec.width, self.dtype, "context")(context)[:, None]
        hidden = vit.gelu(hidden)
        logits = dense(self.choices, jnp.float32, "logits", zeros=self.spec.init == "even")(hidden)
        if self.spec.granularity == "image":
            logits = logits.mean(axis=1, keepdims=True)
        return jnp.broadcast_to(logits, (batch, tokens, self.choices))


def gate_weights(logits: jax.Array, top_k: int) -> jax.Array:
    """Softmax over the last axis in float32, over the `top_k` largest logits only where `top_k` > 0."""
    logits = logits.astype(jnp.float32)
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= smallest_kept, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def balance_loss(gates: jax.Array, share: jax.Array) -> jax.Array:
    """How unevenly the choices are used: 0 where all have the same mean weight, at most their number - 1.

    The squared coefficient of variation of the mean weights, averaged over taps and tasks (the importance loss of
    Shazeer et al., 2017, arXiv 1701.06538). Gates may still be sharp at every token.

    Args:
      gates: (S, T, B, N, choices) float32.
      share: (B, N) float32, the weight of each token in the mean: 0 for padding.
    """
    used = jnp.einsum("stbnk,bn->stk", gates, share / jnp.maximum(share.sum(), 1.0))
    return jnp.mean(jnp.var(used, axis=-1) / jnp.maximum(jnp.square(used.mean(axis=-1)), 1e-9))


def assemble(gates: jax.Array, experts: jax.Array, read: jax.Array | None) -> jax.Array:
    """The gated sum of the experts, and of the memory as the last one where it is read.

    Args:
      gates: (T, B, N, K) or, with `read`, (T, B, N, K + 1), float32; they sum to 1 over the last axis.
      experts: (K, B, N, D).
      read: (T, B, N, D) or None.

    Returns:
      The task features, (T, B, N, D).
    """
    mixed = _weighed_sum(gates[..., : len(experts)], experts)
    if read is not None:
        mixed = mixed + gates[..., -1:] * read.astype(jnp.float32)
    return mixed.astype(experts.dtype)


@jax.custom_vjp
def _weighed_sum(gates: jax.Array, experts: jax.Array) -> jax.Array:
    """(T, B, N, K) float32, (K, B, N, D) -> (T, B, N, D) float32.

    Elementwise and not a product: K numbers to contract at every token would leave a matrix unit nearly empty. So is
    the gradient, which is written out: the derived one is slower on CPUs and TPUs (docs/performance.md).
    """
    return functools.reduce(jnp.add, (gates[..., k : k + 1] * expert for k, expert in enumerate(_float32(experts))))


def _weighed_sum_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gates, experts = kept
    to_gates = [jnp.sum(gradient * expert, axis=-1) for expert in _float32(experts)]
    to_experts = [
        functools.reduce(jnp.add, (of[..., k : k + 1] * to for of, to in zip(gates, gradient, strict=True)))
        for k in range(len(experts))
    ]
    return jnp.stack(to_gates, axis=-1), jnp.stack(to_experts).astype(experts.dtype)


_weighed_sum.defvjp(lambda gates, experts: (_weighed_sum(gates, experts), (gates, experts)), _weighed_sum_backward)


def _float32(experts: jax.Array) -> list[jax.Array]:
    return [expert.astype(jnp.float32) for expert in experts]


class MemorialMixture(nn.Module):
    """One tap: experts, gates, memory read and write.

    (tokens (B, N, C), memory (T, B, h, w, D)) -> (memory, gates (T, B, N, K or K + 1) float32).
    """

    tasks: tuple[str, ...]
    experts: ExpertSpec
    gate: GateSpec
    memory: MemorySpec
    dtype: Dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, memory: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        _, batch, height, width, depth = memory.shape
        features = vit.LayerNorm(self.dtype, name="norm")(tokens)  # (B, N, C)
        grid = features.reshape(batch, height, width, -1)
        experts = Experts(self.experts, depth, self.dtype, name="experts")(grid, train)
        experts = experts.reshape(-1, batch, height * width, depth)  # (K, B, N, D)
        read = self._read(memory)  # (T, B, N, D) or None
        gates = self._gates(features, len(experts) + (read is not None), train)  # (T, B, N, K+1)
        features = assemble(gates, experts, read).reshape(memory.shape)
        memory = self._write(memory, features)
        return sharding.constrain(memory, "tasks", "batch", None, None, None), gates

    def _gates(self, features: jax.Array, choices: int, train: bool) -> jax.Array:
        """Gate weights (T, B, N, choices), float32."""
        if self.gate.granularity == "uniform":
            return jnp.full((len(self.tasks), *features.shape[:2], choices), 1.0 / choices, jnp.float32)
        per_task = nn.vmap(
            Gate,
            in_axes=(None, None),  # pyright: ignore[reportArgumentType]: Flax takes a tuple, one an argument
            axis_size=len(self.tasks),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "tasks"},
        )
        logits = per_task(self.gate, choices, self.dtype, name="gates")(features, features.mean(axis=1))
        logits = sharding.constrain(logits, "tasks", "batch", None, None)
        logits = logits.astype(jnp.float32) / self.gate.temperature
        if train and self.gate.noise:
            # As coarse as the weights themselves: one draw a token, an image, or for the whole batch.
            batch, tokens, _ = features.shape
            places = {"token": (batch, tokens), "image": (batch, 1), "static": (1, 1)}[self.gate.granularity]
            shape = (len(self.tasks), *places, choices)
            logits = logits + self.gate.noise * jax.random.normal(self.make_rng("gate_noise"), shape)
        return gate_weights(logits, self.gate.top_k)

    def _read(self, memory: jax.Array) -> jax.Array | None:
        """The memory as an expert, (T, B, N, D), or None where it is not read."""
        count, batch, height, width, depth = memory.shape
        flat = memory.reshape(count, batch, height * width, depth)
        if self.memory.read == "none":
            return None
        if self.memory.read == "identity":
            return flat
        if self.memory.read == "conv1x1":
            read = nn.vmap(
                _NormedDense,
                axis_size=count,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                metadata_params={nn.PARTITION_NAME: "tasks"},
            )
            return read(self.dtype, name="read")(flat)
        normed = vit.LayerNorm(self.dtype, name="read_norm")(memory)
        maps = [spatial_conv(depth, 3, self.dtype, f"read_{t}")(m) for t, m in zip(self.tasks, normed, strict=True)]
        return jnp.stack(maps).reshape(flat.shape)

    def _write(self, memory: jax.Array, features: jax.Array) -> jax.Array:
        """The memory after this tap."""
        depth = memory.shape[-1]
        pairs = list(zip(self.tasks, features, strict=True))
        update = jnp.stack([spatial_conv(depth, 3, self.dtype, f"write_{t}")(f) for t, f in pairs])
        if self.memory.write == "replace":
            return update
        if self.memory.write == "residual":
            return memory + update
        blend = jnp.stack([nn.sigmoid(dense(depth, self.dtype, f"blend_{t}")(f)) for t, f in pairs])
        return memory + blend * (update - memory)


class _NormedDense(nn.Module):
    """Layer norm and a 1x1 convolution: one task's memory read, (B, N, D) -> (B, N, D)."""

    dtype: Dtype

    @nn.compact
    def __call__(self, memory: jax.Array) -> jax.Array:
        normed = vit.LayerNorm(self.dtype, name="norm")(memory)
        return dense(memory.shape[-1], self.dtype, "project")(normed)
