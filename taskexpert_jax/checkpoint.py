"""Lists a run's checkpoints, without its config and without an accelerator; also describes a released folder.

taskexpert checkpoint RUN             # steps, metrics, sizes
taskexpert checkpoint RUN --verify    # every file compared with its checksum; status 2 on damage
taskexpert checkpoint RUN --tree      # names, shapes and dtypes of the newest one's arrays

A released folder is always verified.
"""

from collections.abc import Mapping, Sequence
import datetime
import math
import pathlib
import sys
from types import MappingProxyType

from absl import logging
import jax
import numpy as np

from taskexpert_jax import command_line, json_file, paths, text_table
from taskexpert_jax.config import restored
from taskexpert_jax.errors import UserError
from taskexpert_jax.runs import hub, manager, released, sealing
from taskexpert_jax.runs import tree as trees
from taskexpert_jax.runs.checkpoints import saved_steps
from taskexpert_jax.runs.manager import Manager
from taskexpert_jax.tasks import best_task, from_config


def verified(workdir: pathlib.Path) -> dict[int, str]:
    """Step -> `good`, or what is wrong with the checkpoint; reads every file and compares it with its checksum."""
    folder = _folder(workdir)
    found = {}
    for step in saved_steps(workdir):
        path = folder / str(step)
        problem = sealing.problem(path)
        if others := sealing.unlisted(path):
            problem = problem or f"{others[0]} is not in {sealing.MANIFEST}"
        found[step] = f"damaged: {problem}" if problem else "good" if sealing.sealed(path) else "not sealed"
    return found


def listing(workdir: pathlib.Path, states: Mapping[int, str] = MappingProxyType({})) -> str:
    """A table of the checkpoints, oldest first.

    states: see `verified`; empty: says only whether they are sealed.

    Raises:
      UserError: there are none.
    """
    folder = _folder(workdir)
    with manager.for_listing(folder) as opened:
        steps = sorted(opened.all_steps())
        if not steps:
            raise UserError(f"no checkpoint in {folder}")
        metrics = {step: opened.metrics(step) or {} for step in steps}
        best = _best(folder, opened, metrics)
    names = sorted({name for found in metrics.values() for name in found})
    numbers = [*names, "MiB", *(f"{item} MiB" for item in manager.TREES)]
    rows = [["step", "saved", *numbers, "version", "files", ""]]
    for step in steps:
        path = folder / str(step)
        saved = datetime.datetime.fromtimestamp(sealing.saved_at(path)).isoformat(" ", "seconds")
        values = [f"{metrics[step][name]:.4g}" if name in metrics[step] else "-" for name in names]
        folders = (path, *(path / item for item in manager.TREES))
        sizes = [f"{sealing.size(each) / 2**20:.1f}" for each in folders]
        state = states.get(step) or ("sealed" if sealing.sealed(path) else "not sealed")
        notes = [word for word, is_so in (("latest", step == steps[-1]), ("best", step == best)) if is_so]
        rows.append([str(step), saved, *values, *sizes, _version(path), state, ", ".join(notes)])
    lines = text_table.lines(rows, f"><{'>' * len(numbers)}<<<")
    aside = sorted(path.name for path in (folder.parent / "damaged").glob("*"))
    if aside:
        lines.append(f"damaged, moved to {folder.parent / 'damaged'}: {', '.join(aside)}")
    return "\n".join(lines)


def tree(workdir: pathlib.Path) -> str:
    """Name, shape, dtype and size of every array of the newest checkpoint.

    Raises:
      UserError: there is none, or the list of arrays is damaged.
    """
    folder = _folder(workdir)
    with manager.for_listing(folder) as opened:
        step = opened.latest_step()
        if step is None:
            raise UserError(f"no checkpoint in {folder}")
        try:
            found = opened.item_metadata(step)
            items = {item: trees.arrays(found[item]) for item in manager.TREES}
        except Exception as error:  # Orbax raises anything on what it cannot read
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


def released_model(folder: pathlib.Path, *, tree: bool) -> str:
    """One line about a released folder, and with `tree` a line for each array; all after its checksums are verified.

    Raises:
      UserError: a file is missing or damaged.
    """
    facts, arrays = released.described(folder)
    size = (folder / released.MODEL).stat().st_size / 2**20
    by = f", written by taskexpert-jax {facts.version}" if facts.version else ""
    lines = [
        f"{folder} is a released model: step {facts.step}, tasks {', '.join(facts.tasks)}; {len(arrays)} arrays, "
        f"{size:.1f} MiB{by}; checksums good"
    ]
    return "\n".join(lines + [f"  {name}  {shape}  {dtype}" for name, (shape, dtype) in arrays.items()] * tree)


def _best(folder: pathlib.Path, opened: Manager, metrics: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the best value of the best task's metric; the newest evaluated checkpoint names the task."""
    evaluated = {step: found for step, found in metrics.items() if found}
    if not evaluated:
        return None
    try:
        config, _ = restored(json_file.read(folder / str(max(evaluated)) / "config" / "metadata"))
        task = best_task(from_config(config), config.checkpoint.best_task)
    except (UserError, json_file.MalformedError, OSError):
        return None  # the checkpoint is damaged
    key = f"{task.name}/{task.main_metric}"
    with manager.for_run(folder, key, higher_is_better=task.higher_is_better, create=False) as ranked:
        return ranked.best(key)


def _version(folder: pathlib.Path) -> str:
    """The version of the code that wrote a checkpoint; a dash for checkpoints from before it was recorded."""
    try:
        return json_file.read(folder / sealing.RECORD, {"version": str})["version"]
    except (json_file.MalformedError, OSError):
        return "-"


def _unlisted(folder: pathlib.Path, step: int) -> UserError:
    return UserError(f"the arrays of {folder}/{step} cannot be listed: it is damaged; --verify names the file")


def _folder(workdir: pathlib.Path) -> pathlib.Path:
    folder = workdir.absolute() / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"no checkpoints in {workdir}: give the --workdir of a run")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with this very run
    logging.set_verbosity(logging.ERROR)  # hides Orbax's warning about read-only mode
    parser = command_line.Parser("taskexpert_jax.checkpoint", __doc__)
    parser.add_argument("workdir", type=paths.model_argument, metavar="RUN", help=paths.MODEL_FORM)
    parser.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    parser.add_argument("--tree", action="store_true", help="list the arrays of the newest checkpoint")
    args = parser.parse_args(arguments)

    def program() -> None:
        workdir = hub.located(args.workdir, "RUN")
        if released.is_released(workdir):
            print(released_model(workdir, tree=args.tree))
            return
        states = verified(workdir) if args.verify else {}
        print(listing(workdir, states))
        if args.tree:
            print(f"\n{tree(workdir)}")
        if bad := [f"{step} ({state})" for step, state in states.items() if state != "good"]:
            raise UserError(f"{len(bad)} of {len(states)} checkpoints of {workdir} not intact: {', '.join(bad)}")

    return command_line.ended(program)


if __name__ == "__main__":
    sys.exit(main())
