"""The protocol's optimiser: clip, L2, Adam, polynomial decay."""

from typing import Any

import jax.numpy as jnp
import optax


def learning_rate(config: Any) -> optax.Schedule:
    """step -> learning_rate * (1 - step / num_steps) ** schedule_power, after an optional linear warm-up."""
    settings = config.optimizer

    def schedule(step: Any) -> Any:
        remaining = jnp.maximum(1.0 - step / config.num_steps, 0.0)
        rise = jnp.minimum(1.0, (step + 1) / max(settings.warmup_steps, 1))
        return settings.learning_rate * remaining**settings.schedule_power * rise

    return schedule


def build(config: Any) -> optax.GradientTransformation:
    """The optimiser of `config.optimizer`.

    In the order of the field's code: the gradient is clipped to a global norm, weight_decay * parameter is added to it
    (an L2 term, not AdamW's decay), then come Adam's moments (0.9, 0.999, eps 1e-8) and the learning rate.
    """
    settings = config.optimizer
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
