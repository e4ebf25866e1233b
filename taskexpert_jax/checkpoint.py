"""What lies in a run's checkpoints, without its config and without an accelerator.

python -m taskexpert_jax.checkpoint WORKDIR             # steps, metrics, sizes
python -m taskexpert_jax.checkpoint WORKDIR --verify    # whether every file is as it was written
python -m taskexpert_jax.checkpoint WORKDIR --tree      # names, shapes and dtypes of the newest one's arrays
"""

import argparse
from collections.abc import Mapping, Sequence
import datetime
import math
import pathlib
import sys
from typing import Any

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np
import orbax.checkpoint as ocp

from taskexpert_jax import text_table
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import manager as checkpoint_manager
from taskexpert_jax.runs import sealing
from taskexpert_jax.runs import tree as checkpoint_tree
from taskexpert_jax.tasks import from_config


def listing(workdir: pathlib.Path, *, verify: bool = False) -> str:
    """A table of the checkpoints, oldest first; with `verify` every file is read.

    Raises:
      UserError: there are none.
    """
    folder = _folder(workdir)
    with checkpoint_manager.for_listing(folder) as manager:
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(f"no checkpoint in {folder}")
        metrics = {step: manager.metrics(step) or {} for step in steps}
        best = _best(manager, metrics)
    names = sorted({name for found in metrics.values() for name in found})
    numbers = [*names, "MiB", *(f"{item} MiB" for item in checkpoint_manager.TREES)]
    rows = [["step", "saved", *numbers, "files", ""]]
    for step in steps:
        path = folder / str(step)
        saved = datetime.datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
        values = [f"{metrics[step][name]:.4g}" if name in metrics[step] else "-" for name in names]
        folders = (path, *(path / item for item in checkpoint_manager.TREES))
        sizes = [f"{sealing.size(each) / 2**20:.1f}" for each in folders]
        notes = [word for word, is_so in (("latest", step == steps[-1]), ("best", step == best)) if is_so]
        files = "sealed" if sealing.sealed(path) else "not sealed"
        if verify and files == "sealed":
            problem = sealing.problem(path)
            files = f"damaged: {problem}" if problem else "good"
        rows.append([str(step), saved, *values, *sizes, files, ", ".join(notes)])
    lines = text_table.lines(rows, f"><{'>' * len(numbers)}<<")
    aside = sorted(path.name for path in (folder.parent / "damaged").glob("*"))
    if aside:
        lines.append(f"damaged, moved to {folder.parent / 'damaged'}: {', '.join(aside)}")
    kept = sorted(path.name for path in (folder.parent / "replaced").glob("*"))
    if kept:
        lines.append(f"being replaced, and put back when the run goes on: {', '.join(kept)}")
    return "\n".join(lines)


def tree(workdir: pathlib.Path) -> str:
    """Name, shape, dtype and size of every array of the newest checkpoint.

    Raises:
      UserError: there is none, or what lists them is damaged.
    """
    folder = _folder(workdir)
    with checkpoint_manager.for_listing(folder) as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"no checkpoint in {folder}")
        try:
            found = manager.item_metadata(step)
            items = {item: checkpoint_tree.arrays(found[item]) for item in checkpoint_manager.TREES}
        except (KeyError, ValueError, OSError) as error:
            raise _unlisted(folder, step) from error
    lines = [f"step {step}"]
    for item, arrays in items.items():
        if not arrays:
            raise _unlisted(folder, step)
        sizes = {name: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for name, leaf in arrays.items()}
        lines.append(f"{item}: {len(arrays)} arrays, {sum(sizes.values()) / 2**20:.1f} MiB")
        for name, leaf in arrays.items():
            lines.append(f"  {name}  {tuple(leaf.shape)}  {np.dtype(leaf.dtype).name}  {sizes[name]:,} bytes")
    return "\n".join(lines)


def _best(manager: Any, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the best metric, of those that have it, by the task that the newest one's config names."""
    evaluated = {step: found for step, found in metrics.items() if found}
    if not evaluated:
        return None
    try:
        items = manager.restore(max(evaluated), args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        config: Any = ConfigDict(items["config"])
        (task,) = [task for task in from_config(config) if task.name == config.checkpoint.best_task]
    except (KeyError, ValueError, TypeError, AttributeError, OSError):
        return None  # it is damaged
    key = f"{task.name}/{task.main_metric}"
    choose = max if task.higher_is_better else min
    comparable = [step for step in evaluated if key in evaluated[step]]  # all, unless the best task was changed
    return choose(comparable, key=lambda step: evaluated[step][key], default=None)


def _unlisted(folder: pathlib.Path, step: int) -> UserError:
    return UserError(f"the arrays of {folder}/{step} cannot be listed: it is damaged; --verify says which file")


def _folder(workdir: pathlib.Path) -> pathlib.Path:
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"no checkpoints in {workdir}: give the --workdir of a run")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with this very run
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it only reads
    parser = argparse.ArgumentParser(
        "python -m taskexpert_jax.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    parser.add_argument("--verify", action="store_true", help="read every file and hold it against its checksum")
    parser.add_argument("--tree", action="store_true", help="list the arrays of the newest checkpoint")
    args = parser.parse_args(arguments)
    try:
        print(listing(args.workdir, verify=args.verify))
        if args.tree:
            print(f"\n{tree(args.workdir)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
