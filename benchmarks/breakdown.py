"""Differences between trained models by group of images, part of the image and class: where one is better.

  python benchmarks/breakdown.py full static --runs=DIR --output=OUT --compare full static

DIR is the output folder of benchmarks/ablation.py: RUNG/seedN. Each finished run is evaluated once over its evaluation
split. Groups of images: the conditions of wide scenes (docs/scenes.md), and thirds by brightness, median depth and
number of semantic regions. Parts of images: bands of distance, boundaries of classes and interior. Labels outside of a
part are ignored, so every number is the project's own metric. Runs in OUT/breakdown.json are not evaluated again: the
same command completes it. OUT/breakdown.md has the differences between two rungs within seeds.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from benchmarks import image_groups, machine, paired
from input_pipeline import pipeline, scenes
from taskexpert_jax import command_line, compare, files, json_file
from taskexpert_jax import tasks as task_records
from taskexpert_jax.config import read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import full_pass, inference, results, steps
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import Task, from_config
from taskexpert_jax.tasks.metrics import PooledMetric

TABLE = "breakdown.json"
NOT_DATA = ("cache", "threads", "data_dir", "local_cache", "train_split", "train_scenes")  # how they are read
_VALUES = json_file.Each(json_file.Each((float, None)))
_FORM = {
    "data": {"images": json_file.Each(int), "bounds": json_file.Each([(float, None), (float, None)])},
    "runs": json_file.Items({"rung": str, "seed": int, "groups": _VALUES, "classes": _VALUES}),
}
AGREES = 1e-4  # largest relative difference from the run's own evaluation

States = Mapping[str, Any]


class Run(NamedTuple):
    """A trained run: a rung with a seed."""

    rung: str
    seed: int


class Found(NamedTuple):
    """Results of a run.

    Attributes:
      groups: group or part -> `task/metric` -> value, of the metrics that papers report; of boundaries the loss.
      classes: task -> class -> IoU in percent, over all images.
      data: what all runs of a table must have in common: data set, images by group, bounds of the thirds.
    """

    groups: dict[str, dict[str, float]]
    classes: dict[str, dict[str, float]]
    data: dict[str, Any]


def find(folder: pathlib.Path, rungs: Sequence[str]) -> dict[Run, pathlib.Path]:
    """Finished runs of the rungs below the output folder of benchmarks/ablation.py."""
    found = {}
    for rung in rungs:
        for workdir in sorted((folder / rung).glob("seed*")):
            if not workdir.name.removeprefix("seed").isdigit():
                continue
            if (workdir / "evaluation" / "metrics.json").exists():
                found[Run(rung, int(workdir.name.removeprefix("seed")))] = workdir
            else:
                print(f"{workdir} is not finished: left out", flush=True)
    return found


# ------------------------------------------------------------------------------------------------------- one run


def evaluate(workdir: pathlib.Path) -> Found:
    """Evaluates a run's last checkpoint by group.

    Raises:
      UserError: as `load`; the run's data are missing or others than it was trained on.
    """
    config = read_run(workdir)
    pipeline.record_fingerprint(config)
    tasks, mesh = from_config(config), sharding.one_device_mesh()

    def batches() -> pipeline.EvalBatches:
        return pipeline.eval_batches(config, tasks, batch_size=config.eval.batch_size)

    groups = image_groups.of_images(batches(), tasks, _conditions(config, batches().examples))
    with sharding.use(mesh):
        model, variables, _ = load(config, workdir, "latest", mesh)
        tally = make_tally(tasks, inference.make_inference(model, config))
        whole, parts = add_up(tally, variables, with_members(batches(), groups), mesh)
    states = dict(zip(groups.members, whole, strict=True))
    states |= {name: parts[name] for name in image_groups.PARTS if name in parts}
    images = {name: int(member.sum()) for name, member in groups.members.items()}
    data = {name: value for name, value in json.loads(config.dataset.to_json()).items() if name not in NOT_DATA}
    return Found(
        groups={name: _published(tasks, state) for name, state in states.items()},
        classes={
            task: {score.name: score.iou for score in scores}
            for task, scores in results.per_class(tasks, states[image_groups.ALL]).items()
        },
        data={"dataset": data, "images": images, "bounds": groups.bounds},
    )


def _conditions(config: ConfigDict, count: int) -> list[scenes.Condition]:
    """Conditions of the images of the evaluation split, in its order; none unless they are wide scenes."""
    dataset = config.dataset
    if dataset.name != "scenes" or dataset.variety != "wide":
        return []
    numbers = scenes.source(dataset, dataset.eval_split).numbers
    return [scenes.condition(number, dataset.seed) for number in numbers[:count]]


def with_members(
    batches: Iterable[Mapping[str, np.ndarray]], groups: image_groups.ImageGroups
) -> Iterable[dict[str, np.ndarray]]:
    """The batches with `members` (B, groups) bool: which of its images are in which group."""
    table, start = np.stack(list(groups.members.values()), axis=1), 0
    for batch in batches:
        real = np.flatnonzero(batch["mask"])  # padding examples are in no group
        members = np.zeros((len(batch["mask"]), table.shape[1]), bool)
        members[real] = table[start : start + len(real)]
        start += len(real)
        yield {**batch, "members": members}


def make_tally(tasks: tuple[Task, ...], infer: inference.Inference) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Function (variables, batch) -> metric states of the groups of images, with leaves (groups, ...), and of parts."""

    def tally(variables: Any, batch: Mapping[str, Any]) -> tuple[States, dict[str, States]]:
        predictions = infer(variables, batch["image"], batch["window"])
        single = {task.name: full_pass.single_states(task, predictions[task.name], batch) for task in tasks}

        def of_group(member: jax.Array) -> States:
            def kept(leaf: jax.Array) -> jax.Array:
                return jnp.where(member.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))

            return {name: jax.tree.map(kept, state).reduce() for name, state in single.items()}

        def of_part(part: jax.Array) -> States:
            labels = {task.name: _only(task, batch[task.name], part) for task in tasks}
            return steps.merge_batch(tasks, steps.empty_states(tasks), predictions, {**batch, **labels})

        parts = image_groups.parts_of_images(tasks, batch)
        # A loop, so that the program has the metrics once.
        found = jax.lax.map(of_part, jnp.stack(list(parts.values()))) if parts else None
        by_part = {name: jax.tree.map(lambda leaf, i=i: leaf[i], found) for i, name in enumerate(parts)}
        return jax.vmap(of_group)(batch["members"].T), by_part

    return tally


