"""Optimiser of the protocol (clipping, L2, Adam, polynomial decay), and common alternatives for ViTs."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from taskexpert_jax.models.backbones.backbone import Backbone

Tree = Any  # a pytree of arrays


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Learning rate schedule, with an optional linear warm-up.

    polynomial: learning_rate * (1 - step / num_steps) ** schedule_power; cosine: half a cosine wave down to 0.
    """
    settings = config.optimizer

    def schedule(step: Any) -> Any:
        remaining = jnp.maximum(1.0 - step / config.num_steps, 0.0)
        rise = jnp.minimum(1.0, (step + 1) / max(settings.warmup_steps, 1))
        if settings.schedule == "cosine":
            return settings.learning_rate * 0.5 * (1.0 - jnp.cos(math.pi * remaining)) * rise
        return settings.learning_rate * remaining**settings.schedule_power * rise

    return schedule


def extension(config: ConfigDict, num_steps: int, step: int) -> str:
    """The consequence of raising `num_steps` from `num_steps` to the config's for the schedule, seen from a step."""
    before = config.copy_and_resolve_references()
    before.num_steps = num_steps
    was, now = (float(np.asarray(learning_rate(of)(step))) for of in (before, config))
    return (
        f"num_steps raised from {num_steps} to {config.num_steps}: at step {step} the learning rate is {now:.3g} "
        f"instead of {was:.3g}, since the {config.optimizer.schedule} decay now ends at step {config.num_steps}; the "
        f"result is not that of a run of {config.num_steps} steps"
    )


def build(config: ConfigDict, backbone: Backbone) -> optax.GradientTransformation:
    """Builds the optimiser of `config.optimizer`, for a model with this backbone.

    In the order of the published implementations: clips the gradient to a global norm, adds weight_decay * parameter
    (an L2 term, not AdamW's decay), then applies Adam's moments (0.9, 0.999, eps 1e-8) and the learning rate. With
    `algorithm=adamw` the decay is added after the moments instead, to kernels only.
    """
    settings = config.optimizer
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    if settings.algorithm == "adam":
        moments = (optax.add_decayed_weights(settings.weight_decay), adam)
    else:
        moments = (adam, optax.add_decayed_weights(settings.weight_decay, mask=_kernels))
    chain = [optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(), *moments]
    if settings.layer_decay != 1.0 or settings.backbone_rate != 1.0:
        chain.append(_scale_backbone(backbone, settings.backbone_rate, settings.layer_decay))
    return optax.chain(*chain, optax.scale_by_learning_rate(learning_rate(config)))


def backbone_rates(params: Tree, backbone: Backbone, rate: float, layer_decay: float) -> Tree:
    """Learning rate factors of all parameters, as arrays that broadcast to the parameters' shapes.

    1 for the decoder's parameters, rate * layer_decay ** (L - l) for those of the backbone's layer l of L, the
    embeddings being layer 0, as in BEiT's fine-tuning (arXiv 2106.08254).
    """

    def factor(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        layer = backbone.layer(jax.tree_util.keystr(path, simple=True, separator="/"))
        if layer is None:
            return jnp.float32(1.0)
        stacked = (-1, *(1,) * (len(leaf.shape) - 1)) if isinstance(layer, tuple) else ()
        return jnp.float32(rate * layer_decay ** (backbone.layers - np.asarray(layer, np.float64)).reshape(stacked))

    return jax.tree_util.tree_map_with_path(factor, params)


def _scale_backbone(backbone: Backbone, rate: float, layer_decay: float) -> optax.GradientTransformation:
    def scale(updates: Tree, params: Tree | None) -> Tree:
        del params
        return jax.tree.map(jnp.multiply, updates, backbone_rates(updates, backbone, rate, layer_decay))

    return optax.stateless(scale)


def _kernels(params: Tree) -> Tree:
    """Mask of the kernels, which are decayed; biases, norms and embeddings are not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path[-1:]), params)


def average(decay: float) -> Callable[[Tree, Tree, jax.Array], Tree]:
    """Update (average, parameters, step) -> average of an exponential moving average, in float32.

    Its decay rises from 0.1 towards `decay` as (1 + step) / (10 + step), so that initial values are soon forgotten.
    """

    def update(averaged: Tree, params: Tree, step: jax.Array) -> Tree:
        kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        return optax.incremental_update(params, averaged, 1.0 - kept)

    return update
