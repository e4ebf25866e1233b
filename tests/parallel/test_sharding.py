"""Every mesh computes what one device computes, and what lies where on a mesh."""

import functools
import math
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablation, demo, folder, nyud, pascal_context
from taskexpert_jax.config import VARIANTS
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step

pytestmark = pytest.mark.multidevice

SHIPPED = {
    "demo": lambda: demo.get_config("tiny"),
    "nyud": lambda: nyud.get_config("tiny"),
    "pascal_context": lambda: pascal_context.get_config("tiny"),
    "folder": lambda: folder.get_config("tiny"),
    "ablation": lambda: ablation.get_config("read_conv3x3"),  # the memory is read by a convolution of each task
}

# Compiled in half the time; what is computed stays the same.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def small(name):
    """A shipped config so small that its step compiles in seconds, with widths that eight devices divide."""
    config = SHIPPED[name]()
    config.dataset.semseg_classes = ("road", "grass", "sky")
    config.tasks = ("semseg", "normals") if "normals" in config.tasks else config.tasks
    config.dtype, config.batch_size = "float32", 8
    config.dataset.image_size = (32, 32)
    config.model.patch_size, config.model.unroll = 8, "no"
    config.model.width, config.model.depth, config.model.taps, config.model.heads = 32, 2, 2, 8
    config.model.feature_width, config.model.gate.width, config.model.experts = 16, 8, 3
    config.model.drop_path, config.model.head_upsample = 0.3, 2
    return config


def random_batch(config):
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
        label[draw.random(shape[:3]) < 0.1] = task.ignore
        batch[task.name] = label.astype(task.label_dtype)
    return batch


def drawn(abstract):
    """A state with values that are a function of each array's name and shape, placed as `abstract` says."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "params" not in name and "batch_stats" not in name:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        noise = 0.1 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        value = 1 + noise if name.endswith(("['scale']", "['var']")) else noise
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def mesh_of(sizes):
    devices = jax.devices()[: math.prod(sizes)]
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), {"batch_size": 8}, devices)


def step_on(config, sizes):
    """(sums, Adam's moments, batch statistics) after one training step on a mesh, on the host."""
    mesh, tasks = mesh_of(sizes), from_config(config)
    model = taskexpert.from_config(config, tasks)
    with sharding.use(mesh):
        tx = optimizer.build(config)
        _, abstract, shardings = train_state.abstract_and_shardings(model, tx, mesh, config.seed)
        step = make_train_step(model, tx, config, mesh, shardings)
        (batch,) = sharding.to_devices([random_batch(config)], mesh)
        arguments = drawn(abstract), jax.device_put(tally.empty(tasks), sharding.replicated(mesh)), batch
        compiled = step.lower(*arguments).compile(compiler_options=FAST)
        state, seen = jax.device_get(compiled(*arguments))
    # Adam's first moment is a tenth of the gradient, which Adam's update itself would hide.
    return seen.sums, state.opt_state, state.batch_stats


@functools.cache
def one_device(name):
    return step_on(small(name), (1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("nyud", sizes) for sizes in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2)]),
        *((name, (2, 2, 2)) for name in ("folder", "ablation")),
    ],
)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name, sizes):
    """Every mesh on one config; tests/test_train.py has the mesh with all axes on the configs that are not here."""
    sums, moments, statistics = step_on(small(name), sizes)
    expected_sums, expected_moments, expected_statistics = one_device(name)
    for key, value in expected_sums.items():
        np.testing.assert_allclose(sums[key], value, rtol=1e-5, err_msg=key)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_moments))

    def compare(path, ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, moments, expected_moments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), statistics, expected_statistics)


# --- what lies where, at full size: shapes only ---


def abstract_state(config, sizes):
    mesh, model = mesh_of(sizes), taskexpert.from_config(config, from_config(config))
    with sharding.use(mesh):
        return train_state.abstract_and_shardings(model, optimizer.build(config), mesh, 0, averaged=True)[1]