def _only(task: Task, label: jax.Array, part: jax.Array) -> jax.Array:
    """The label (B, H, W, c) with `ignore` outside of the part (B, H, W)."""
    return jnp.where(part[..., None], label, jnp.asarray(task.ignore, label.dtype))


def add_up(
    tally: Callable[[Any, Mapping[str, Any]], Any],
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Any,
) -> tuple[list[States], dict[str, States]]:
    """Metric states on the host over all batches: of each group of images, and of each part."""

    @jax.jit
    def step(variables: Any, total: Any, batch: Mapping[str, Any]) -> Any:
        found = tally(variables, batch)
        return jax.tree.map(_merged, total, found, is_leaf=lambda node: isinstance(node, PooledMetric))

    total: Any = None
    for batch in sharding.to_devices(batches, mesh):
        if total is None:
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(tally, variables, batch))
        total = step(variables, total, batch)
    whole, parts = jax.device_get(total)
    count = len(jax.tree.leaves(whole)[0])
    return [jax.tree.map(lambda leaf, row=row: leaf[row], whole) for row in range(count)], parts


def _merged(one: PooledMetric, other: PooledMetric) -> PooledMetric:
    return one.merge(other)


def _published(tasks: tuple[Task, ...], states: States) -> dict[str, float]:
    """`task/metric` -> value, of the metrics that papers report; odsF needs whole images and is left out."""
    values = results.metrics(tasks, states)
    return {key: values[key] for key in (f"{task.name}/{task.main_metric}" for task in tasks)}


