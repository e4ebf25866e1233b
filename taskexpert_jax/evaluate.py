"""Evaluation of a run's checkpoint: every task's metrics over a data set, and a page that shows them."""

from collections.abc import Callable, Iterable, Mapping
import pathlib
import time

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax import files, progress, terminal
from taskexpert_jax.config import check
from taskexpert_jax.evaluation import full_pass, results
from taskexpert_jax.parallel import sharding
from taskexpert_jax.report import evaluation_page
from taskexpert_jax.runs import released
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import from_config


def evaluate(
    config: ConfigDict,
    workdir: pathlib.Path,
    which: str,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    output: pathlib.Path | None = None,
    *,
    data: ConfigDict | None = None,
) -> results.Values:
    """Evaluates a checkpoint, writes its results, and prints a table of its metrics and of the best constants.

    Files: metrics.json, per_class.csv and report.html.

    Args:
      config: the run's config.
      workdir: the run's directory, or a released folder.
      which: "best", "latest" or a step.
      eval_batches: returns one pass over the evaluation set; `examples`, if it has that, is their number.
      output: folder for the results; default: WORKDIR/evaluation, or WORKDIR/evaluation_NAME for another data set; of a
        released model, in the current folder.
      data: config with the data set and the tasks to evaluate, if they are others than the run's; see
        `runs.config.for_evaluation`.

    Returns:
      `task/metric` -> value; with `config.eval.boundary.odsf` also the boundary benchmark's.

    Raises:
      UserError: an invalid config, no such checkpoint, one of another architecture (with a diff), or an output folder
        that cannot be written.
    """
    data = config if data is None else data
    check(data)
    tasks = from_config(data)
    own_data = data.dataset.name == config.dataset.name
    name = "evaluation" if own_data else f"evaluation_{data.dataset.name}"
    output = released.results_folder(workdir, name, output)
    mesh = sharding.make_mesh(config.mesh, {"eval.batch_size": config.eval.batch_size})
    with sharding.use(mesh):
        model, variables, checkpoint = load(config, workdir, which, mesh)
        if jax.process_index() == 0:
            files.folder_for_results(output)
        logging.info(f"evaluating {workdir} at {checkpoint}")
        started = time.monotonic()
        batches = eval_batches()
        total = getattr(batches, "examples", None)
        with progress.Progress("evaluating", total, "examples", active=jax.process_index() == 0) as shown:
            found = full_pass.run(config, tasks, model, variables, batches, mesh, shown.add)
        seconds = time.monotonic() - started
    facts = results.facts(data, workdir=workdir, checkpoint=checkpoint, examples=found.examples, seconds=seconds)
    evaluation = found.evaluation(tasks, facts, model.expert_slots)
    if jax.process_index() == 0:
        texts = {**results.texts(evaluation), "report.html": evaluation_page.html(evaluation)}
        files.write({output / name: text for name, text in texts.items()})
        print(f"{found.examples} examples in {seconds:.1f} s, compilation and reading included\n")
        print(results.table(results.rows(tasks, evaluation.metrics, evaluation.best_constant)) + "\n")
        for name in texts:
            terminal.print_written(output / name)
    return evaluation.metrics
