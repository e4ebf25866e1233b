"""Task losses at image size, computed one task after the other to save memory."""

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
    """Loss of every task, of logits upsampled to the size of its label.

    Float32 maps of image size are the largest arrays of a step after the state, and a loss needs several. By default
    XLA computes those of all tasks before it uses the first. Here they exist only while their own loss is computed,
    together with the gradient with respect to the small logits, and the next task waits for both.

    Args:
      logits: task -> (B, h, w, channels), as the model returns them with `full_size=False`.
      batch: task -> label (B, H, W, ...), and `mask` (B,).

    Returns:
      Task -> scalar; see `Task.loss`.
    """
    found: dict[str, jax.Array] = {}
    before = jnp.zeros(())
    for task in tasks:
        with jax.named_scope(f"losses/{task.name}"):
            before = _after(task)(logits[task.name], batch[task.name], batch["mask"], before)
        found[task.name] = before
    return found


def _after(task: Task) -> Loss:
    """(logits, label, mask, before) -> the task's loss, computed after the loss `before`."""

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
