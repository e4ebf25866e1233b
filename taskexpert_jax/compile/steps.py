"""Traces the train and the eval step of a config for a mesh of devices that need not be present."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from taskexpert_jax.config import frame_size
from taskexpert_jax.evaluation import inference
from taskexpert_jax.evaluation import steps as evaluation_steps
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.training import balancing, optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import batch_sizes, make_train_step


def build(config: ConfigDict, devices: Sequence[Any]) -> tuple[Mesh, taskexpert.MultiTaskModel]:
    """The mesh over the devices, and the model built for them."""
    mesh = sharding.make_mesh(config.mesh, batch_sizes(config), devices)
    return mesh, taskexpert.from_config(config, from_config(config), devices[0])


def abstract_batch(
    tasks: Sequence[Task], batch_size: int, size: tuple[int, int], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch with images of `size` (H, W); see docs/conventions.md."""
    shapes = {
        "image": ((*size, 3), jnp.uint8),
        "window": ((4,), jnp.int32),
        "mask": ((), jnp.float32),
        **{task.name: ((*size, task.label_channels), task.label_dtype) for task in tasks},
    }
    place = sharding.batch_sharding(mesh)
    return {
        key: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=place) for key, (shape, dtype) in shapes.items()
    }


def tracers(config: ConfigDict, model: taskexpert.MultiTaskModel, mesh: Mesh) -> Mapping[str, Callable[[], Any]]:
    """Functions that trace the steps "train" and "eval" with the arguments of `train.train` and `evaluation.steps.run`.

    Call the returned functions, not this one, under `sharding.use(mesh)`.
    """
    tx = optimizer.build(config, model.backbone)
    method = balancing.from_config(config, model.tasks)
    _, state, shardings = train_state.abstract_and_shardings(
        model,
        tx,
        mesh,
        config.seed,
        averaged=config.optimizer.ema_decay > 0,
        balancing=method,
    )
    replicated = sharding.replicated(mesh)

    def placed(make: Callable[[], Any]) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), jax.eval_shape(make)
        )

    def training() -> Any:
        batch = abstract_batch(model.tasks, config.batch_size, tuple(config.dataset.image_size), mesh)
        step: Any = make_train_step(model, tx, config, mesh, shardings)
        return step.trace(state, placed(lambda: tally.empty(model.tasks, weights=method.weighs)), batch)

    def evaluation() -> Any:
        batch = abstract_batch(model.tasks, config.eval.batch_size, frame_size(config), mesh)
        step: Any = evaluation_steps.make_eval_step(model.tasks, inference.make_inference(model, config), mesh)
        return step.trace(state.variables(), placed(lambda: evaluation_steps.empty_states(model.tasks)), batch)

    return {"train": training, "eval": evaluation}
