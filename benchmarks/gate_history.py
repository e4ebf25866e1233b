"""Mean gate weights during the first steps of a training: when a gate collapses, onto what, and whether a change helps.

  python benchmarks/gate_history.py full,scenes --steps=400 --output=FILE.json [FIELD=VALUE ...]

Trains a rung of configs/ablation.py, or its variation by FIELD=VALUE (model.gate.init=even), and records the mean
weights of every expert slot on validation images, by task and tap. The schedule is that of the whole training.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from ml_collections import ConfigDict
import numpy as np

from benchmarks import changes, machine
from configs import ablation
from input_pipeline import pipeline
from taskexpert_jax import command_line, files, json_file
from taskexpert_jax.config import check
from taskexpert_jax.errors import UserError
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.models.decoders.decoder import GATES
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing, optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import batch_sizes, make_train_step


def config_of(rung: str, fields: Sequence[str]) -> ConfigDict:
    """The rung's config with changed fields, each FIELD=VALUE.

    Raises:
      UserError: an unknown rung or field, or a wrong value.
    """
    try:
        config = ablation.get_config(rung)
    except ValueError as error:
        raise UserError(str(error)) from None
    changes.apply(config, fields)
    check(config)
    if config.model.gate.granularity == "uniform":
        raise UserError(f"{rung}: its experts are averaged, without gates; choose another rung")
    return config


def history(config: ConfigDict, steps: int, every: int, images: int) -> dict[str, Any]:
    """Trains and records: steps, and weights, [record][tap][task][expert slot]; means over at most `images` images."""
    mesh, tasks = sharding.make_mesh(config.mesh, batch_sizes(config)), from_config(config)
    model = taskexpert.from_config(config, tasks)
    tx = optimizer.build(config, model.backbone)
    shown = next(iter(pipeline.eval_batches(config, tasks, batch_size=images)))
    real = np.flatnonzero(shown["mask"])  # a set with fewer images is padded
    image, window = shown["image"][real], shown["window"][real]
    record: dict[str, Any] = {"steps": [], "images": len(real), "weights": []}

    @jax.jit
    def weights(variables: Any, image: jax.Array, window: jax.Array) -> jax.Array:
        normalised = inputs.normalise(image, window, model.normalisation)
        _, aux = model.apply(variables, normalised, train=False, return_aux=True, full_size=False)
        return aux[GATES].mean(axis=(2, 3))  # (S, T, k); over images and tokens

    with sharding.use(mesh):
        initialise, _, shardings = train_state.abstract_and_shardings(
            model, tx, mesh, config.seed, balancing=balancing.from_config(config, tasks)
        )
        state = jax.jit(initialise, out_shardings=shardings)()
        train_step = make_train_step(model, tx, config, mesh, shardings)
        sums = jax.jit(lambda: tally.empty(tasks), out_shardings=sharding.replicated(mesh))()
        batches = sharding.to_devices(pipeline.train_batches(config, tasks), mesh)
        for step in range(steps + 1):
            if step % every == 0:
                found = np.asarray(weights(state.variables(), image, window), np.float64)
                record["steps"].append(step)
                record["weights"].append(found.round(5).tolist())
                print(step, " ".join(f"{t.name} {found[:, i, -1].round(2)}" for i, t in enumerate(tasks)), flush=True)
            if step < steps:
                state, sums = train_step(state, sums, next(batches))
    return {"tasks": [task.name for task in tasks], "slots": list(model.expert_slots), **record}


def program(args: argparse.Namespace) -> None:
    """Trains and writes the history.

    Raises:
      UserError: wrong arguments or fields, or an output that cannot be written: before anything is trained.
    """
    config = config_of(args.rung, args.changes)
    if args.output.is_dir():
        raise UserError(f"--output={args.output} is a folder: give a file, such as {args.output / 'history.json'}")
    files.folder_for_results(args.output.parent)
    found = history(config, args.steps, args.every, args.images)
    content = {"rung": args.rung, "changes": args.changes, "machine": machine.described("jax"), **found}
    files.write({args.output: json.dumps(json_file.finite(content)) + "\n"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    parser = command_line.Parser("benchmarks/gate_history.py", __doc__)
    parser.add_argument("rung", help="RUNG[,BENCHMARK[,VARIANT]] of configs/ablation.py")
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--steps", type=int, default=400, help="of training; default: %(default)s")
    parser.add_argument("--every", type=int, default=25, help="steps from record to record; default: %(default)s")
    parser.add_argument("--images", type=int, default=16, help="of validation, the first; default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file, for ablation_figures.py gates")
    args = parser.parse_intermixed_args(arguments)
    for name in ("steps", "every", "images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)}: give 1 or more")
    return command_line.ended(lambda: program(args))


if __name__ == "__main__":
    sys.exit(main())
