"""`signature.json` of an exported model: what a program without this package needs to know to use it."""

import math
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files, installation
from taskexpert_jax.config import read_run
from taskexpert_jax.exporting.program import BATCH, Program, nonfinite_name
from taskexpert_jax.runs.load import Selected
from taskexpert_jax.tasks import Task
from taskexpert_jax.tasks.kinds.kind import nearest
from taskexpert_jax.version import __version__

FILE = "signature.json"
_FIT = (
    "An image that fits the frame keeps its size and is centred in it; the rest of the frame is 0. A larger image is "
    "reduced to fit (mean over pixel areas); one of at most half the height and width of model_size is enlarged to fit "
    "model_size (bilinear). window is the image's rectangle in the frame: top, left, height, width."
)


def describe(
    program: Program, tasks: tuple[Task, ...], config: ConfigDict, checkpoint: Selected, workdir: pathlib.Path
) -> dict[str, Any]:
    """The content of signature.json.

    Args:
      program: the exported program.
      tasks: the model's tasks.
      config: the run's config.
      checkpoint: the checkpoint that was loaded.
      workdir: the run's directory, or a released folder.
    """
    outputs = jax.eval_shape(program.function, program.parameters, *program.inputs(1).values())
    return {
        "made_by": {
            "taskexpert_jax": __version__,
            "commit": installation.commit(),
            "jax": jax.__version__,
        },
        "run": {
            "checkpoint": checkpoint.step,
            "which": checkpoint.which,
            "variant": config.variant,
            "dataset": config.dataset.name,
            "data_fingerprint": read_run(workdir).dataset.fingerprint,
            "parameters": sum(math.prod(array.shape) for array in program.parameters.values()),
            "dtype": config.dtype,
            "parameters_dtype": config.eval.params_dtype,
        },
        "inputs": {
            name: {"shape": [BATCH, *spec.shape[1:]], "dtype": np.dtype(spec.dtype).name, "meaning": meaning}
            for (name, spec), meaning in zip(
                program.inputs(1).items(),
                ("frames: RGB (sRGB), 0 outside of the window", "top, left, height, width of each image in its frame"),
                strict=True,
            )
        },
        "frame": {"size": list(program.frame), "model_size": list(config.dataset.image_size), "fit": _FIT},
        "inside_the_program": {
            "image_mean": list(config.model.image_mean),
            "image_std": list(config.model.image_std),
            "flip": config.eval.flip,
            "scales": list(config.eval.scales),
            "sliding_windows": program.frame != tuple(config.dataset.image_size),
            "overlap": config.eval.overlap,
        },
        "outputs": _outputs(tasks, outputs),
    }


def _outputs(tasks: tuple[Task, ...], outputs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    def form(name: str) -> dict[str, Any]:
        return {"shape": [BATCH, *outputs[name].shape[1:]], "dtype": np.dtype(outputs[name].dtype).name}

    described = {}
    for task in tasks:
        described[task.name] = {
            **form(task.name),
            "title": task.title,
            "kind": task.kind.name,
            "meaning": task.kind.array_form,
            "unit": task.kind.unit,
            "range": list(task.kind.bounds),
            "resize": "nearest" if task.kind.resize is nearest else "bilinear",
            **({"classes": list(task.class_names)} if task.class_names else {}),
        }
        flag = nonfinite_name(task.name)
        described[flag] = {
            **form(flag),
            "meaning": f"true: the prediction of {task.name} has a NaN or Inf inside the window; do not use its values",
        }
    return described


def checksums(folder: pathlib.Path) -> dict[str, Any]:
    """Sizes and checksums of the files in a folder."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": files.checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
