"""Export for programs that have JAX: one program for all platforms, and the parameters beside it."""

from collections.abc import Iterator
import contextlib
import pathlib
from typing import Any

import jax
from jax import export
import numpy as np

from taskexpert_jax.exporting.program import BATCH, PLATFORMS, Program

PROGRAM_FILE, PARAMETERS_FILE = "program.jax_export", "parameters.npz"


def write(program: Program, folder: pathlib.Path) -> dict[str, Any]:
    """Writes program.jax_export and parameters.npz; returns facts for the signature.

    The parameters are arguments of the program, which has no weights in it, so that they are on the disk once and a
    server places them on its devices. They are an .npz because NumPy, which JAX installs, reads it.
    """
    (batch,) = export.symbolic_shape(BATCH)
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in program.parameters.items()}
    with _without_folders():
        lowered = export.export(jax.jit(program.function), platforms=PLATFORMS)
        exported = lowered(shapes, *program.inputs(batch).values())
    (folder / PROGRAM_FILE).write_bytes(exported.serialize())
    with (folder / PARAMETERS_FILE).open("wb") as file:
        np.savez(file, allow_pickle=False, **program.parameters)
    return {
        "program": PROGRAM_FILE,
        "parameters": PARAMETERS_FILE,
        "platforms": list(exported.platforms),
        "calling_convention": exported.calling_convention_version,
        "call": "(parameters, image, window) -> outputs; parameters and outputs are dicts by name",
    }


@contextlib.contextmanager
def _without_folders() -> Iterator[None]:
    """Keeps this machine's folders out of programs, whose operations name the source files that they come from."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)
