"""What the training steps leave on the devices for the next report."""

from collections.abc import Mapping, Sequence

from flax import struct
import jax
import jax.numpy as jnp

from taskexpert_jax.tasks import Task

KEPT = 8  # steps that were left out and are named; more of them between two reports are only counted


class Tally(struct.PyTreeNode):
    """Sums over the steps since the last report, and what was out of the ordinary in them.

    Attributes:
      sums: loss, loss/TASK, grad_norm and steps: float32 scalars, over the steps that were applied.
      peak, peak_step: the largest loss of a step, float32, and that step, int32; 0 where there was none.
      left_out: int32, steps since the program started whose loss or gradient was not finite, and which changed nothing.
      left_out_steps: (KEPT,) int32, the first of those since the last report; 0 where there are fewer.
      left_out_tasks: (KEPT,) bool for each task: whether its loss was not finite then. It may have been the gradient.
    """

    sums: dict[str, jax.Array]
    peak: jax.Array
    peak_step: jax.Array
    left_out: jax.Array
    left_out_steps: jax.Array
    left_out_tasks: dict[str, jax.Array]

    def restarted(self) -> "Tally":
        """For the time after a report: all but the number of steps left out begins anew."""
        zeros = jax.tree.map(jnp.zeros_like, self)
        return zeros.replace(left_out=self.left_out)

    def add(
        self,
        step: jax.Array,
        total: jax.Array,
        losses: Mapping[str, jax.Array],
        grad_norm: jax.Array,
        *,
        taken: jax.Array,
        applied: jax.Array,
    ) -> "Tally":
        """The tally with one more step.

        Args:
          step: its number, from 1.
          total: the loss.
          losses: of each task.
          grad_norm: norm of the gradient before clipping.
          taken: whether the step was not one of those after the run had to stop.
          applied: whether it was taken and its loss and gradient are finite.
        """
        seen = {"loss": total, "grad_norm": grad_norm, "steps": jnp.ones(())}
        seen |= {f"loss/{name}": loss for name, loss in losses.items()}
        higher = applied & ((total > self.peak) | (self.peak_step == 0))
        broken = taken & ~applied
        here = broken & (jnp.arange(KEPT) == jnp.sum(self.left_out_steps > 0))
        return self.replace(
            sums={name: jnp.where(applied, value + seen[name], value) for name, value in self.sums.items()},
            peak=jnp.where(higher, total, self.peak),
            peak_step=jnp.where(higher, step, self.peak_step),
            left_out=self.left_out + broken,
            left_out_steps=jnp.where(here, step, self.left_out_steps),
            left_out_tasks={
                name: jnp.where(here, ~jnp.isfinite(losses[name]), value) for name, value in self.left_out_tasks.items()
            },
        )


def empty(tasks: Sequence[Task]) -> Tally:
    """The tally of no step."""
    names = ("loss", *(f"loss/{task.name}" for task in tasks), "grad_norm", "steps")
    return Tally(
        sums={name: jnp.zeros(()) for name in names},
        peak=jnp.zeros(()),
        peak_step=jnp.zeros((), jnp.int32),
        left_out=jnp.zeros((), jnp.int32),
        left_out_steps=jnp.zeros((KEPT,), jnp.int32),
        left_out_tasks={task.name: jnp.zeros((KEPT,), bool) for task in tasks},
    )
