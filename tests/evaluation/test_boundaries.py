"""Probabilities that a full pass hands to the boundary benchmark, in 8 bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax import tasks
from taskexpert_jax.evaluation import full_pass, steps
from taskexpert_jax.parallel import sharding

TASKS = tasks.build(("edge",), loss_weights={"edge": 1.0})
SIZE = (32, 48)


@pytest.mark.parametrize("how", ["truncate", "round"])
def test_strengths_are_those_of_the_config_or_of_the_files(how):
    logits = np.random.default_rng(0).normal(0, 3, (1, *SIZE, 1)).astype(np.float32)
    batch = {"edge": np.zeros((1, *SIZE, 1), np.uint8), "mask": np.ones(1), "window": np.array([[0, 0, *SIZE]])}
    given = np.full((1, *SIZE), 51, np.uint8)
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        step = full_pass.make_step(TASKS, lambda *_: ({"edge": jnp.asarray(logits)}, None), how, mesh)
        for strength in (None, given):
            own = batch if strength is None else {**batch, "strength/edge": strength}
            _, outputs = step({}, full_pass.Totals(steps.empty_states(TASKS), None), own)
            probability = np.asarray(outputs.values["edge"])
            expected = (255 * probability + (0.5 if how == "round" else 0)).astype(np.uint8)  # no ties among them
            np.testing.assert_array_equal(outputs.strengths["edge"], expected if strength is None else given)
