"""Every mesh computes what one device computes, and what lies where on a mesh."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nyud, pascal_context
from taskexpert_jax.config import VARIANTS
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer
from taskexpert_jax.training import state as train_state
from tests.training import one_step

pytestmark = pytest.mark.multidevice


@functools.cache
def one_device(name):
    return one_step.step_on(one_step.small(name), (1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "of_slices"),
    [
        *(("nyud", sizes, None) for sizes in [(8, 1, 1), (1, 1, 8), (1, 4, 2)]),
        *(
            (name, (2, 2, 2), None)
            for name in ("demo", "nyud13", "cityscapes", "ablation", "baseline", "mlore", "swin")
        ),
        *((name, (1, 2, 1), None) for name in ("pcgrad", "famo")),
        ("nyud", (2, 4, 1), {"slices": 2, "fsdp_slices": 2}),
    ],
)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name, sizes, of_slices):
    """Each axis on two tasks; all axes on all tasks, and where convolutions read the memory; balanced; two slices."""
    sums, moments, statistics = one_step.step_on(one_step.small(name), sizes, of_slices=of_slices)
    expected_sums, expected_moments, expected_statistics = one_device(name)
    # Sums of other orders are amplified by Swin's norms and softmaxes, three times as many as those of the others.
    close = 1e-4 if name == "swin" else 1e-5
    for key, value in expected_sums.items():
        np.testing.assert_allclose(sums[key], value, rtol=close, err_msg=key)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_moments))

    def compare(path, ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=close, atol=close * largest, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, moments, expected_moments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), statistics, expected_statistics)


# --- what lies where, at full size: shapes only ---


def abstract_state(config, sizes):
    mesh, model = one_step.mesh_of(sizes), taskexpert.from_config(config, from_config(config))
    with sharding.use(mesh):
        return train_state.abstract_and_shardings(
            model, optimizer.build(config, model.backbone), mesh, 0, averaged=True
        )[1]


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
    with sharding.use(one_step.mesh_of((4, 1, 2))):
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
