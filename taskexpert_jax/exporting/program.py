"""The program that is exported: parameters, images and windows -> the values of each task."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array, lax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import frame_size
from taskexpert_jax.evaluation import inference, steps
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.runs import tree

BATCH = "batch"  # name of the symbolic dimension
PLATFORMS = ("cpu", "cuda", "tpu")

Outputs = dict[str, Array]


class Program(NamedTuple):
    """A model's inference function, for any platform.

    Attributes:
      function: (parameters, image, window) -> outputs, see `make`.
      parameters: parameters and batch statistics by name; bfloat16 as the same bits in uint16, because NumPy's files
        have no bfloat16.
      frame: height and width of the images.
    """

    function: Callable[[Mapping[str, Any], Any, Any], Outputs]
    parameters: dict[str, np.ndarray]
    frame: tuple[int, int]

    def inputs(self, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of image and window; batch: a size, or a symbolic dimension."""
        return {
            "image": jax.ShapeDtypeStruct((batch, *self.frame, 3), jnp.uint8),
            "window": jax.ShapeDtypeStruct((batch, 4), jnp.int32),
        }


def portable(config: ConfigDict) -> ConfigDict:
    """The config for a program of all platforms: attention without fused kernels, which exist on one platform each."""
    config = config.copy_and_resolve_references()
    config.model.attention = "xla"
    return config


def make(model: MultiTaskModel, variables: Any, config: ConfigDict) -> Program:
    """The program of a model, with the views of `config.eval`.

    Args:
      model: made for `portable(config)`.
      variables: its parameters and batch statistics.
      config: the run's config.

    Returns:
      The program. Its inputs are those of `inference.make_inference`: frames (B, H, W, 3) uint8 and windows (B, 4)
      int32. Outputs by name: `TASK`, see `Task.values`, undefined in the padding, and `TASK_nonfinite`, (B,) bool:
      whether the prediction has a NaN or Inf inside the window, which its values need not show.
    """
    infer = inference.make_inference(model, config)
    structure = jax.tree.structure(variables)
    arrays = {name: np.asarray(array) for name, array in tree.arrays(jax.device_get(variables)).items()}
    order = list(arrays)  # of the tree's leaves

    def program(parameters: Mapping[str, Array], image: Array, window: Array) -> Outputs:
        leaves = [_from_bits(parameters[name]) for name in order]
        found = steps.predicted(model.tasks, infer(jax.tree.unflatten(structure, leaves), image, window), window)
        flags = {nonfinite_name(task): flag for task, flag in found.nonfinite.items()}
        return {**found.values, **flags}

    frame = frame_size(config)
    return Program(program, {name: _to_bits(array) for name, array in arrays.items()}, frame)


def nonfinite_name(task: str) -> str:
    """Name of the output that says whether a task's prediction has a NaN or Inf."""
    return f"{task}_nonfinite"


def _to_bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _from_bits(array: Array) -> Array:
    return lax.bitcast_convert_type(array, jnp.bfloat16) if array.dtype == jnp.uint16 else array
