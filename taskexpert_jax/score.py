"""Scores prediction files of any model on a data set's evaluation split, with the metrics of `evaluate`.

  taskexpert score --config=nyud --predictions=DIR [--tasks=semseg,depth] [--output=DIR]
    --config.dataset.data_dir=DATA

DIR has one file per task and image with a label of the task: TASK/ID.png, TASK/ID.npy, or ID/TASK.npy (the layout of
`predict`). It has the image's size; docs/add_a_dataset.md describes the encodings under "Files of predictions".

Values are scored exactly as given, except probabilities, which go through a float32 logit: they are clipped to
[1e-7, 1 - 1e-7], because the boundary loss would be infinite at 0 and 1; odsF takes them in 8 bits
(config.eval.boundary.quantise): those of an 8-bit file as they are, others with the fraction of 255 p cut off, as the
benchmarks' code does. Saliency's `maxF` is the published metric, which applies a second sigmoid to the probability: the
files hold the probability before that sigmoid. `maxF_plain` omits it.

Prints a table, and writes metrics.json and per_class.csv to the folder --output, by default DIR. A missing or
unusable file is an error; nothing is scored partially, rotated or resized.
"""

from collections.abc import Sequence
import pathlib

from absl import flags
from ml_collections import ConfigDict

from taskexpert_jax import command_line, files, paths, progress, terminal
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.tasks import from_config


def _run(config: ConfigDict, folder: pathlib.Path, names: Sequence[str], output: pathlib.Path) -> None:
    """Scores the predictions, prints the table and writes the files; names: the tasks, empty for all of the config."""
    from input_pipeline import pipeline  # imports TensorFlow, and hides accelerators from it
    from taskexpert_jax.evaluation import results
    from taskexpert_jax.evaluation.scoring import check_folder, score

    check(config)
    unknown = [name for name in names if name not in config.tasks]
    if unknown:
        raise UserError(f"--tasks: {unknown[0]!r} is not among the tasks of the config, {', '.join(config.tasks)}")
    config.tasks = tuple(names) or config.tasks
    tasks = from_config(config)
    check_folder(folder, tasks)
    files.folder_for_results(output)
    pipeline.record_fingerprint(config)
    batches = pipeline.eval_batches(config, tasks, batch_size=1)
    with progress.Progress("scoring", batches.examples, "examples") as shown:
        found = score(config, folder, batches, shown.add)
    texts = results.texts(found)
    files.write({output / name: text for name, text in texts.items()})
    print(f"{found.facts['examples']} examples of {config.dataset.name}, split {config.dataset.eval_split}\n")
    print(results.table(results.rows(found.tasks, found.metrics, found.best_constant)) + "\n")
    for name in texts:
        terminal.print_written(output / name)


def main() -> None:
    """Defines the flags and runs the program."""
    config = command_line.define_config("Config file of the data set: configs/nyud.py.")
    predictions = paths.define("predictions", "Folder of the predictions.")
    tasks = flags.DEFINE_list("tasks", [], "Tasks to score, comma-separated; default: the config's.")
    output = paths.define("output", "Folder for metrics.json; default: the predictions' folder.")

    def program() -> None:
        folder = paths.needed(predictions)
        _run(config.value, folder, tasks.value or (), output.value or folder)

    line = "interrupted; nothing was written: the same command starts anew"
    command_line.run(program, doc=__doc__, interrupted=line)


if __name__ == "__main__":
    main()
