"""Train step: forward, backward and update, as one jitted program on a mesh."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
import optax

from taskexpert_jax.models import inputs
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.parallel import sharding
from taskexpert_jax.training import objective, optimizer
from taskexpert_jax.training.state import TrainState
from taskexpert_jax.training.tally import Tally

Batch = Mapping[str, jax.Array]


def make_train_step(
    model: MultiTaskModel, tx: optax.GradientTransformation, config: ConfigDict, mesh: Mesh, state_shardings: TrainState
) -> Callable[[TrainState, Tally, Batch], tuple[TrainState, Tally]]:
    """(state, tally, batch) -> (state, tally), jitted on the mesh; the state is donated.

    A step whose loss or gradient is NaN or Inf only increments the step counter. After more than
    `config.guard.skip_steps` of them not even that: the state remains the one before the last of them.

    With `config.accumulate_steps` > 1 the batch is split into that many micro-batches, whose gradients are averaged;
    batch statistics are carried from one to the next.
    """
    tasks, accumulate = model.tasks, config.accumulate_steps
    averaged = optimizer.average(config.optimizer.ema_decay)

    def loss_fn(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        (logits, aux), updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs.normalise(batch["image"], batch["window"], model.normalisation),
            train=True,
            return_aux=True,
            full_size=False,
            rngs={"drop_path": key, "gate_noise": jax.random.fold_in(key, 0)},
            mutable=["batch_stats"],
        )
        losses = objective.losses(tasks, logits, batch)
        total = sum((task.loss_weight * losses[task.name] for task in tasks), start=jnp.zeros(()))
        image_size = (batch["image"].shape[1], batch["image"].shape[2])
        pixels = functools.partial(inputs.token_pixels, batch["window"], batch["mask"], image_size)
        total = total + model.decoder.penalty(aux, pixels)
        return total, (losses, updates.get("batch_stats", {}))

    def gradients(state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, Any, jax.Array, dict[str, jax.Array]]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate == 1:
            (total, (losses, batch_stats)), grads = grad_fn(state.params, state.batch_stats, batch, key)
            return grads, batch_stats, total, losses

        def micro(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            batch_stats, sums = carry
            (total, (losses, batch_stats)), grads = grad_fn(state.params, batch_stats, *xs)
            return (batch_stats, jax.tree.map(jnp.add, sums, (grads, total, losses))), None

        zeros = (
            jax.tree.map(jnp.zeros_like, state.params),
            jnp.zeros(()),
            {task.name: jnp.zeros(()) for task in tasks},
        )
        keys = jax.random.split(key, accumulate)
        (batch_stats, sums), _ = jax.lax.scan(micro, (state.batch_stats, zeros), (split_batch(batch, accumulate), keys))
        grads, total, losses = jax.tree.map(lambda leaf: leaf / accumulate, sums)
        return grads, batch_stats, total, losses

    def step(state: TrainState, tally: Tally, batch: Batch) -> tuple[TrainState, Tally]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads, batch_stats, total, losses = gradients(state, batch, key)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(grads)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = averaged(state.ema, params, state.step) if state.ema else {}
        updated = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema)
        with jax.named_scope("guard"):
            taken = tally.skipped <= config.guard.skip_steps
            applied = taken & jnp.isfinite(total) & jnp.isfinite(grad_norm)
            chosen = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
            tally = tally.add(state.step + 1, total, losses, grad_norm, taken=taken, applied=applied)
            passed = taken & (tally.skipped <= config.guard.skip_steps)
            return chosen.replace(step=state.step + passed), tally

    places = (state_shardings, sharding.replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=places)


def split_batch(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...); no row moves to another device."""

    def split(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1)
        mesh = jax.sharding.get_abstract_mesh()
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))

    return jax.tree.map(split, dict(batch))


def batch_sizes(config: ConfigDict) -> dict[str, int]:
    """Config field -> global batch size, for every batch that is split over the devices."""
    micro_batch = config.batch_size // config.accumulate_steps
    sizes = {"batch_size": config.batch_size, "eval.batch_size": config.eval.batch_size}
    return sizes if config.accumulate_steps == 1 else {**sizes, "batch_size / accumulate_steps": micro_batch}
