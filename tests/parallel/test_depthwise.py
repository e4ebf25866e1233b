"""The gradient of a depthwise convolution on a mesh is that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskexpert_jax.models import layers
from taskexpert_jax.parallel import sharding
from tests.training import one_step

pytestmark = pytest.mark.multidevice


def gradient(sizes):
    """Gradient of a convolution and a dense layer whose kernel is sharded over fsdp and tensor."""
    draw = np.random.default_rng(0).normal
    mesh, conv = one_step.mesh_of(sizes), layers.depthwise_conv(8, 3, jnp.float32, "conv")
    maps = jnp.asarray(draw(size=(8, 6, 6, 8)), jnp.float32)
    kernels = {"conv": draw(size=(3, 3, 1, 8)), "dense": draw(size=(8, 16))}

    def loss(kernels, maps):
        maps = sharding.constrain(maps, "batch", None, None, None)
        hidden = conv.apply({"params": {"kernel": kernels["conv"], "bias": jnp.zeros(8)}}, maps)
        hidden = hidden @ sharding.constrain(kernels["dense"], "embed", "mlp")
        return jnp.square(jnp.tanh(sharding.constrain(hidden, "batch", None, None, "mlp"))).sum()

    with sharding.use(mesh):
        placed = jax.device_put(maps, sharding.batch_sharding(mesh))
        return jax.device_get(jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, kernels), placed))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_the_gradient_is_that_of_one_device(sizes):
    for name, expected in gradient((1, 1, 1)).items():
        np.testing.assert_allclose(gradient(sizes)[name], expected, rtol=1e-4, atol=1e-4, err_msg=name)
