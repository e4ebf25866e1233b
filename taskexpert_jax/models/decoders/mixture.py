"""TaskExpert's memorial mixture of experts, at one tap of the backbone.

Experts decompose a tap's features, gates assemble them for each task, and a multi-task memory acts as one more expert
and is updated at each tap.

Dense layers (1x1 experts, gates, reads) are batched or vmapped over tasks. Spatial convolutions are unrolled over
experts and tasks, because a vmapped 3x3 convolution becomes a grouped convolution, many times slower than plain ones.
Dims: docs/conventions.md; `k` is the number of expert slots, K or K + 1 with the memory.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from taskexpert_jax.models.layers import Dtype, LayerNorm, Norm, dense, gelu, logical, spatial_conv
from taskexpert_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """Experts of a tap: number K, kernel size of the second convolution, normalisation between the two."""

    count: int
    kernel: int
    norm: str


@dataclasses.dataclass(frozen=True)
class GateSpec:
    """Gating network of a task.

    input: features of the token (local), mean feature of the image (context), or both.
    granularity: gate weights per token, per image, or per tap (static: learned, independent of the input); uniform:
      the plain mean over the expert slots, without a gating network.
    width: hidden units.
    top_k: 0 for the full softmax; k > 0 keeps the k largest weights and renormalises them.
    temperature: divides the logits; below 1 gates are sharper, above 1 more uniform.
    noise: standard deviation of the Gaussian noise added to the logits in training; 0 for none.
    init: random, or even: all expert slots start with equal weight.
    balance: weight of the balance loss.
    """

    input: str
    granularity: str
    width: int
    top_k: int
    temperature: float = 1.0
    noise: float = 0.0
    init: str = "random"
    balance: float = 0.0

    def multiply_adds(self, tokens: int, channels: int, slots: int) -> int:
        """Multiply-adds of one task's gating network at one tap."""
        if self.granularity in ("static", "uniform"):
            return 0
        local = tokens if self.input in ("local", "both") else 0
        context = 1 if self.input in ("context", "both") else 0
        return (local + context) * channels * self.width + (tokens if local else 1) * self.width * slots


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """The multi-task feature memory.

    init: memory before the first tap: a learned vector for each task, broadcast over the image, or zeros.
    read: memory as expert K + 1: layer norm and a 1x1 or 3x3 convolution, identity, or none (the memory then only
      accumulates the taps' features for the heads).
    write: residual adds a 3x3 convolution of the task feature; gated blends it in with a learned sigmoid gate; replace
      discards the previous memory.
    """

    init: str
    read: str
    write: str

    @property
    def write_area(self) -> int:
        """Kernel positions of a write: of its 3x3 convolution and, if gated, of its 1x1 convolution."""
        return 9 + (self.write == "gated")


class Experts(nn.Module):
    """Expert networks: decompose a feature map into K task-generic ones (1x1 conv, norm, GELU, spatial conv)."""

    spec: ExpertSpec
    width: int  # D
    dtype: Dtype

    @nn.compact
    def __call__(self, features: Float[Array, "B h w C"], train: bool) -> Float[Array, "K B h w D"]:
        count, width = self.spec.count, self.width
        # All K 1x1 convolutions as one matmul, without bias because a norm follows.
        hidden = dense(count * width, self.dtype, "reduce", use_bias=False)(features)
        hidden = sharding.constrain(hidden, "batch", None, None, "feature_out")
        hidden = gelu(Norm(self.spec.norm, self.dtype, name="norm")(hidden, train))
        parts = jnp.split(hidden, count, axis=-1)
        return jnp.stack(
            [spatial_conv(width, self.spec.kernel, self.dtype, f"expert_{k}")(part) for k, part in enumerate(parts)]
        )


class Gate(nn.Module):
    """Gating network of one task: token features and context -> logits over the expert slots. Vmapped over tasks."""

    spec: GateSpec
    slots: int  # K, or K + 1 with the memory
    dtype: Dtype

    @nn.compact
    def __call__(self, features: Float[Array, "B N C"], context: Float[Array, "B C"]) -> Float[Array, "B N k"]:
        batch, tokens, _ = features.shape
        if self.spec.granularity == "static":
            logits = self.param("logits", logical(nn.initializers.zeros, None), (self.slots,), jnp.float32)
            return jnp.broadcast_to(logits, (batch, tokens, self.slots))
        hidden = jnp.zeros((), self.dtype)
        if self.spec.input in ("local", "both"):
            hidden = hidden + dense(self.spec.width, self.dtype, "local")(features)
        if self.spec.input in ("context", "both"):
            hidden = hidden + dense(self.spec.width, self.dtype, "context")(context)[:, None]
        hidden = gelu(hidden)
        logits = dense(self.slots, jnp.float32, "logits", zeros=self.spec.init == "even")(hidden)
        if self.spec.granularity == "image":
            logits = logits.mean(axis=1, keepdims=True)
        return jnp.broadcast_to(logits, (batch, tokens, self.slots))


