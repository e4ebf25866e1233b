"""MLoRE's decoder (CVPR 2024, arXiv 2403.17749): mixtures of low-rank experts at each tap of the backbone.

At each tap the features are projected for each task and pass two mixtures. A mixture sums three linear paths: a 3x3
convolution that all tasks share, low-rank 3x3 convolutions (the experts) that a router of each task weights for each
image, and one low-rank convolution of the task. Being linear, they are one convolution for each image and task. A
task's features of all taps are fused by weights at each token, and a head predicts from them.

Written from the paper. What it leaves open here is in docs/paper_vs_code.md; its authors' code has another licence, and
nothing of it is used. Parameters of taps are stacked as (S, ...). Dims: docs/conventions.md; R: sum of the experts'
ranks, r: rank of a task's own convolution, k: number of experts.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.models import heads
from taskexpert_jax.models.backbones import position_embedding
from taskexpert_jax.models.backbones.backbone import Tap
from taskexpert_jax.models.decoders import lowrank
from taskexpert_jax.models.decoders.decoder import GATES, Aux, Decoder, Gating
from taskexpert_jax.models.decoders.mixture import balance_loss, gate_weights
from taskexpert_jax.models.layers import (
    Dtype,
    LayerNorm,
    Norm,
    dense,
    gelu,
    logical,
    recomputed,
    spatial_conv,
    unrolled,
)
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task

MIXTURES = 2  # stacked at each tap
ROUTERS = "routers"  # entry of `Aux`: the weights of each mixture, (S * MIXTURES, T, B, k) float32


@dataclasses.dataclass(frozen=True)
class MixtureSpec:
    """A mixture of low-rank experts.

    ranks: of each expert's convolution.
    task_rank: r, of the convolution that a task has for itself.
    top_k: experts that a router keeps for an image; 0 for all of them.
    merge: when the three paths run as one convolution: inference, always or never.
    grid: tokens of a training image, rows and columns; the routers' weights belong to them.
    norm: normalisation of the projections.
    """

    ranks: tuple[int, ...]
    task_rank: int
    top_k: int
    merge: str
    grid: tuple[int, int]
    norm: str

    def merged(self, train: bool) -> bool:
        """True if the paths run as one convolution."""
        return self.merge == "always" or (self.merge == "inference" and not train)


def _of_each_task(module: Any, count: int) -> Any:
    """The module class vmapped over tasks, with parameters of its own for each of them."""
    return nn.vmap(
        module,
        in_axes=(0, None),  # pyright: ignore[reportArgumentType]: Flax takes a tuple, one an argument
        axis_size=count,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "tasks"},
    )


class _Projection(nn.Module):
    """1x1 convolution of one task, then norm and GELU, or after them."""

    norm: str
    norm_first: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, features: Float[Array, "B h w D"], train: bool) -> Float[Array, "B h w D"]:
        def activated(maps: jax.Array) -> jax.Array:
            return gelu(Norm(self.norm, self.dtype, name="norm")(maps, train))

        project = dense(features.shape[-1], self.dtype, "project")
        return project(activated(features)) if self.norm_first else activated(project(features))


class Router(nn.Module):
    """Logits of one task's experts for each image.

    They see the mean over positions of reduced features, and a sum over positions with learned weights, which knows
    where in the image something is. The weights belong to the grid of training images and are resized for others.
    """

    experts: int
    grid: tuple[int, int]
    dtype: Dtype

    @nn.compact
    def __call__(self, features: Float[Array, "B h w D"], train: bool) -> Float32[Array, "B k"]:
        del train
        _, height, width, depth = features.shape
        reduced = max(1, depth // 4)
        hidden = gelu(LayerNorm(self.dtype, name="norm")(dense(reduced, self.dtype, "reduce")(features)))
        anywhere = dense(reduced, self.dtype, "mix")(hidden).mean(axis=(1, 2))
        even = nn.initializers.constant(1 / (self.grid[0] * self.grid[1]))
        weights = self.param("positions", logical(even, None, None, None), (*self.grid, 1), jnp.float32)
        scale = np.prod(self.grid) / (height * width)  # the weights' sum stays about the same
        weights = jnp.asarray(scale * position_embedding.resize(weights, (height, width)), self.dtype)
        placed = jnp.einsum("bhwd,hw->bd", features, weights[..., 0])
        placed = dense(reduced, self.dtype, "place")(LayerNorm(self.dtype, name="place_norm")(placed))
        hidden = gelu(jnp.concatenate([anywhere, placed], axis=-1))
        return dense(self.experts, jnp.float32, "logits")(hidden)


class Mixture(nn.Module):
    """One mixture: projection, the three paths, projection. Returns task features and the routers' weights."""

    spec: MixtureSpec
    dtype: Dtype

    @nn.compact
    def __call__(
        self, features: Float[Array, "T B h w D"], train: bool
    ) -> tuple[Float[Array, "T B h w D"], Float32[Array, "T B k"]]:
        tasks = len(features)
        projection = _of_each_task(_Projection, tasks)
        features = projection(self.spec.norm, False, self.dtype, name="enter")(features, train)
        router = _of_each_task(Router, tasks)(len(self.spec.ranks), self.spec.grid, self.dtype, name="router")
        gates = gate_weights(router(features, train), self.spec.top_k)
        paths = lowrank.Paths(self.spec.ranks, self.spec.task_rank, self.dtype, name="paths")
        features = paths(features, gates, self.spec.merged(train))
        features = projection(self.spec.norm, True, self.dtype, name="leave")(features, train)
        return sharding.constrain(features, "tasks", "batch", None, None, None), gates


