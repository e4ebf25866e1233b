"""Gradient of a batch: of the balanced losses, or of each task by itself where the balancing method wants that."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from taskexpert_jax.models import inputs, variables
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.training import objective
from taskexpert_jax.training.balancing.method import Balancing
from taskexpert_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]


class Gradients(NamedTuple):
    """Results of a batch.

    Attributes:
      params: gradient of the parameters.
      batch_stats: updated batch statistics.
      total: sum of loss_weight * loss and the decoder's penalty, whatever the balancing.
      losses: loss of each task.
      weights: weight of each task's loss in the gradient, `loss_weight` included; {} where they are fixed.
    """

    params: Any
    batch_stats: Any
    total: jax.Array
    losses: dict[str, jax.Array]
    weights: dict[str, jax.Array]


def weighted(model: MultiTaskModel, losses: Mapping[str, jax.Array]) -> jax.Array:
    """The losses (T,) that a balancing method sees: loss_weight * loss."""
    return jnp.stack([task.loss_weight * losses[task.name] for task in model.tasks])


def make(
    model: MultiTaskModel, config: ConfigDict, balancing: Balancing, places: Any
) -> Callable[[TrainState, Batch, jax.Array], Gradients]:
    """(state, batch, key) -> `Gradients`.

    With `config.accumulate_steps` > 1 the batch is split into that many micro-batches, whose gradients are averaged;
    batch statistics are carried from one to the next.

    places: shardings of the parameters.
    """
    tasks, accumulate = model.tasks, config.accumulate_steps
    names = [task.name for task in tasks]

    def forward(params: Any, batch_stats: Any, batch: Batch, key: jax.Array) -> tuple[Any, jax.Array, jax.Array, Any]:
        """Losses, their fixed sum, the penalty and batch statistics."""
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
        return losses, total, model.decoder.penalty(aux, pixels), updates.get("batch_stats", {})

    def together(state: TrainState, batch_stats: Any, batch: Batch, key: jax.Array) -> Gradients:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            losses, total, penalty, updated = forward(params, batch_stats, batch, key)
            seen = weighted(model, losses)
            factors = balancing.weights(state.balancing, jax.lax.stop_gradient(seen))
            if factors is None:
                return total + penalty, (updated, total + penalty, losses, {})
            factors = jax.lax.stop_gradient(factors)
            weights = {task.name: task.loss_weight * factors[i] for i, task in enumerate(tasks)}
            return jnp.sum(factors * seen) + penalty, (updated, total + penalty, losses, weights)

        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return Gradients(grads, *aux)

    def separately(state: TrainState, batch_stats: Any, batch: Batch, key: jax.Array) -> Gradients:
        """`params`: the gradients of each task, stacked, and the penalty's.

        One forward pass and a backward pass per task, one after the other: memory for the intermediate results of one,
        and for T gradients. The penalty has passes of its own, which cost nothing where it is constant.
        """

        def losses_of(params: Any) -> tuple[jax.Array, Any]:
            losses, total, penalty, updated = forward(params, batch_stats, batch, key)
            return weighted(model, losses), (updated, total + penalty, losses, {})

        def of_task(chosen: jax.Array) -> Any:
            (grads,) = backward(chosen)
            return jax.lax.with_sharding_constraint(grads, places)

        _, backward, aux = jax.vjp(losses_of, state.params, has_aux=True)
        stacked = jax.lax.map(of_task, jnp.eye(len(tasks)))
        penalty = jax.grad(lambda params: forward(params, batch_stats, batch, key)[2])(state.params)
        return Gradients((stacked, penalty), *aux)

    one_batch = separately if balancing.separate else together

    def averaged(state: TrainState, batch: Batch, key: jax.Array) -> Gradients:
        if accumulate == 1:
            return one_batch(state, state.batch_stats, batch, key)

        def micro(carry: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            batch_stats, sums = carry
            found = one_batch(state, batch_stats, *xs)
            return (found.batch_stats, jax.tree.map(jnp.add, sums, found._replace(batch_stats={}))), None

        micro_batches = split_batch(batch, accumulate), jax.random.split(key, accumulate)
        first = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], micro_batches))
        shapes = jax.eval_shape(one_batch, state, state.batch_stats, *first)._replace(batch_stats={})
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (batch_stats, sums), _ = jax.lax.scan(micro, (state.batch_stats, zeros), micro_batches)
        means = jax.tree.map(lambda leaf: leaf / accumulate, sums)
        return means._replace(batch_stats=batch_stats)

    def combined(state: TrainState, batch: Batch, key: jax.Array) -> Gradients:
        found = averaged(state, batch, key)
        if not balancing.separate:
            return found
        stacked, penalty = found.params
        with jax.named_scope("balancing"):
            shared = shared_parameters(stacked, _task_axes(model))
            grads, factors = balancing.combined(stacked, shared, jax.random.fold_in(key, 1))
        weights = {name: task.loss_weight * factors[i] for i, (name, task) in enumerate(zip(names, tasks, strict=True))}
        return found._replace(params=jax.tree.map(jnp.add, grads, penalty), weights=weights)

    return combined


def shared_parameters(stacked: Any, task_axes: Any) -> Any:
    """Masks that broadcast to the parameters: True where more than one task has a gradient.

    An array is shared or not as a whole, but one with an axis of tasks is not shared where one task's part has a
    gradient from that task alone.

    Args:
      stacked: gradients of each task: (T, ...) for every parameter (...).
      task_axes: axis of tasks of every parameter; -1 without one.
    """

    def mask(leaf: jax.Array, axis: int) -> jax.Array:
        others = tuple(d for d in range(1, leaf.ndim) if d != axis + 1)
        used = jnp.any(leaf != 0, axis=others, keepdims=True)
        return jnp.sum(used, axis=0) > 1

    return jax.tree.map(mask, stacked, task_axes)


def _task_axes(model: MultiTaskModel) -> Any:
    """The axis named `tasks` of every parameter; -1 without one."""
    boxed = jax.eval_shape(lambda: variables.init(model, jax.random.key(0)))["params"]

    def axis(box: Any) -> int:
        names = getattr(box, "names", ())
        return names.index("tasks") if "tasks" in names else -1

    return jax.tree.map(axis, boxed, is_leaf=lambda node: hasattr(node, "names"))


def split_batch(batch: Batch, count: int) -> Batch:
    """(B, ...) -> (count, B / count, ...); no row moves to another device."""

    def split(leaf: jax.Array) -> jax.Array:
        parts = leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:]).swapaxes(0, 1)
        mesh = jax.sharding.get_abstract_mesh()
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"))))

    return jax.tree.map(split, dict(batch))
