"""Compares runs, also with published results: taskexpert compare RUN... [--paper=BENCHMARK].

RUN is an evaluated workdir, or the metrics.json of an evaluation. The best number of each column is bold.
With `--single`, evaluations of single-task models, the table has delta-m, the mean relative gain over them.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
import sys
from typing import Any, NamedTuple

from taskexpert_jax import command_line, json_file, paths, terminal, text_table
from taskexpert_jax import tasks as task_records
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation.published import PUBLISHED
from taskexpert_jax.runs import sealing

DELTA = "delta-m"
# What is read of an evaluation's metrics.json.
_FORM = {
    "dataset": {"name": str, "split": str, "fingerprint": str},
    "published": json_file.Each({"metric": str, "value": (float, None)}),
    "examples": int,
}
_OF_LABELS = "sizes-"  # start of a folder's fingerprint, which is of the labels of the run's tasks alone


class Column(NamedTuple):
    """A column of the table; key: `task/metric`, or DELTA."""

    key: str
    title: str
    higher_is_better: bool


class Row(NamedTuple):
    """A model and its results by `Column.key`."""

    name: str
    values: dict[str, float]


def read_metrics(path: pathlib.Path) -> dict[str, Any]:
    """Reads the metrics.json of a workdir, or at the path itself.

    Raises:
      UserError: the file is missing, or was not written by `--mode=evaluate`.
    """
    file = path / "evaluation" / "metrics.json" if path.is_dir() else path
    try:
        content = json_file.read(file, _FORM)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; evaluate the run first: {command_line.called('evaluate', path)}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except json_file.MalformedError as error:
        raise UserError(f"{file} is not an evaluation's metrics.json ({error}); evaluate the run again") from error
    if not content["published"]:
        raise UserError(f"{file} has no published metric; evaluate the run again")
    if path.is_dir() and _trained_after(path, file):
        print(f"warning: {path} was trained further after this evaluation; evaluate it again", file=sys.stderr)
    return content


def _trained_after(workdir: pathlib.Path, evaluation: pathlib.Path) -> bool:
    """True if a checkpoint of the run is newer than the file of its evaluation."""
    steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    saved = [sealing.saved_at(path) for path in steps if sealing.complete(path)]
    return max(saved, default=0.0) > evaluation.stat().st_mtime


def published_values(run: Mapping[str, Any]) -> dict[str, float]:
    """Published metrics of an evaluation, `task/metric` -> value; NaN if nothing was measured."""
    values = {f"{task}/{found['metric']}": found["value"] for task, found in run["published"].items()}
    return {key: math.nan if value is None else float(value) for key, value in values.items()}


def columns(keys: Sequence[str]) -> list[Column]:
    """The columns of `task/metric` keys, in the order of the tasks, with the tasks' titles and directions.

    Raises:
      UserError: an unknown task, or a metric that is not the task's published one.
    """
    found = []
    names = [name for name in task_records.NAMES if any(key.startswith(f"{name}/") for key in keys)]
    unknown = [key for key in keys if key.split("/")[0] not in names]
    if unknown:
        raise UserError(f"{unknown[0]}: unknown task; known: {', '.join(task_records.NAMES)}")
    for task in map(task_records.headline, names):
        for key in dict.fromkeys(key for key in keys if key.startswith(f"{task.name}/")):
            published = task.published([key])
            if key != f"{task.name}/{published.metric}":
                raise UserError(f"{key}: the published metric of {task.title} is {published.metric}")
            found.append(Column(key, f"{task.name} {published.title}", published.higher_is_better))
    return found


def delta_m(values: Mapping[str, float], single: Mapping[str, float], of: Sequence[Column]) -> float:
    """Mean over tasks of the relative gain over single-task models, in percent; positive is better.

    Mean of (-1)^(lower is better) * (M - B) / B. `values` are M and `single` B, by `Column.key`.

    Raises:
      UserError: a single-task result is missing or 0.
    """
    gains = []
    for column in of:
        if column.key in values:
            base = single.get(column.key)
            if not base:
                raise UserError(
                    f"--single: no single-task result for {column.key}; add its evaluation, or omit --single"
                )
            gain = (values[column.key] - base) / base
            gains.append(gain if column.higher_is_better else -gain)
    return 100 * sum(gains) / len(gains)


def single_results(paths: Sequence[pathlib.Path]) -> dict[str, float]:
    """Results of all evaluations of single-task models, `task/metric` -> value.

    Raises:
      UserError: two of them have the same task.
    """
    single: dict[str, float] = {}
    for path in paths:
        for key, value in published_values(read_metrics(path)).items():
            if key in single:
                raise UserError(f"--single: {path} has {key}, which an earlier one has too; give each task once")
            single[key] = value
    return single


def _check_data(runs: Mapping[str, Mapping[str, Any]], paper: str | None) -> None:
    """Raises UserError if results come from different data and cannot be compared."""
    # A part of a split (eval.max_examples) and reduced images are other data too.
    seen = [(name, {"downscale": 1.0, **run["dataset"], "examples": run["examples"]}) for name, run in runs.items()]
    first, expected = seen[0]
    for name, data in seen:
        other_labels = runs[name]["published"].keys() != runs[first]["published"].keys()
        for field in ("name", "split", "fingerprint", "downscale", "examples"):
            if field == "fingerprint" and other_labels and data[field].startswith(_OF_LABELS):
                continue
            if data[field] != expected[field]:
                label = field if field == "examples" else f"dataset.{field}"
                raise UserError(
                    f"{name} was evaluated on other data than {first} ({label} {data[field]!r} and "
                    f"{expected[field]!r}); their results cannot be compared: evaluate both alike"
                )
        if paper and data["name"] != paper:
            raise UserError(f"--paper={paper}, but {name} was evaluated on {data['name']!r}")


def table(rows: Sequence[Row], of: Sequence[Column], *, bold: tuple[str, str]) -> str:
    """The rows as a Markdown table; missing results are `-`.

    bold: marks before and after the best result of each column.
    """

    def digits(column: Column) -> str:
        if column.key == DELTA:
            return "+.2f"
        finite = [row.values[column.key] for row in rows if math.isfinite(row.values.get(column.key, math.nan))]
        return ".2f" if finite and max(map(abs, finite)) >= 10 else ".4f"

    def best(column: Column) -> float:
        found = [v for row in rows if math.isfinite(v := row.values.get(column.key, math.nan))]
        return (max if column.higher_is_better else min)(found, default=math.nan)

    formats, bests = [digits(column) for column in of], [best(column) for column in of]

    def cell(row: Row, index: int) -> str:
        value = row.values.get(of[index].key, math.nan)
        if not math.isfinite(value):
            return "-"
        text = format(value, formats[index])
        return f"{bold[0]}{text}{bold[1]}" if value == bests[index] else text

    head = ["model", *(f"{column.title} {'↑' if column.higher_is_better else '↓'}" for column in of)]
    cells = [head, *([row.name, *(cell(row, index) for index in range(len(of)))] for row in rows)]
    padded = text_table.padded(cells, "<" * len(head))
    padded.insert(1, ["-" * len(text) for text in padded[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def compare(
    paths: Sequence[pathlib.Path],
    *,
    paper: str | None = None,
    single: Sequence[pathlib.Path] = (),
    bold: tuple[str, str] = ("**", "**"),
) -> str:
    """The table of the runs at `paths`, below the published rows of the benchmark `paper`.

    Raises:
      UserError: a run without evaluation, runs on different data, or a task without a result in `single`.
    """
    runs = {str(path): read_metrics(path) for path in paths}
    _check_data({**runs, **{str(path): read_metrics(path) for path in single}}, paper)
    rows = []
    for published in PUBLISHED[paper] if paper else ():
        rows.append(Row(f"{published.model}{f' ({published.note})' if published.note else ''}", published.values))
    rows += [Row(name, published_values(run)) for name, run in runs.items()]
    of = columns([key for row in rows for key in row.values])
    if single:
        base = single_results(single)
        ours = len(rows) - len(runs)
        for index, row in enumerate(rows):
            # A paper with tasks that `single` does not cover gets no delta-m; for a run this is an error.
            if index >= ours or row.values.keys() <= base.keys():
                rows[index] = Row(row.name, {**row.values, DELTA: delta_m(row.values, base, of)})
        of.append(Column(DELTA, "Δm (%)", higher_is_better=True))
    return table(rows, of, bold=bold)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = command_line.Parser("taskexpert_jax.compare", __doc__)
    parser.add_argument("runs", nargs="+", type=paths.argument, metavar="RUN", help="a workdir or a metrics.json")
    parser.add_argument("--paper", choices=sorted(PUBLISHED), help="add the published results of a benchmark")
    parser.add_argument(
        "--single", nargs="+", type=paths.argument, default=[], metavar="RUN", help="single-task runs, for delta-m"
    )
    parser.add_argument("--markdown", action="store_true", help="mark the best with ** even on a terminal")
    terminal.guard()
    args = parser.parse_args(arguments)
    bold = (terminal.BOLD, terminal.PLAIN) if sys.stdout.isatty() and not args.markdown else ("**", "**")
    return command_line.ended(lambda: print(compare(args.runs, paper=args.paper, single=args.single, bold=bold)))


if __name__ == "__main__":
    sys.exit(main())