class OfTap(nn.Module):
    """The mixtures of one tap."""

    tasks: int
    width: int
    spec: MixtureSpec
    dtype: Dtype

    @nn.compact
    def __call__(
        self, tap: Float[Array, "B h w C"], train: bool
    ) -> tuple[Float[Array, "T B h w D"], Float32[Array, "MIXTURES T B k"]]:
        reduced = dense(self.width, self.dtype, "reduce")(LayerNorm(self.dtype, name="norm")(tap))
        features, gates = jnp.broadcast_to(reduced, (self.tasks, *reduced.shape)), []
        for name in ("first", "second"):
            features, weights = Mixture(self.spec, self.dtype, name=name)(features, train)
            gates.append(weights)
        return features, jnp.stack(gates)


class Fusion(nn.Module):
    """One task's features of all taps -> their sum with weights at each token, a softmax over the taps."""

    norm: str
    dtype: Dtype

    @nn.compact
    def __call__(self, features: Float[Array, "S B h w D"], train: bool) -> Float[Array, "B h w D"]:
        count, depth = len(features), features.shape[-1]
        together = dense(depth, self.dtype, "reduce", use_bias=False)(jnp.concatenate(list(features), axis=-1))
        together = nn.relu(Norm(self.norm, self.dtype, name="norm")(together, train))
        weights = jax.nn.softmax(spatial_conv(count, 3, jnp.float32, "weights")(together.astype(jnp.float32)))
        mixed = sum(weights[..., s : s + 1] * tap.astype(jnp.float32) for s, tap in enumerate(features))
        return jnp.asarray(mixed, self.dtype)