def gate_weights(logits: Float[Array, "*shape k"], top_k: int) -> Float32[Array, "*shape k"]:
    """Softmax over the last axis; with `top_k` > 0 over the `top_k` largest logits only, the first of equal ones."""
    logits, count = logits.astype(jnp.float32), logits.shape[-1]
    if 0 < top_k < count:
        _, kept = jax.lax.top_k(logits, top_k)
        logits = jnp.where(jax.nn.one_hot(kept, count).sum(axis=-2) > 0, logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def balance_loss(gates: Float32[Array, "S T B N k"], share: Float32[Array, "B N"]) -> Float32[Array, ""]:
    """Importance loss (Shazeer et al., 2017, arXiv 1701.06538): 0 for equal mean weights, at most k - 1.

    Squared coefficient of variation of the expert slots' mean weights, averaged over taps and tasks. Gates may still be
    sharp at every token.

    Args:
      gates: gate weights.
      share: weight of each token in the mean; 0 for padding.
    """
    used = jnp.einsum("stbnk,bn->stk", gates, share / jnp.maximum(share.sum(), 1.0))
    return jnp.mean(jnp.var(used, axis=-1) / jnp.maximum(jnp.square(used.mean(axis=-1)), 1e-9))


def assemble(
    gates: Float32[Array, "T B N k"], experts: Float[Array, "K B N D"], read: Float[Array, "T B N D"] | None
) -> Float[Array, "T B N D"]:
    """Task features: the gated sum of the experts and, where it is read, the memory.

    Args:
      gates: weights that sum to 1 over the last axis; the memory's slot is the last.
      experts: task-generic features.
      read: the memory as an expert; None where it is not read.
    """
    mixed = _gated_sum(gates[..., : len(experts)], experts)
    if read is not None:
        mixed = mixed + gates[..., -1:] * read.astype(jnp.float32)
    return mixed.astype(experts.dtype)


@jax.custom_vjp
def _gated_sum(gates: Float32[Array, "T B N K"], experts: Float[Array, "K B N D"]) -> Float32[Array, "T B N D"]:
    """Sum over the experts, elementwise: a matmul that contracts only K numbers would leave a matrix unit nearly empty.

    The gradient is written by hand because the derived one is slower on CPUs and TPUs (docs/performance.md).
    """
    return functools.reduce(jnp.add, (gates[..., k : k + 1] * expert for k, expert in enumerate(_float32(experts))))


def _gated_sum_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    gates, experts = residuals
    to_gates = [jnp.sum(gradient * expert, axis=-1) for expert in _float32(experts)]
    to_experts = [
        functools.reduce(jnp.add, (of[..., k : k + 1] * to for of, to in zip(gates, gradient, strict=True)))
        for k in range(len(experts))
    ]
    return jnp.stack(to_gates, axis=-1), jnp.stack(to_experts).astype(experts.dtype)


_gated_sum.defvjp(lambda gates, experts: (_gated_sum(gates, experts), (gates, experts)), _gated_sum_backward)


def _float32(experts: jax.Array) -> list[jax.Array]:
    return [expert.astype(jnp.float32) for expert in experts]


class MemorialMixture(nn.Module):
    """One tap: experts, gates, memory read and write. Returns the updated memory and the gate weights."""

    tasks: tuple[str, ...]
    experts: ExpertSpec
    gate: GateSpec
    memory: MemorySpec
    dtype: Dtype

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B N C"], memory: Float[Array, "T B h w D"], train: bool
    ) -> tuple[Float[Array, "T B h w D"], Float32[Array, "T B N k"]]:
        _, batch, height, width, depth = memory.shape
        features = LayerNorm(self.dtype, name="norm")(tokens)  # (B, N, C)
        grid = features.reshape(batch, height, width, -1)
        experts = Experts(self.experts, depth, self.dtype, name="experts")(grid, train)
        experts = experts.reshape(-1, batch, height * width, depth)  # (K, B, N, D)
        read = self._read(memory)  # (T, B, N, D) or None
        gates = self._gates(features, len(experts) + (read is not None), train)  # (T, B, N, K+1)
        with jax.named_scope("assemble"):
            features = assemble(gates, experts, read).reshape(memory.shape)
        memory = self._write(memory, features)
        return sharding.constrain(memory, "tasks", "batch", None, None, None), gates

    def _gates(self, features: Float[Array, "B N C"], slots: int, train: bool) -> Float32[Array, "T B N k"]:
        """Gate weights of all tasks over `slots` expert slots."""
        if self.gate.granularity == "uniform":
            return jnp.full((len(self.tasks), *features.shape[:2], slots), 1.0 / slots, jnp.float32)
        per_task = nn.vmap(
            Gate,
            in_axes=(None, None),  # pyright: ignore[reportArgumentType]: Flax takes a tuple, one an argument
            axis_size=len(self.tasks),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "tasks"},
        )
        logits = per_task(self.gate, slots, self.dtype, name="gates")(features, features.mean(axis=1))
        logits = sharding.constrain(logits, "tasks", "batch", None, None)
        logits = logits.astype(jnp.float32) / self.gate.temperature
        if train and self.gate.noise:
            # At the granularity of the gates: one draw per token, per image, or for the whole batch.
            batch, tokens, _ = features.shape
            places = {"token": (batch, tokens), "image": (batch, 1), "static": (1, 1)}[self.gate.granularity]
            shape = (len(self.tasks), *places, slots)
            logits = logits + self.gate.noise * jax.random.normal(self.make_rng("gate_noise"), shape)
        return gate_weights(logits, self.gate.top_k)

    def _read(self, memory: Float[Array, "T B h w D"]) -> Float[Array, "T B N D"] | None:
        """The memory as an expert, or None where it is not read."""
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
        normed = LayerNorm(self.dtype, name="read_norm")(memory)
        maps = [spatial_conv(depth, 3, self.dtype, f"read_{t}")(m) for t, m in zip(self.tasks, normed, strict=True)]
        return jnp.stack(maps).reshape(flat.shape)

    def _write(
        self, memory: Float[Array, "T B h w D"], features: Float[Array, "T B h w D"]
    ) -> Float[Array, "T B h w D"]:
        """The memory updated with this tap's task features."""
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
    """Layer norm and a 1x1 convolution: the memory read of one task."""

    dtype: Dtype

    @nn.compact
    def __call__(self, memory: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        normed = LayerNorm(self.dtype, name="norm")(memory)
        return dense(memory.shape[-1], self.dtype, "project")(normed)
