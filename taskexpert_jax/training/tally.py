"""Sums over training steps that stay on the devices until the next report."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from flax import struct
import jax
import jax.numpy as jnp

from taskexpert_jax.tasks import Task

KEPT = 8  # skipped NaN/Inf steps that are listed; further ones between two reports are only counted


class Tally(struct.PyTreeNode):
    """Sums over the steps since the last report, and its NaN/Inf steps.

    Attributes:
      sums: loss, loss/TASK, grad_norm and steps: float32 scalars, over the applied steps; weight/TASK if asked for.
      peak, peak_step: largest loss of a step, float32, and that step, int32; 0 without any.
      skipped: int32, number of NaN/Inf steps (loss or gradient) since the program started; they changed nothing.
      skipped_steps: (KEPT,) int32, the first of them since the last report; 0 for unused entries.
      skipped_tasks: (KEPT,) bool for each task: whether its loss was NaN or Inf. It may have been the gradient only.
    """

    sums: dict[str, jax.Array]
    peak: jax.Array
    peak_step: jax.Array
    skipped: jax.Array
    skipped_steps: jax.Array
    skipped_tasks: dict[str, jax.Array]

    def restarted(self) -> "Tally":
        """The tally after a report: everything is reset except the number of skipped steps."""
        zeros = jax.tree.map(jnp.zeros_like, self)
        return zeros.replace(skipped=self.skipped)

    def add(
        self,
        step: jax.Array,
        total: jax.Array,
        losses: Mapping[str, jax.Array],
        grad_norm: jax.Array,
        weights: Mapping[str, jax.Array] = MappingProxyType({}),
        *,
        taken: jax.Array,
        applied: jax.Array,
    ) -> "Tally":
        """Adds one step.

        Args:
          step: step number, from 1.
          total: total loss.
          losses: loss of each task.
          grad_norm: norm of the gradient before clipping.
          weights: weight of each task's loss in the gradient; needed if the sums have them.
          taken: False for steps after the one at which the run must stop.
          applied: whether the step was taken and its loss and gradient are finite.
        """
        seen = {"loss": total, "grad_norm": grad_norm, "steps": jnp.ones(())}
        seen |= {f"loss/{name}": loss for name, loss in losses.items()}
        seen |= {f"weight/{name}": weight for name, weight in weights.items()}
        higher = applied & ((total > self.peak) | (self.peak_step == 0))
        broken = taken & ~applied
        here = broken & (jnp.arange(KEPT) == jnp.sum(self.skipped_steps > 0))
        return self.replace(
            sums={name: jnp.where(applied, value + seen[name], value) for name, value in self.sums.items()},
            peak=jnp.where(higher, total, self.peak),
            peak_step=jnp.where(higher, step, self.peak_step),
            skipped=self.skipped + broken,
            skipped_steps=jnp.where(here, step, self.skipped_steps),
            skipped_tasks={
                name: jnp.where(here, ~jnp.isfinite(losses[name]), value) for name, value in self.skipped_tasks.items()
            },
        )


def empty(tasks: Sequence[Task], *, weights: bool = False) -> Tally:
    """Tally of no steps; weights: with sums of the tasks' weights."""
    balanced = [f"weight/{task.name}" for task in tasks if weights]
    names = ("loss", *(f"loss/{task.name}" for task in tasks), *balanced, "grad_norm", "steps")
    return Tally(
        sums={name: jnp.zeros(()) for name in names},
        peak=jnp.zeros(()),
        peak_step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_steps=jnp.zeros((KEPT,), jnp.int32),
        skipped_tasks={task.name: jnp.zeros((KEPT,), bool) for task in tasks},
    )
