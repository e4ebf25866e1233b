"""The traced training step, and the parts of the model that its operations belong to. Nothing is compiled or run."""

from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from taskexpert_jax.compile.steps import build, tracers
from taskexpert_jax.parallel import sharding

# Part -> module names; the first part with one of its names in an operation's path counts.
PARTS = {
    "attention of tokens": ("attend",),
    "backbone, the rest": ("patches", "blocks"),
    "experts": ("experts",),
    "memory": ("vmap(read)", "read", "write", "blend"),
    "gates, assembling": ("mixture",),
    "heads, upsampling": ("upsample",),
    "heads": ("head",),
    "upsampling to image size": ("",),
}


def part_of(path: str) -> str:
    """The part of `PARTS` of an operation with this path."""
    words = path.split("/")
    of_tasks = ("head_", "write_", "blend_", "read_")
    names = {word.split("_")[0] if word.startswith(of_tasks) else word for word in words}
    return next((part for part, known in PARTS.items() if names & set(known)), list(PARTS)[-1])


def trace_train_step(config: ConfigDict, devices: Sequence[Any] | None = None) -> Any:
    """Traces the training step of a config, on this process's first device or the given ones."""
    mesh, model = build(config, jax.devices()[:1] if devices is None else devices)
    trace = tracers(config, model, mesh)["train"]
    with sharding.use(mesh):
        return trace()
