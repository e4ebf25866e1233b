"""TaskExpert's decoder (ICCV 2023): a memorial mixture of experts at each tap of the backbone, and a head per task.

The taps are scanned with the memory as the carry, so parameters of taps are stacked as (S, ...).
Dims: docs/conventions.md.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
from ml_collections import ConfigDict

from taskexpert_jax.models import heads
from taskexpert_jax.models.backbones.backbone import Tap
from taskexpert_jax.models.decoders import mixture
from taskexpert_jax.models.decoders.decoder import GATES, MEMORY, Aux, Decoder, Gating
from taskexpert_jax.models.layers import Dtype, logical, recomputed, unrolled
from taskexpert_jax.tasks import Task


class TaskExpert(Decoder):
    """Experts, gates and memory at each tap; the heads read the memory after the last one.

    Attributes:
      tasks: the task records; their names and channels are used.
      taps: shapes of the backbone's taps, which are all the same.
      width: D, the feature width of experts and memory.
      experts, gate, memory: see `mixture`.
      head_upsample: upsampling factor of the memory before a head's 3x3 convolution.
      norm: normalisation of the heads.
      unroll: unroll the scan (same parameters): a larger program, faster on CPUs.
      dtype: compute dtype; parameters, statistics of norms and softmax are float32.
    """

    tasks: tuple[Task, ...]
    taps: tuple[Tap, ...]
    width: int
    experts: mixture.ExpertSpec
    gate: mixture.GateSpec
    memory: mixture.MemorySpec
    head_upsample: int
    norm: str
    unroll: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, taps: tuple[Float[Array, "B h w C"], ...], train: bool
    ) -> tuple[dict[str, Float[Array, "B H W c"]], Aux]:
        batch, height, width, _ = taps[0].shape
        tokens = jnp.stack(taps).reshape(len(taps), batch, height * width, -1)  # (S, B, N, C)
        memory, gates = self._assemble(tokens, self._initial_memory(batch, height, width), train)
        outputs = {}
        for task, features in zip(self.tasks, memory, strict=True):
            head = heads.Head(task.channels, self.head_upsample, self.norm, self.dtype, name=f"head_{task.name}")
            outputs[task.name] = head(features, train)
        return outputs, {GATES: gates}

    def _assemble(
        self, taps: Float[Array, "S B N C"], memory: Float[Array, "T B h w D"], train: bool
    ) -> tuple[Array, Array]:
        """Memory after the last tap (T, B, h, w, D), and the gates of all taps (S, T, B, N, k)."""

        def step(of_tap: mixture.MemorialMixture, memory: jax.Array, tap: jax.Array) -> tuple[jax.Array, jax.Array]:
            return of_tap(tap, memory, train)

        mixtures = nn.scan(
            recomputed(step),
            length=len(taps),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "gate_noise": True},
            metadata_params={nn.PARTITION_NAME: "stages"},
            unroll=len(taps) if self.unroll else 1,
        )
        names = tuple(task.name for task in self.tasks)
        of_tap = mixture.MemorialMixture(names, self.experts, self.gate, self.memory, self.dtype, name="mixture")
        return mixtures(of_tap, memory, taps)

    def _initial_memory(self, batch: Any, height: int, width: int) -> Float[Array, "T B h w D"]:
        """A learned vector for each task, broadcast over the image, or zeros; batch: an int or a symbolic dimension."""
        shape = (len(self.tasks), batch, height, width, self.width)
        if self.memory.init == "zeros":
            return jnp.zeros(shape, self.dtype)
        vectors = self.param(
            "initial_memory",
            logical(nn.initializers.truncated_normal(0.02), "tasks", None),
            (len(self.tasks), self.width),
            jnp.float32,
        )
        return jnp.broadcast_to(vectors.astype(self.dtype)[:, None, None, None], shape)

    def penalty(self, aux: Aux, pixels: Callable[[int], Float32[Array, "B N"]]) -> Float32[Array, ""]:
        if not self.gate.balance:
            return jnp.zeros(())
        return self.gate.balance * mixture.balance_loss(aux[GATES], pixels(self.taps[0].stride))

    @property
    def gating(self) -> Gating:
        memory = () if self.memory.read == "none" else (MEMORY,)
        slots = (*(f"expert {k + 1}" for k in range(self.experts.count)), *memory)
        return Gating(slots, len(self.taps), self.taps[0].stride)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("experts", "gates", "memory", "heads")

    def part(self, name: str) -> str:
        first, _, rest = name.partition("/")
        if first.startswith("head_"):
            return "heads"
        if first == "initial_memory":
            return "memory"
        inside = rest.partition("/")[0]  # mixture/INSIDE/...
        return {"norm": "experts", "experts": "experts", "gates": "gates"}.get(inside, "memory")

    def multiply_adds(self, height: int, width: int) -> dict[str, int]:
        """Experts, gates with their weighted sums, memory reads and writes, and heads."""
        stride, channels = self.taps[0]
        tokens, depth = height * width // stride**2, self.width
        slots, tasks = len(self.gating.slots), len(self.tasks)
        experts = self.experts.count * tokens * (channels * depth + self.experts.kernel**2 * depth**2)
        read_area = {"conv1x1": 1, "conv3x3": 9, "identity": 0, "none": 0}[self.memory.read]
        of_one_tap = {
            "experts": experts,
            "gates": tasks * (self.gate.multiply_adds(tokens, channels, slots) + tokens * slots * depth),
            "memory": tasks * tokens * (read_area + self.memory.write_area) * depth**2,
        }
        of_heads = heads.multiply_adds(self.tasks, tokens, depth, self.head_upsample)
        return {**{part: len(self.taps) * count for part, count in of_one_tap.items()}, "heads": of_heads}

    def computed(self, height: int, width: int) -> dict[str, int]:
        tokens = height * width // self.taps[0].stride ** 2
        of_heads = heads.computed(self.tasks, tokens, self.width, self.head_upsample)
        return {**self.multiply_adds(height, width), "heads": of_heads}


def from_config(config: ConfigDict, tasks: tuple[Task, ...], taps: tuple[Tap, ...], device: Any) -> TaskExpert:
    """The decoder of `config.model` for a backbone's taps and a device."""
    model, gate, memory = config.model, config.model.gate, config.model.memory
    return TaskExpert(
        tasks=tasks,
        taps=taps,
        width=model.feature_width,
        experts=mixture.ExpertSpec(model.experts, model.expert_kernel, model.norm),
        gate=mixture.GateSpec(
            input=gate.input,
            granularity=gate.granularity,
            width=gate.width,
            top_k=gate.top_k,
            temperature=gate.temperature,
            noise=gate.noise,
            init=gate.init,
            balance=gate.balance,
        ),
        memory=mixture.MemorySpec(init=memory.init, read=memory.read, write=memory.write),
        head_upsample=model.head_upsample,
        norm=model.norm,
        unroll=unrolled(model.unroll, device),
        dtype=jnp.dtype(config.dtype),
    )