class MLoRE(Decoder):
    """Mixtures of low-rank experts at each tap; a fusion of the taps and a head for each task.

    Attributes:
      tasks: the task records; their names and channels are used.
      taps: shapes of the backbone's taps, which are all the same.
      width: D, the feature width.
      mixture: see `MixtureSpec`.
      balance: weight of the load-balancing loss.
      head_upsample: upsampling factor of the features before a head's 3x3 convolution.
      norm: normalisation of the fusion and the heads.
      unroll: unroll the scan over taps (same parameters).
      dtype: compute dtype; parameters, statistics of norms and softmax are float32.
    """

    tasks: tuple[Task, ...]
    taps: tuple[Tap, ...]
    width: int
    mixture: MixtureSpec
    balance: float
    head_upsample: int
    norm: str
    unroll: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, taps: tuple[Float[Array, "B h w C"], ...], train: bool
    ) -> tuple[dict[str, Float[Array, "B H W c"]], Aux]:
        def step(of_tap: OfTap, carry: None, tap: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            return carry, of_tap(tap, train)

        scanned = nn.scan(
            recomputed(step),
            length=len(taps),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "stages"},
            unroll=len(taps) if self.unroll else 1,
        )
        of_tap = OfTap(len(self.tasks), self.width, self.mixture, self.dtype, name="mlore")
        _, (features, routers) = scanned(of_tap, None, jnp.stack(taps))  # (S, T, B, h, w, D), (S, MIXTURES, T, B, k)
        outputs = {}
        for t, task in enumerate(self.tasks):
            fused = Fusion(self.norm, self.dtype, name=f"fuse_{task.name}")(features[:, t], train)
            head = heads.Head(task.channels, self.head_upsample, self.norm, self.dtype, name=f"head_{task.name}")
            outputs[task.name] = head(fused, train)
        stages, _, tasks, batch, experts = routers.shape
        tokens = features.shape[3] * features.shape[4]
        gates = jnp.broadcast_to(routers.mean(axis=1)[..., None, :], (stages, tasks, batch, tokens, experts))
        return outputs, {GATES: gates, ROUTERS: routers.reshape(-1, tasks, batch, experts)}

    def penalty(self, aux: Aux, pixels: Callable[[int], Float32[Array, "B N"]]) -> Float32[Array, ""]:
        if not self.balance:
            return jnp.zeros(())
        share = pixels(self.taps[0].stride).sum(axis=-1, keepdims=True)
        return self.balance * balance_loss(aux[ROUTERS][..., None, :], share)

    @property
    def gating(self) -> Gating:
        """The experts of a tap; their weights are means over its mixtures, the same for all tokens."""
        slots = tuple(f"expert {k + 1}" for k in range(len(self.mixture.ranks)))
        return Gating(slots, len(self.taps), self.taps[0].stride)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("projections", "paths", "routers", "fusion", "heads")

    def part(self, name: str) -> str:
        words = name.split("/")
        for inside, part in (("paths", "paths"), ("router", "routers")):
            if inside in words:
                return part
        return {"fuse": "fusion", "head": "heads"}.get(words[0].partition("_")[0], "projections")

    def _counts(self, height: int, width: int, paths: int) -> dict[str, int]:
        """Multiply-adds of all parts but the heads; paths: those of one mixture's paths of one task."""
        stride, channels = self.taps[0]
        tokens, depth, tasks, taps = height * width // stride**2, self.width, len(self.tasks), len(self.taps)
        reduced, experts = max(1, depth // 4), len(self.mixture.ranks)
        pooled = depth * reduced + 2 * reduced * experts
        router = tokens * (depth * reduced + reduced**2 + depth) + pooled
        return {
            "projections": taps * (tokens * channels * depth + MIXTURES * tasks * 2 * tokens * depth**2),
            "paths": taps * MIXTURES * tasks * paths,
            "routers": taps * MIXTURES * tasks * router,
            "fusion": tasks * tokens * taps * (depth**2 + 9 * depth),
        }

    def multiply_adds(self, height: int, width: int) -> dict[str, int]:
        """With all experts as convolutions of their own, as in training."""
        tokens = height * width // self.taps[0].stride ** 2
        paths = lowrank.multiply_adds(self.mixture.ranks, self.mixture.task_rank, tokens, self.width)
        of_heads = heads.multiply_adds(self.tasks, tokens, self.width, self.head_upsample)
        return {**self._counts(height, width, paths), "heads": of_heads}

    def computed(self, height: int, width: int) -> dict[str, int]:
        tokens = height * width // self.taps[0].stride ** 2
        count = lowrank.merged_multiply_adds if self.mixture.merged(train=False) else lowrank.multiply_adds
        paths = count(self.mixture.ranks, self.mixture.task_rank, tokens, self.width)
        of_heads = heads.computed(self.tasks, tokens, self.width, self.head_upsample)
        return {**self._counts(height, width, paths), "heads": of_heads}


def from_config(config: ConfigDict, tasks: tuple[Task, ...], taps: tuple[Tap, ...], device: Any) -> MLoRE:
    """The decoder of `config.model` for a backbone's taps and a device."""
    model, own = config.model, config.model.mlore
    height, width = (side // taps[0].stride for side in config.dataset.image_size)
    return MLoRE(
        tasks=tasks,
        taps=taps,
        width=model.feature_width,
        mixture=MixtureSpec(tuple(own.ranks), own.task_rank, own.top_k, own.merge, (height, width), model.norm),
        balance=own.balance,
        head_upsample=model.head_upsample,
        norm=model.norm,
        unroll=unrolled(model.unroll, device),
        dtype=jnp.dtype(config.dtype),
    )
