"""The interface of a balancing method. T: tasks, in the order of `config.tasks`."""

from typing import Any

import jax

Tree = Any  # a pytree of arrays


class Balancing:
    """Decides how the losses of the tasks make one update. This class itself: the fixed `loss_weights`.

    A method sees each loss multiplied by the task's `loss_weight`. Its functions are traced within the training step.

    Attributes:
      separate: the method wants the gradient of each task by itself, and has `combined` instead of `weights`.
    """

    separate = False

    @property
    def weighs(self) -> bool:
        """True if the method has weights of its own, which training then logs."""
        return self.separate or type(self).weights is not Balancing.weights

    def init(self) -> Tree:
        """State before the first step: small arrays, kept on every device and in checkpoints; {}: no state."""
        return {}

    def weights(self, state: Tree, losses: jax.Array) -> jax.Array | None:
        """Factors (T,) of the losses in this step's gradient, which are constants there; None: all 1.

        losses: (T,) float32, of this step; with `accumulate_steps`, of one micro-batch.
        """
        del state, losses
        return None

    def updated(self, state: Tree, losses: jax.Array) -> Tree:
        """State after a step with these losses (T,). It is dropped if the step is skipped for a NaN or Inf."""
        del losses
        return state

    def combined(self, gradients: Tree, shared: Tree, key: jax.Array) -> tuple[Tree, jax.Array]:
        """One gradient from those of the tasks, and the weight of each task in it (T,); if `separate`.

        Args:
          gradients: of each task, stacked: (T, ...) for every parameter (...).
          shared: masks that broadcast to the parameters: False where at most one task has a gradient.
          key: random key of the step.
        """
        raise NotImplementedError
