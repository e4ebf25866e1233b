"""The losses of a step: those of each task's upsampled logits, with their gradients, one after the other."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import random_batch
from configs import nyud, pascal_context
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import objective

SIZE = (24, 32)


@pytest.fixture(scope="module", params=[nyud, pascal_context], ids=["nyud", "pascal_context"])
def case(request):
    """Tasks, logits at a quarter of the size of the labels, and a batch whose last example is padding."""
    config = request.param.get_config("tiny")
    config.dataset.image_size = SIZE
    tasks = from_config(config)
    batch = random_batch.make(config, tasks, 2, seed=0, whole=False)
    rng = np.random.default_rng(1)
    small = {task.name: jnp.asarray(rng.normal(size=(2, 6, 8, task.channels)), jnp.float32) for task in tasks}
    return tasks, small, batch


def plain(tasks, small, batch):
    """The definition: every map at image size, then every loss."""
    large = {
        name: jax.image.resize(maps, (len(maps), *SIZE, maps.shape[-1]), "bilinear") for name, maps in small.items()
    }
    return {task.name: task.loss(large[task.name], batch[task.name], batch["mask"]) for task in tasks}


def test_losses_and_their_gradients_are_those_of_the_maps_at_image_size(case):
    tasks, small, batch = case
    weights = {task.name: float(2 + index) for index, task in enumerate(tasks)}

    def total(losses, small):
        found = losses(tasks, small, batch)
        return sum(weights[name] * loss for name, loss in found.items()), found

    (_, found), grads = jax.jit(jax.value_and_grad(lambda s: total(objective.losses, s), has_aux=True))(small)
    (_, expected), expected_grads = jax.jit(jax.value_and_grad(lambda s: total(plain, s), has_aux=True))(small)
    for name in small:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
        np.testing.assert_allclose(
            grads[name], expected_grads[name], atol=1e-6 * np.abs(expected_grads[name]).max(), err_msg=name
        )
        assert np.abs(grads[name]).max() > 0


def test_a_task_waits_for_the_one_before(case):
    """Each loss depends on the last, by the barriers that XLA may not move across."""
    tasks, small, batch = case
    jaxpr = jax.make_jaxpr(jax.grad(lambda s: sum(objective.losses(tasks, s, batch).values())))(small).jaxpr
    made: dict[object, set[int]] = {}  # variable -> the barriers that it depends on
    count, last = 0, set()
    for eqn in jaxpr.eqns:
        depends = {barrier for var in eqn.invars if not isinstance(var, jax.extend.core.Literal)
                   for barrier in made.get(var, set())}  # fmt: skip
        if eqn.primitive.name == "optimization_barrier":
            if count % 2 == 0:
                assert last <= depends
            depends |= {count}
            last = depends
            count += 1
        made |= dict.fromkeys(eqn.outvars, depends)
    assert count == 2 * len(tasks)


def test_labels_set_the_size(case):
    tasks, small, batch = case
    half = {name: label[:, ::2, ::2] if label.ndim == 4 else label for name, label in batch.items()}
    found = objective.losses(tasks[:1], small, half)[tasks[0].name]
    large = jax.image.resize(jnp.asarray(small[tasks[0].name]), (2, 12, 16, tasks[0].channels), "bilinear")
    np.testing.assert_allclose(found, tasks[0].loss(large, half[tasks[0].name], half["mask"]), rtol=1e-6)
