"""Mean gate weights during the first steps of a training: when a gate collapses, onto what, and whether a change helps.

  python benchmarks/gate_history.py full,scenes --steps=400 --output=FILE.json [FIELD=VALUE ...]

Trains a rung of configs/ablation.py, or its variation by FIELD=VALUE (model.gate.init=even), and records the mean
weights of every expert slot on validation images, by task and tap. The schedule is that of the whole training.
"""

import argparse
import ast
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from ml_collections import ConfigDict
import numpy as np

from benchmarks import machine
from configs import ablation
from input_pipeline import pipeline
from taskexpert_jax.config import check
from taskexpert_jax.models import inputs
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import batch_sizes, make_train_step


def config_of(rung: str, changes: list[str]) -> ConfigDict:
    """The rung's config with the changes, each FIELD=VALUE."""
    config = ablation.get_config(rung)
    for change in changes:
        field, _, text = change.partition("=")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        config.update_from_flattened_dict({field: value})
    check(config)
    return config


def history(config: ConfigDict, steps: int, every: int, images: int) -> dict[str, Any]:
    """Trains and records: steps, losses by task, and weights, [record][tap][task][expert slot]."""
    mesh, tasks = sharding.make_mesh(config.mesh, batch_sizes(config)), from_config(config)
    model, tx = taskexpert.from_config(config, tasks), optimizer.build(config)
    shown = next(iter(pipeline.eval_batches(config, tasks, batch_size=images)))
    record: dict[str, Any] = {"steps": [], "losses": [], "weights": []}

    @jax.jit
    def weights(variables: Any, image: jax.Array, window: jax.Array) -> jax.Array:
        normalised = inputs.normalise(image, window, model.normalisation)
        _, gates = model.apply(variables, normalised, train=False, return_gates=True, full_size=False)
        return gates.mean(axis=(2, 3))  # (S, T, k); over images and tokens

    with sharding.use(mesh):
        initialise, _, shardings = train_state.abstract_and_shardings(model, tx, mesh, config.seed)
        state = jax.jit(initialise, out_shardings=shardings)()
        train_step = make_train_step(model, tx, config, mesh, shardings)
        sums = jax.jit(lambda: tally.empty(tasks), out_shardings=sharding.replicated(mesh))()
        batches = sharding.to_devices(pipeline.train_batches(config, tasks), mesh)
        for step in range(steps + 1):
            if step % every == 0:
                found = np.asarray(weights(state.variables(), shown["image"], shown["window"]), np.float64)
                record["steps"].append(step)
                record["weights"].append(found.round(5).tolist())
                print(step, " ".join(f"{t.name} {found[:, i, -1].round(2)}" for i, t in enumerate(tasks)), flush=True)
            if step < steps:
                state, sums = train_step(state, sums, next(batches))
    return {"tasks": [task.name for task in tasks], "slots": list(model.expert_slots), **record}


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rung", help="RUNG[,BENCHMARK[,VARIANT]] of configs/ablation.py")
    parser.add_argument("changes", nargs="*", metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    args = parser.parse_args()
    config = config_of(args.rung, args.changes)
    found = history(config, args.steps, args.every, args.images)
    content = {"rung": args.rung, "changes": args.changes, "machine": machine.described("jax"), **found}
    args.output.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
