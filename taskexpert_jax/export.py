"""Export of a trained model for programs without this package: its inference as a program, parameters, a signature."""

import json
import pathlib

from absl import logging
from ml_collections import ConfigDict

from taskexpert_jax import files, json_file, terminal
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.exporting import jax_program, signature
from taskexpert_jax.exporting import program as programs
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.load import load

_WRITERS = {"jax": jax_program.write}
_MISSING = {  # formats that users ask for; tried, see docs/export.md
    "saved_model": "TensorFlow 2.21 cannot read programs of JAX 0.10",
    "onnx": "its converter, jax2onnx, needs an older Orbax than this package",
}


def export(config: ConfigDict, workdir: pathlib.Path, which: str, output: pathlib.Path, form: str = "jax") -> None:
    """Writes a trained model for programs without this package.

    The program computes what `--mode=predict` computes. Normalisation is part of it, and so are flips, scales and
    sliding windows as configured by `config.eval`. signature.json has its inputs, its outputs with units and classes,
    the run, and checksums.

    Args:
      config: the run's config.
      workdir: the run's directory, or a released folder.
      which: "best", "latest" or a step.
      output: the folder to write; must not exist, or be empty.
      form: "jax", the only one so far.

    Raises:
      UserError: no fitting checkpoint; an unknown form; or a folder that is not empty or cannot be written. Nothing
        remains in it.
    """
    if form not in _WRITERS:
        reason = _MISSING.get(form, "unknown")
        raise UserError(f"--format={form}: {reason}; give one of {', '.join(_WRITERS)}, or see docs/export.md")
    check(config := programs.portable(config))
    with files.new_folder(output, last=signature.FILE) as folder:
        mesh = sharding.one_device_mesh()
        with sharding.use(mesh):
            model, variables, checkpoint = load(config, workdir, which, mesh)
        logging.info(f"exporting {workdir} at {checkpoint}")
        program = programs.make(model, variables, config)
        described = signature.describe(program, model.tasks, config, checkpoint, workdir)
        with files.writing(output):
            facts = _WRITERS[form](program, folder)
            content = {"format": {"name": form, **facts}, **described, "files": signature.checksums(folder)}
            text = json.dumps(json_file.finite(content), indent=2)
            (folder / signature.FILE).write_text(f"{text}\n", "utf-8")
    terminal.print_written(output / signature.FILE)