def names_of(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def bytes_on_a_device(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.fixture(scope="module")
def fully_sharded():
    """The state of ViT-B on NYUD, with an average of the parameters, on 1x8x1."""
    return abstract_state(nyud.get_config("vit_b16"), (1, 8, 1))


def test_no_large_array_is_on_every_device(fully_sharded):
    """Norms, biases of the axes that `tensor` splits and the like are; the largest has 2**16 numbers of 152 M."""
    whole = {
        name: leaf.shape
        for name, leaf in names_of(fully_sharded).items()
        if leaf.sharding.is_fully_replicated and leaf.size > 2**16
    }
    assert whole == {}
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(fully_sharded))
    assert bytes_on_a_device(fully_sharded) < 1.02 * total / 8


def test_moments_and_average_lie_where_their_parameters_do(fully_sharded):
    parameters = names_of(fully_sharded.params)
    for tree, copies in ((fully_sharded.opt_state, 2), (fully_sharded.ema, 1)):  # Adam's two moments
        pairs = [
            (parameters[of], leaf) for name, leaf in names_of(tree).items() for of in parameters if name.endswith(of)
        ]
        assert len(pairs) == copies * len(parameters)
        assert all(leaf.sharding == parameter.sharding for parameter, leaf in pairs)


def test_a_tensor_axis_splits_heads_mlps_and_experts():
    state = abstract_state(nyud.get_config("vit_b16"), (1, 2, 4))
    specs = {name: leaf.sharding.spec for name, leaf in names_of(state.params).items()}
    (qkv,) = [spec for name, spec in specs.items() if "qkv_kernel" in name]
    (mlp,) = [spec for name, spec in specs.items() if "expand']['kernel" in name]
    (reduce,) = [spec for name, spec in specs.items() if "reduce']['kernel" in name]
    assert tuple(qkv) == (None, "fsdp", None, "tensor", None)
    assert tuple(mlp) == (None, "fsdp", "tensor")
    assert tuple(reduce) == (None, "fsdp", "tensor")


def test_what_a_mesh_axis_does_not_divide_stays_whole_along_it():
    """Three heads over two devices; 57 MLPs would be as well."""
    state = abstract_state(nyud.get_config("vit_ti16"), (4, 1, 2))
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in names_of(state.params).items()}
    (qkv,) = [spec for name, spec in specs.items() if "qkv_kernel" in name]
    (mlp,) = [spec for name, spec in specs.items() if "expand']['kernel" in name]
    assert "tensor" not in qkv and "tensor" in mlp
    heads = jnp.ones((8, 3, 4))
    with sharding.use(mesh_of((4, 1, 2))):
        laid_out = jax.jit(lambda x: sharding.constrain(x, "batch", "heads", None))(heads)
        split = jax.jit(lambda x: sharding.constrain(x, "batch", None, "heads"))(heads)
    assert laid_out.sharding.shard_shape(heads.shape) == (2, 3, 4)
    assert split.sharding.shard_shape(heads.shape) == (2, 3, 2)
    assert sharding.constrain(heads, "batch", "heads", None) is heads  # without a mesh


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_axis_of_every_parameter_has_a_name_that_the_rules_know(variant):
    config = pascal_context.get_config(variant)
    config.dtype = "float32"
    model = taskexpert.from_config(config, from_config(config))
    image = jax.ShapeDtypeStruct((1, *config.dataset.image_size, 3), jnp.float32)
    boxed = jax.eval_shape(lambda key, x: model.init(key, x, train=False)["params"], jax.random.key(0), image)
    boxes = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned))
    known = {name for name, _ in sharding.RULES}
    for path, box in boxes:
        name = jax.tree_util.keystr(path)
        assert isinstance(box, nn.LogicallyPartitioned), name
        assert len(box.names) == box.value.ndim and set(box.names) - {None} <= known, name