def check(found: Found, workdir: pathlib.Path) -> None:
    """Prints a warning for each metric over all images that is not that of the run's own evaluation."""
    theirs = compare.read_metrics(workdir).get("metrics", {})
    for key, value in found.groups[image_groups.ALL].items():
        other = theirs.get(key)
        if other is None or not math.isclose(value, other, rel_tol=AGREES):
            print(f"warning: {workdir}: {key} is {value:.6g} here, {other} in its evaluation", flush=True)


# ------------------------------------------------------------------------------------------------------- the table


def read(output: pathlib.Path) -> tuple[dict[str, Any], dict[Run, Found]]:
    """Data and runs of the table that an earlier call left; empty if there is none.

    Raises:
      UserError: it is not a table of this program.
    """
    file = output / TABLE
    if not file.exists():
        return {}, {}
    try:
        content = json_file.read(file, _FORM)
        runs = {Run(run["rung"], run["seed"]): run for run in content["runs"]}
        return content["data"], {
            key: Found(_numbers(run["groups"]), _numbers(run["classes"]), content["data"]) for key, run in runs.items()
        }
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; choose another --output") from None
    except json_file.MalformedError as error:
        raise UserError(f"{file} is not a table of this program ({error}): move it away") from None


def _numbers(table: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """The table with NaN for what JSON has as null."""
    return {
        row: {key: math.nan if value is None else float(value) for key, value in values.items()}
        for row, values in table.items()
    }


def differences(runs: Mapping[Run, Found], one: str, other: str) -> dict[str, Any]:
    """Differences one - other within the seeds that both rungs have.

    Returns:
      seeds, and for the `groups` and the `classes`: row -> column -> {"mean": of the differences, "half_width": of the
      95 % interval, "other": mean of the other rung}. A value that is NaN in any run is left out.
    """
    seeds = sorted({run.seed for run in runs if run.rung == one} & {run.seed for run in runs if run.rung == other})
    pairs = [(runs[Run(one, seed)], runs[Run(other, seed)]) for seed in seeds]
    tables = {}
    for part in ("groups", "classes"):
        tables[part] = {}
        for row, values in getattr(pairs[0][0], part).items() if pairs else ():
            cells = {key: _cell([(getattr(a, part), getattr(b, part)) for a, b in pairs], row, key) for key in values}
            tables[part][row] = {key: cell for key, cell in cells.items() if cell}
    return {"seeds": seeds, **tables}


def _cell(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], row: str, key: str) -> dict[str, float]:
    values = [(a[row][key], b.get(row, {}).get(key, math.nan)) for a, b in pairs]
    if not np.isfinite(values).all():
        return {}
    mean, half = paired.interval([a - b for a, b in values])
    return {"mean": mean, "half_width": half, "other": float(np.mean([b for _, b in values]))}


