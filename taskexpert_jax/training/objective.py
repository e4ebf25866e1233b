"""What a step minimises: the losses of all tasks at image size, made one task after the other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from taskexpert_jax.models.upsampling import resize_bilinear
from taskexpert_jax.tasks import Task

Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def losses(
    tasks: Sequence[Task], logits: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The loss of every task, of logits that are upsampled to the size of its label.

    Float32 maps of image size are the largest arrays of a step but for the state, and a loss needs several. Left alone,
    XLA makes all tasks' before it uses the first. Here a task's exist only while its own loss is made: the gradient of
    the small logits is made with it, and the next task waits for both.

    Args:
      logits: by task, (B, h, w, channels), as `TaskExpert` returns them with `full_size=False`.
      batch: labels by task, (B, H, W, ...), and `mask` (B,).

    Returns:
      By task, a scalar; see `Task.loss`.
    """
    found: dict[str, jax.Array] = {}
    before = jnp.zeros(())
    for task in tasks:
        before = _after(task)(logits[task.name], batch[task.name], batch["mask"], before)
        found[task.name] = before
    return found


def _after(task: Task) -> Loss:
    """(logits, label, mask, a loss) -> the task's loss, made after that other one."""

    def at_image_size(logits: jax.Array, label: jax.Array, mask: jax.Array) -> jax.Array:
        return task.loss(resize_bilinear(logits, label.shape[1], label.shape[2]), label, mask)

    @jax.custom_vjp
    def loss(logits: jax.Array, label: jax.Array, mask: jax.Array, before: jax.Array) -> jax.Array:
        del before
        return at_image_size(logits, label, mask)

    def forward(logits: jax.Array, label: jax.Array, mask: jax.Array, before: jax.Array) -> Any:
        logits, _ = jax.lax.optimization_barrier((logits, before))
        return jax.lax.optimization_barrier(jax.value_and_grad(at_image_size)(logits, label, mask))

    def backward(gradient: jax.Array, cotangent: jax.Array) -> Any:
        return (cotangent * gradient).astype(gradient.dtype), None, None, None

    loss.defvjp(forward, backward)
    return loss
