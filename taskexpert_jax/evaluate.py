"""Evaluation of a run's checkpoint: every task's metrics over a data set, and a page that shows them."""

from collections.abc import Callable, Iterable, Mapping
import pathlib
import time

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.config import check
from taskexpert_jax.evaluation import full_pass, results
from taskexpert_jax.parallel import sharding
from taskexpert_jax.report import evaluation_page
from taskexpert_jax.runs.load import load


def evaluate(
    config: ConfigDict,
    workdir: pathlib.Path,
    which: str,
    eval_batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> results.Values:
    """Evaluates a checkpoint, prints a table of its metrics and of the best constants, and writes WORKDIR/evaluation/.

    Files: metrics.json, per_class.csv and report.html.

    Args:
      config: the run's config.
      workdir: the run's directory.
      which: "best", "latest" or a step.
      eval_batches: returns one pass over the evaluation set.

    Returns:
      `task/metric` -> value; with `config.eval.boundary.odsf` also the boundary benchmark's.

    Raises:
      UserError: an invalid config, no such checkpoint, or one of another architecture (with a diff).
    """
    check(config)
    mesh = sharding.make_mesh(config.mesh, {"eval.batch_size": config.eval.batch_size})
    with sharding.use(mesh):
        model, variables, step = load(config, workdir, which, mesh)
        logging.info(f"evaluating {workdir} at step {step} ({which})")
        started = time.monotonic()
        found = full_pass.run(config, model, variables, eval_batches(), mesh)
        seconds = time.monotonic() - started
    facts = results.facts(config, workdir=workdir, which=which, step=step, examples=found.examples, seconds=seconds)
    evaluation = found.evaluation(model.tasks, facts, model.expert_slots)
    if jax.process_index() == 0:
        print(f"{found.examples} examples in {seconds:.1f} s, compilation and reading included\n")
        print(results.table(results.rows(model.tasks, evaluation.metrics, evaluation.best_constant)) + "\n")
        paths = results.write(evaluation, workdir / "evaluation")
        page = workdir / "evaluation" / "report.html"
        page.write_text(evaluation_page.html(evaluation))
        for path in (*paths, page):
            print(f"written: {path}")
    return evaluation.metrics
