"""One training step of a small model on any mesh of the simulated devices, for tests that compare steps."""

import math
import zlib

import jax
import numpy as np

from configs import ablation, cityscapes, demo, nyud, nyud13
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing, optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step


def with_decoder(config, decoder):
    config.model.decoder = decoder
    return config


def with_balancing(config, method):
    config.balancing = method
    return config


SHIPPED = {
    "demo": lambda: demo.get_config("tiny"),
    "nyud": lambda: nyud.get_config("tiny"),
    "nyud13": lambda: nyud13.get_config("tiny"),
    "cityscapes": lambda: cityscapes.get_config("tiny"),
    "baseline": lambda: with_decoder(nyud.get_config("tiny"), "baseline"),
    "mlore": lambda: with_decoder(nyud.get_config("tiny"), "mlore"),
    "pcgrad": lambda: with_balancing(nyud.get_config("tiny"), "pcgrad"),
    "famo": lambda: with_balancing(nyud.get_config("tiny"), "famo"),
    "swin": lambda: nyud.get_config("swin_t"),
    "ablation": lambda: ablation.get_config("read_conv3x3"),  # the memory is read by a convolution of each task
}

TWO_TASKS = {"nyud13": ("depth", "normals"), "cityscapes": ("semseg", "disparity")}


def small(name):
    """A shipped config so small that its step compiles in seconds, with widths that eight devices divide.

    The demo keeps its six tasks, the others have two.
    """
    config = SHIPPED[name]()
    config.dataset.semseg_classes = ("road", "grass", "sky")
    config.tasks = config.tasks if name == "demo" else TWO_TASKS.get(name, ("semseg", "normals"))
    config.dtype, config.batch_size = "float32", 8
    config.dataset.image_size = (32, 32)
    config.model.unroll = "no"
    if config.model.backbone == "swin":
        config.model.swin.update({"width": 16, "depths": (2, 2, 2, 2), "heads": (2, 2, 4, 8), "window": 3})
        config.dataset.image_size = (64, 64)
    else:
        config.model.patch_size, config.model.width = 8, 32
        config.model.depth, config.model.taps, config.model.heads = 2, 2, 8
    config.model.feature_width, config.model.gate.width, config.model.experts = 16, 8, 3
    config.model.mlore.update({"ranks": (2, 6, 8), "task_rank": 4, "top_k": 2})
    config.model.drop_path, config.model.head_upsample = 0.3, 2
    return config


def random_batch(config, ignored=0.1):
    """Eight examples with other windows and other ignored pixels each."""
    draw = np.random.default_rng(0)
    height, width = config.dataset.image_size
    batch = {
        "image": draw.integers(0, 256, (8, height, width, 3), np.uint8),
        "window": np.array([[i % 3, 0, height - i % 5, width] for i in range(8)], np.int32),
        "mask": np.ones(8, np.float32),
    }
    for task in from_config(config):
        shape = (8, height, width, task.label_channels)
        integer = np.issubdtype(task.label_dtype, np.integer)
        label = draw.integers(0, task.channels, shape) if integer else draw.normal(size=shape)
        label[draw.random(shape[:3]) < ignored] = task.ignore
        batch[task.name] = label.astype(task.label_dtype)
    return batch


def drawn(abstract, scale=0.1):
    """A state with values that are a function of each array's name and shape, placed as `abstract` says."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "params" not in name and "batch_stats" not in name:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        noise = scale * np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        value = 1 + np.abs(noise) if name.endswith(("['scale']", "['var']")) else noise
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def mesh_of(sizes, of_slices=None):
    """The mesh; of_slices: config.mesh's fields of slices."""
    devices = jax.devices()[: math.prod(sizes)]
    axes = dict(zip(sharding.AXES, sizes, strict=True))
    return sharding.make_mesh({**axes, **(of_slices or {})}, {"batch_size": 8}, devices)


def step_on(config, sizes, ignored=0.1, of_slices=None):
    """(sums, Adam's moments, batch statistics) after one training step on a mesh, on the host."""
    mesh, tasks = mesh_of(sizes, of_slices), from_config(config)
    model = taskexpert.from_config(config, tasks)
    with sharding.use(mesh):
        tx = optimizer.build(config, model.backbone)
        method = balancing.from_config(config, tasks)
        _, abstract, shardings = train_state.abstract_and_shardings(model, tx, mesh, config.seed, balancing=method)
        step = make_train_step(model, tx, config, mesh, shardings)
        (batch,) = sharding.to_devices([random_batch(config, ignored)], mesh)
        seen = tally.empty(tasks, weights=method.weighs)
        arguments = drawn(abstract), jax.device_put(seen, sharding.replicated(mesh)), batch
        state, seen = jax.device_get(step(*arguments))
    # Adam's first moment is a tenth of the gradient, which Adam's update itself would hide.
    return seen.sums, state.opt_state, state.batch_stats
