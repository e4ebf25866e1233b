"""Checkpoints of small trees of arrays instead of a model's."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from taskexpert_jax.runs import sealing
from taskexpert_jax.runs.checkpoints import Checkpoints
from taskexpert_jax.training.state import TrainState

BEST = SimpleNamespace(name="semseg", main_metric="mIoU", higher_is_better=True)
SIZE = 4096


def state(step, size=SIZE):
    """A state whose values depend on the step and do not compress."""
    weights = jax.random.normal(jax.random.key(step), (size // 16, 16))
    return TrainState(
        step=jnp.int32(step),
        params={"dense": {"kernel": weights, "bias": jnp.full((3,), step, jnp.float32)}},
        batch_stats={"mean": jnp.ones((2,))},
        opt_state={"mu": weights * 2},
        rng=jnp.array([1, step], jnp.uint32),
        ema={},
    )


def abstract(size=SIZE):
    shapes = jax.eval_shape(lambda: state(0, size))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)


def same(one, other):
    """True if two trees have the same dtypes and bits."""
    arrays = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other))
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(*arrays, strict=True))


@contextlib.contextmanager
def opened(workdir, **options):
    with contextlib.closing(Checkpoints(workdir, BEST, **options)) as checkpoints:
        yield checkpoints


def save(workdir, steps, metrics=None, config=None):
    """Saves the steps; metrics: mIoU by step, for the evaluated ones; config: the run's, in plain dicts."""
    with opened(workdir) as checkpoints:
        for step in steps:
            evaluated = {"semseg/mIoU": metrics[step]} if metrics and step in metrics else None
            checkpoints.save(step, state(step).to_items(), config or {"seed": 0}, evaluated)
            checkpoints.wait()


def largest(folder):
    return max(sealing.contents(folder), key=lambda path: path.stat().st_size)


def alter(path):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def opened_newest(workdir):
    with opened(workdir) as checkpoints:
        return checkpoints.restore_newest(abstract().to_items())


def unseal(workdir, step):
    """Removes the seal, as if the program was killed after the last file was written and before sealing."""
    (workdir / "checkpoints" / str(step) / sealing.MANIFEST).unlink()
