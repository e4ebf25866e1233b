"""PCGrad: conflicting gradients of tasks are projected onto each other's normal planes (Yu et al., NeurIPS 2020)."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from taskexpert_jax.tasks import Task
from taskexpert_jax.training.balancing.method import Balancing, Tree


class PCGrad(Balancing):
    """The sum of the tasks' projected gradients, on shared parameters; the plain sum on the others.

    A projected gradient is a linear combination of the tasks' gradients, so its coefficients follow from their inner
    products: the gradients are read twice, and stored once.
    """

    separate = True

    def combined(self, gradients: Tree, shared: Tree, key: jax.Array) -> tuple[Tree, jax.Array]:
        products = jax.tree.leaves(jax.tree.map(_inner_products, gradients, shared))
        weights = jnp.sum(projections(jnp.sum(jnp.stack(products), axis=0), key), axis=0)  # (T,)

        def combine(stacked: jax.Array, mask: jax.Array) -> jax.Array:
            factors = weights.reshape(-1, *(1,) * (stacked.ndim - 1))
            return jnp.sum(jnp.where(mask, factors, 1.0) * stacked, axis=0)

        return jax.tree.map(combine, gradients, shared), weights


def projections(products: jax.Array, key: jax.Array) -> jax.Array:
    """Coefficients (T, T) of all gradients in each task's projected one.

    Each gradient loses its component along every other one (as it was) that it conflicts with, in random order.

    products: inner products of the tasks' gradients (T, T).
    """
    unit = jnp.eye(len(products))

    def of_task(task: jax.Array, key: jax.Array) -> jax.Array:
        def project(row: jax.Array, other: jax.Array) -> tuple[jax.Array, None]:
            product = jnp.sum(row * products[:, other])
            conflict = (other != task) & (product < 0)
            length = jnp.where(conflict, products[other, other], 1.0)
            return row - jnp.where(conflict, product / length, 0.0) * unit[other], None

        return jax.lax.scan(project, unit[task], jax.random.permutation(key, len(products)))[0]

    return jax.vmap(of_task)(jnp.arange(len(products)), jax.random.split(key, len(products)))


def _inner_products(stacked: jax.Array, mask: jax.Array) -> jax.Array:
    """(T, ...) -> (T, T), over the shared parameters."""
    own = jnp.where(mask, stacked, 0.0)
    axes = list(range(1, stacked.ndim))
    return jnp.tensordot(own, own, (axes, axes), precision=jax.lax.Precision.HIGHEST)


def from_config(config: ConfigDict, tasks: tuple[Task, ...]) -> PCGrad:
    """The method; it has no fields."""
    del config, tasks
    return PCGrad()
