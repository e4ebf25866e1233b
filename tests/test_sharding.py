"""Every mesh computes what one device computes; what lies where; compilations and transfers of the training loop."""

import collections
import contextlib
import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablation, demo, folder, nyud, pascal_context
from taskexpert_jax import optimizer, sharding, train, train_state
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import mmoe, taskexpert, vit
from taskexpert_jax.tasks import from_config

pytestmark = pytest.mark.multidevice

SHIPPED = {
    "demo": demo.get_config,
    "nyud": nyud.get_config,
    "pascal_context": pascal_context.get_config,
    "folder": folder.get_config,
    "ablation": lambda _: ablation.get_config(),
}


def small(name):
    """A shipped config so small that its step compiles in seconds; widths that eight devices divide."""
    config = SHIPPED[name]("tiny")
    if name == "folder":
        config.dataset.semseg_classes = ("road", "grass", "sky")
    config.dtype, config.batch_size = "float32", 8
    config.dataset.image_size = (32, 32)
    config.model.patch_size, config.model.unroll = 8, "no"
    config.model.width, config.model.depth, config.model.taps, config.model.heads = 32, 2, 2, 8
    config.model.feature_width, config.model.gate.width, config.model.experts = 16, 8, 3
    config.model.drop_path = 0.3
    config.model.head_upsample = 2
    return config


def random_batch(config, size=8):
    """A batch with every kind of label; windows and ignored pixels differ from example to example."""
    draw = np.random.default_rng(0)
    height, width = config.dataset.image_size
    batch = {
        "image": draw.integers(0, 256, (size, height, width, 3), np.uint8),
        "window": np.array([[i % 3, 0, height - i % 5, width] for i in range(size)], np.int32),
        "mask": np.ones(size, np.float32),
    }
    for task in from_config(config):
        shape = (size, height, width, task.label_channels)
        if np.issubdtype(task.label_dtype, np.integer):
            label = draw.integers(0, task.channels if task.channels > 1 else 2, shape)
        else:
            label = draw.normal(size=shape) + 2
        label[draw.random(shape[:3]) < 0.1] = task.ignore
        batch[task.name] = label.astype(task.label_dtype)
    return batch


def step_on(config, sizes):
    """(sums, gradients, batch statistics) of the first training step on a mesh, on the host."""
    devices = jax.devices()[: math.prod(sizes)]
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), {"batch_size": 8}, devices)
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    with sharding.use(mesh):
        tx = optimizer.build(config)
        initialise, _, shardings = train_state.abstract_and_shardings(model, tx, mesh, config.seed)
        state = jax.jit(initialise, out_shardings=shardings)()
        step = train.make_train_step(model, tx, config, mesh, shardings)
        (batch,) = sharding.to_devices([random_batch(config)], mesh)
        state, sums = jax.device_get(step(state, train.zero_sums(tasks), batch))
    # Adam's first moment is a tenth of the gradient, which Adam's update itself would hide.
    return sums, state.opt_state, state.batch_stats


@functools.cache
def one_device(name):
    return step_on(small(name), (1, 1, 1))


CASES = [
    *(("demo", sizes) for sizes in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 1, 4), (2, 2, 2)]),
    *((name, (2, 2, 2)) for name in ("nyud", "pascal_context", "folder", "ablation")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)))
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name, sizes):
    """Every mesh on the config with all six tasks, and the mesh with all axes on every other config."""
    sums, moments, statistics = step_on(small(name), sizes)
    expected_sums, expected_moments, expected_statistics = one_device(name)
    for key, value in expected_sums.items():
        np.testing.assert_allclose(sums[key], value, rtol=1e-5, err_msg=key)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_moments))

    def compare(path, ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, moments, expected_moments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), statistics, expected_statistics)
