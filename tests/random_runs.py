"""Runs with a checkpoint of random parameters, as if a model had been trained; nothing is compiled for them."""

import contextlib
import json
import pathlib

from ml_collections import ConfigDict

from configs import demo
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer
from taskexpert_jax.training import state as train_state
from tests.training import one_step

# Fields that the shapes of a checkpoint do not tell, with values other than their defaults: only the run's own config
# makes the model that was trained.
NOT_IN_THE_SHAPES = {
    "model.gate.top_k": 2,
    "model.gate.temperature": 0.5,
    "model.gate.granularity": "image",
    "model.memory.write": "replace",
    "model.head_upsample": 1,
    "model.image_mean": (0.1, 0.2, 0.3),
    "model.image_std": (0.5, 0.6, 0.7),
}


def padded_scenes() -> ConfigDict:
    """Scenes of 24x36 pixels in frames of 32x48, so that there is padding around each of them, on all devices."""
    config = demo.get_config("tiny")
    config.dataset.downscale = 0.75
    config.mesh.data, config.mesh.fsdp = 4, 2
    config.batch_size = config.eval.batch_size = 8
    config.eval.boundary.max_dist = 0.05
    return config


def save(config: ConfigDict, workdir: pathlib.Path, scale: float = 0.1) -> train_state.TrainState:
    """Makes the workdir with a checkpoint of step 0; scale: of the parameters' noise."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    tasks = from_config(config)
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh), contextlib.closing(Checkpoints(workdir, tasks[0])) as checkpoints:
        model = taskexpert.from_config(config, tasks)
        averaged = config.optimizer.ema_decay > 0
        _, abstract, _ = train_state.abstract_and_shardings(
            model, optimizer.build(config, model.backbone), mesh, config.seed, averaged=averaged
        )
        state = one_step.drawn(abstract, scale)
        checkpoints.save(int(state.step), state.to_items(), config.to_dict(), None)
    return state
