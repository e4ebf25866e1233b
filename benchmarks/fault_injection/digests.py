"""Digests of the arrays of a checkpoint, to compare two runs bit for bit."""

import contextlib
import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks.fault_injection.program import ROOT
from taskexpert_jax import storage


def digests(workdir: pathlib.Path, flags: list[str], step: int) -> dict[str, str]:
    """Digest of the bytes of every array of a checkpoint, by name."""
    command = [sys.executable, "-m", __name__, json.dumps([str(workdir), step, flags])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: step {step} of {workdir} cannot be read: {done.stderr.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_digests(workdir: pathlib.Path, step: int, flags: list[str]) -> None:
    """Prints the result of `digests` as JSON; runs in its own process, so the caller needs no device."""
    from absl import flags as absl_flags
    import jax
    import numpy as np

    import main as program  # defines --config
    from taskexpert_jax.models import model as taskexpert
    from taskexpert_jax.parallel import sharding
    from taskexpert_jax.runs.checkpoints import Checkpoints
    from taskexpert_jax.tasks import best_task, from_config
    from taskexpert_jax.training import balancing, optimizer
    from taskexpert_jax.training import state as train_state

    sys.argv = [program.__name__, *flags]  # ml_collections reads changed fields from here
    absl_flags.FLAGS(sys.argv)
    config: Any = absl_flags.FLAGS["config"].value
    tasks = from_config(config)
    model = taskexpert.from_config(config, tasks)
    mesh = sharding.make_mesh(config.mesh, {})
    with sharding.use(mesh):
        _, abstract, _ = train_state.abstract_and_shardings(
            model,
            optimizer.build(config, model.backbone),
            mesh,
            config.seed,
            balancing=balancing.from_config(config, tasks),
        )
        checkpoints = Checkpoints(workdir, best_task(tasks, config.checkpoint.best_task), read_only=True)
        with contextlib.closing(checkpoints):
            state = train_state.TrainState.from_items(checkpoints.restore(step, abstract.to_items()))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    found = {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves
    }
    print(json.dumps(found))


if __name__ == "__main__":
    folder, number, given = json.loads(sys.argv[1])
    print_digests(storage.path(folder), number, given)
