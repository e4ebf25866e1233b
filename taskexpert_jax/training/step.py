"""Train step: forward, backward and update, as one jitted program on a mesh."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
import optax

from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.parallel import sharding
from taskexpert_jax.training import balancing as methods
from taskexpert_jax.training import gradients, optimizer
from taskexpert_jax.training.state import TrainState
from taskexpert_jax.training.tally import Tally

Batch = Mapping[str, jax.Array]


def make_train_step(
    model: MultiTaskModel, tx: optax.GradientTransformation, config: ConfigDict, mesh: Mesh, state_shardings: TrainState
) -> Callable[[TrainState, Tally, Batch], tuple[TrainState, Tally]]:
    """(state, tally, batch) -> (state, tally), jitted on the mesh; the state is donated.

    A step whose loss or gradient is NaN or Inf only increments the step counter. After more than
    `config.guard.skip_steps` of them not even that: the state remains the one before the last of them.

    The gradient is that of `gradients.make`, for the method of `config.balancing`.
    """
    averaged = optimizer.average(config.optimizer.ema_decay)
    balancing = methods.from_config(config, model.tasks)
    gradients_of = gradients.make(model, config, balancing, state_shardings.params)

    def step(state: TrainState, tally: Tally, batch: Batch) -> tuple[TrainState, Tally]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        found = gradients_of(state, batch, key)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(found.params)
            updates, opt_state = tx.update(found.params, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = averaged(state.ema, params, state.step) if state.ema else {}
        updated = state.replace(params=params, batch_stats=found.batch_stats, opt_state=opt_state, ema=ema)
        if state.balancing:
            with jax.named_scope("balancing"):
                losses = gradients.weighted(model, found.losses)
                updated = updated.replace(balancing=balancing.updated(state.balancing, losses))
        with jax.named_scope("guard"):
            taken = tally.skipped <= config.guard.skip_steps
            applied = taken & jnp.isfinite(found.total) & jnp.isfinite(grad_norm)
            chosen = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
            tally = tally.add(
                state.step + 1, found.total, found.losses, grad_norm, found.weights, taken=taken, applied=applied
            )
            passed = taken & (tally.skipped <= config.guard.skip_steps)
            return chosen.replace(step=state.step + passed), tally

    places = (state_shardings, sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def batch_sizes(config: ConfigDict) -> dict[str, int]:
    """Config field -> global batch size, for every batch that is split over the devices."""
    micro_batch = config.batch_size // config.accumulate_steps
    sizes = {"batch_size": config.batch_size, "eval.batch_size": config.eval.batch_size}
    return sizes if config.accumulate_steps == 1 else {**sizes, "batch_size / accumulate_steps": micro_batch}