def markdown(data: Mapping[str, Any], found: Mapping[str, Any], one: str, other: str) -> str:
    """Tables of the differences, groups and then classes; bold where the 95 % interval excludes 0."""
    count = len(found["seeds"])
    title = f"## {one} minus {other}, {count} seed{'s' if count != 1 else ''}"
    if not count:
        return f"{title}\n\nNo seed of both is evaluated."
    notes = (
        f"Mean over the seeds ± half-width of the 95 % interval; in brackets the mean of {other}. Bold: the interval "
        "excludes 0. Of the cells without any true difference, one in twenty is bold too."
    )
    keys = list(dict.fromkeys(key for row in found["groups"].values() for key in row))
    headlines = [task_records.headline(key.split("/")[0]) for key in keys]
    titles = [f"{of.name} {of.main_metric_title} {of.published(()).arrow}" for of in headlines]
    lines = ["| group | images | " + " | ".join(titles) + " |", "|---" * (len(keys) + 2) + "|"]
    for row, cells in found["groups"].items():
        images = data["images"].get(row, data["images"][image_groups.ALL])
        lines.append(f"| {_named(row, data)} | {images} | " + " | ".join(_text(cells.get(key)) for key in keys) + " |")
    parts = [title, notes, "\n".join(lines)]
    for task, cells in found["classes"].items():
        rows = [f"| {name} | {_text(cell)} |" for name, cell in cells.items()]
        parts.append("\n".join([f"| {task} class | IoU (%) ↑ |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _named(row: str, data: Mapping[str, Any]) -> str:
    """Name of a group, a third with its bounds."""
    statistic, _, third = row.rpartition(" ")
    if statistic not in data["bounds"]:
        return row
    low, high = (f"{math.nan if bound is None else bound:.3g}" for bound in data["bounds"][statistic])
    return f"{statistic} " + {"low": f"< {low}", "middle": f"{low} to {high}", "high": f">= {high}"}[third]


def _text(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return "-"
    places = 2 if abs(cell["other"]) >= 2 else 4
    text = f"{cell['mean']:+.{places}f}"
    if not math.isnan(cell["half_width"]):
        text += f" ± {cell['half_width']:.{places}f}"
        text = f"**{text}**" if abs(cell["mean"]) > cell["half_width"] else text
    return f"{text} ({cell['other']:.{places}f})"


# ----------------------------------------------------------------------------------------------------- the program


def write(output: pathlib.Path, runs: Mapping[Run, Found], compared: Sequence[Sequence[str]]) -> str:
    """Writes breakdown.json and breakdown.md; returns the Markdown."""
    data = next(iter(runs.values())).data
    found = [(one, other, differences(runs, one, other)) for one, other in compared]
    text = "\n\n".join(markdown(data, table, one, other) for one, other, table in found)
    ordered = sorted(runs.items(), key=lambda item: item[0])
    content = {
        "machine": machine.described("jax"),
        "data": data,
        "differences": [{"one": one, "other": other, **table} for one, other, table in found],
        "runs": [{**run._asdict(), "groups": of.groups, "classes": of.classes} for run, of in ordered],
    }
    table = json.dumps(json_file.finite(content), indent=1) + "\n"
    files.write({output / TABLE: table, output / "breakdown.md": text + "\n"})
    return text


def program(args: argparse.Namespace) -> None:
    """Evaluates what the table lacks, and writes it anew after each run.

    Raises:
      UserError: nothing to evaluate, runs on different data, or a table of others.
    """
    data, runs = read(args.output)
    wanted = find(args.runs, args.rungs)
    if not wanted and not runs:
        raise UserError(
            f"{args.runs} has no finished run of {', '.join(args.rungs)}; train with benchmarks/ablation.py"
        )
    finished = {run.rung for run in (*wanted, *runs)}
    if unknown := [rung for rung in args.rungs if rung not in finished]:
        raise UserError(f"{args.runs} has no finished run of {', '.join(unknown)}; train with benchmarks/ablation.py")
    for pair in args.compare:
        if unknown := [rung for rung in pair if rung not in finished]:
            raise UserError(f"--compare: no finished run of {', '.join(unknown)}")
        one, other = ({run.seed for run in (*wanted, *runs) if run.rung == rung} for rung in pair)
        if not one & other:
            raise UserError(f"--compare: no seed has finished runs of both {pair[0]} and {pair[1]}")
    files.folder_for_results(args.output)
    for run, workdir in wanted.items():
        if run in runs:
            continue
        started = time.monotonic()
        found = evaluate(workdir)
        if data and json_file.finite(json.loads(json.dumps(found.data))) != data:
            raise UserError(f"{workdir} has other data or tasks than {args.output / TABLE}: choose another --output")
        check(found, workdir)
        runs[run] = found
        data = json.loads(json.dumps(found.data))
        write(args.output, runs, args.compare)
        print(f"{run.rung} seed {run.seed}: {time.monotonic() - started:.0f} s", flush=True)
    text = write(args.output, runs, args.compare)
    print(text or f"{args.output / TABLE} has the numbers of {len(runs)} runs; --compare RUNG OTHER makes tables")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    parser = command_line.Parser("benchmarks/breakdown.py", __doc__)
    parser.add_argument("rungs", nargs="+", metavar="RUNG", help="of configs/ablation.py")
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="output folder of benchmarks/ablation.py")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for the table")
    parser.add_argument(
        "--compare", nargs=2, action="append", default=[], metavar=("RUNG", "OTHER"), help="differences RUNG - OTHER"
    )
    options = parser.parse_args(arguments)
    return command_line.ended(lambda: program(options))


if __name__ == "__main__":
    sys.exit(main())
