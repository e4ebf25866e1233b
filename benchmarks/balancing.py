"""Cost of the balancing methods: CPU time of a training step against that with fixed weights, and gradient memory.

  python benchmarks/balancing.py --output=benchmarks/results/balancing.json

Steps of all methods take turns within a round, and the ratio to `fixed` is taken within the round. CPU time of the
process, so other programs on the machine count little. Random data; ViT-Ti on NYUD-v2's four tasks, float32.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
from ml_collections import ConfigDict

from benchmarks import machine, random_batch
from configs import nyud
from taskexpert_jax import command_line, files
from taskexpert_jax.models import model as taskexpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.tasks import from_config
from taskexpert_jax.training import balancing, optimizer, tally
from taskexpert_jax.training import state as train_state
from taskexpert_jax.training.step import make_train_step


def small_config(method: str) -> ConfigDict:
    """ViT-Ti at 96x128, batch 2, with scanned blocks, which compile faster."""
    config = nyud.get_config("vit_ti16")
    config.balancing, config.dtype = method, "float32"
    config.dataset.image_size, config.batch_size, config.model.unroll = (96, 128), 2, "no"
    return config


class Stepping:
    """A compiled training step that carries its state from call to call."""

    def __init__(self, config: ConfigDict):
        tasks, mesh = from_config(config), sharding.one_device_mesh()
        model = taskexpert.from_config(config, tasks)
        method = balancing.from_config(config, tasks)
        with sharding.use(mesh):
            tx = optimizer.build(config, model.backbone)
            initialise, _, places = train_state.abstract_and_shardings(
                model, tx, mesh, config.seed, balancing=method, averaged=False
            )
            state = jax.jit(initialise, out_shardings=places)()
            (self._batch,) = sharding.to_devices([random_batch.make(config, tasks, config.batch_size, seed=0)], mesh)
            sums = jax.device_put(tally.empty(tasks, weights=method.weighs), sharding.replicated(mesh))
            step: Any = make_train_step(model, tx, config, mesh, places)
            self._step = step.lower(state, sums, self._batch).compile()
        self._carried = (state, sums)
        self.temporary_bytes = int(self._step.memory_analysis().temp_size_in_bytes)

    def seconds(self, steps: int) -> float:
        """CPU time per step."""
        started = time.process_time()
        for _ in range(steps):
            self._carried = self._step(*self._carried, self._batch)
        jax.block_until_ready(self._carried)
        return (time.process_time() - started) / steps


def measured(rounds: int, steps: int) -> dict[str, Any]:
    """By method: CPU seconds per step, ratio to `fixed` (median and range over the rounds), planned temporaries."""
    methods = {name: Stepping(small_config(name)) for name in balancing.METHODS}
    for each in methods.values():
        each.seconds(1)
    found = [{name: each.seconds(steps) for name, each in methods.items()} for _ in range(rounds)]
    results = {}
    for name, each in methods.items():
        ratios = [seconds[name] / seconds["fixed"] for seconds in found]
        results[name] = {
            "cpu_seconds": round(statistics.median(seconds[name] for seconds in found), 4),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "temporary_mib": round(each.temporary_bytes / 2**20, 1),
        }
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    parser = command_line.Parser("benchmarks/balancing.py", __doc__)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of each method in a round; default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    args = parser.parse_args(arguments)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)}: give 1 or more")
    return command_line.ended(lambda: program(args))


def program(args: argparse.Namespace) -> None:
    """Measures, prints and writes the results."""
    files.folder_for_results(args.output.parent)
    facts = {**machine.described("jax"), "clock": "CPU time", "rounds": args.rounds, "steps_a_round": args.steps}
    results = measured(args.rounds, args.steps)
    for name, row in results.items():
        print(f"{name:12} {row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})")
    files.write({args.output: json.dumps({"machine": facts, "methods": results}, indent=2) + "\n"})


if __name__ == "__main__":
    sys.exit(main())
