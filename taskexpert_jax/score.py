"""Scores files of any model's predictions on the evaluation split of a data set, by the metrics of `--mode=evaluate`.

  python -m taskexpert_jax.score --config=configs/nyud.py --predictions=DIR [--tasks=semseg,depth] [--output=DIR]
    --config.dataset.data_dir=DATA

DIR has a file for each task and each image with a label of it: TASK/ID.png, TASK/ID.npy, or ID/TASK.npy, which is where
`--mode=predict` writes. It is as large as the image, and coded as docs/add_a_dataset.md says under
"Files of predictions".

All kinds of values but probabilities are scored exactly as given. Probabilities go through a float32 logit: at the ends
they are taken as 1e-7 and 1 - 1e-7, or the loss of boundaries would be infinite; odsF takes them in 8 bits, as
everywhere. Of saliency, `maxF` is the number that the field publishes, with a second sigmoid over the probability:
give the probability, not what that sigmoid makes of it. `maxF_plain` is without it.

Prints a table, and writes metrics.json (and per_class.csv) to the folder --output, by default DIR. A missing or
unusable file is an error: nothing is scored in part, turned or resized.
"""

from collections.abc import Sequence
import pathlib

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from taskexpert_jax import command_line
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import results
from taskexpert_jax.evaluation.scoring import score
from taskexpert_jax.tasks import from_config


def _run(config: ConfigDict, folder: pathlib.Path, names: Sequence[str], output: pathlib.Path) -> None:
    """Scores, prints and writes; `names`: the tasks, or none for all of the config's."""
    from input_pipeline import pipeline  # imports TensorFlow, and hides accelerators from it

    check(config)
    unknown = [name for name in names if name not in config.tasks]
    if unknown:
        raise UserError(f"--tasks: {unknown[0]!r} is not among the tasks of the config, {', '.join(config.tasks)}")
    config.tasks = tuple(names) or config.tasks
    pipeline.record_fingerprint(config)
    batches = pipeline.eval_batches(config, from_config(config), batch_size=1)
    found = score(config, folder, batches)
    print(f"{found.facts['examples']} examples of {config.dataset.name}, split {config.dataset.eval_split}\n")
    print(results.table(results.rows(found.tasks, found.metrics, found.best_constant)) + "\n")
    output.mkdir(parents=True, exist_ok=True)
    for path in results.write(found, output):
        print(f"written: {path}")


def main() -> None:
    """Defines the flags and runs the program."""
    config = config_flags.DEFINE_config_file("config", None, "Config file of the data set: configs/nyud.py.")
    predictions = flags.DEFINE_string("predictions", None, "Folder of the predictions.")
    tasks = flags.DEFINE_list("tasks", [], "Those to score, by commas; default: the config's.")
    output = flags.DEFINE_string("output", None, "Folder that gets metrics.json; default: the predictions'.")
    flags.mark_flags_as_required(["config", "predictions"])

    def run(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"unexpected argument {argv[1]!r}: flags start with --")
            command_line.configure_logging()
            folder = pathlib.Path(str(predictions.value))
            _run(config.value, folder, tasks.value or (), pathlib.Path(output.value) if output.value else folder)
        except UserError as error:
            command_line.fail(str(error))

    app.run(run, flags_parser=command_line.parse_flags)


if __name__ == "__main__":
    main()
