"""Results of several rungs over several seeds: means, differences within seeds, delta-m, and their tables.

Two runs of a seed start from the same random numbers and see the same batches, so their difference varies less than
the runs themselves: a claim about two rungs is judged by the mean of the differences and its confidence interval.
"""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
import statistics
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from benchmarks import paired
from configs import ablation
from taskexpert_jax import compare, json_file
from taskexpert_jax.errors import UserError
from taskexpert_jax.models.decoders.decoder import MEMORY

GAIN = "gain"  # mean relative gain over another rung of the same seed
EDGE_LOSS = compare.Column("edge/loss_plain", "edge loss", higher_is_better=False)


class Result(NamedTuple):
    """An evaluated run.

    Attributes:
      rung, seed: of `configs/ablation.py`, and `config.seed`.
      values: `task/metric` -> value: the published metrics, and the boundary loss.
      gates: mean gate weights, task -> [tap][expert slot]; None for a model without gates.
      slots: names of the expert slots.
      losses: training losses, `step` -> their steps and task -> means since the step before.
    """

    rung: str
    seed: int
    values: Mapping[str, float]
    gates: Mapping[str, Sequence[Sequence[float]]] | None = None
    slots: Sequence[str] = ()
    losses: Mapping[str, Sequence[float]] = MappingProxyType({})


_NUMBER = (float, None)  # JSON has null for NaN
FORM = {  # of `Result._asdict` in JSON
    "rung": str,
    "seed": int,
    "values": json_file.Each(_NUMBER),
    "gates": (json_file.Each(json_file.Items(json_file.Items(_NUMBER))), None),
    "slots": json_file.Items(str),
    "losses": json_file.Each(json_file.Items(_NUMBER)),
}


def result(rung: str, seed: int, evaluation: Mapping[str, Any], losses: Mapping[str, Sequence[float]]) -> Result:
    """The result in an evaluation's metrics.json, as `compare.read_metrics` returns it, and training losses."""
    values = compare.published_values(evaluation)
    plain = evaluation.get("metrics", {}).get(EDGE_LOSS.key)
    if plain is not None:
        values[EDGE_LOSS.key] = float(plain)
    gates = evaluation.get("gates")
    if gates is None:
        return Result(rung, seed, values, losses=losses)
    weights = {task: found["weights"] for task, found in gates["tasks"].items()}
    return Result(rung, seed, values, weights, gates["choices"], losses)


def losses_by_step(lines: Sequence[str]) -> dict[str, list[float]]:
    """Training losses in the lines of a run's metrics.jsonl; see `Result.losses`."""
    prefix = "train/loss/"
    found: dict[str, list[float]] = {}
    for record in map(json.loads, lines):
        tasks = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
        for name, value in {"step": record["step"], **tasks}.items() if tasks else ():
            found.setdefault(name, []).append(value)
    return found


def read_table(path: pathlib.Path, form: Mapping[str, Any], then: str) -> dict[str, Any]:
    """The content of a JSON file with `runs`, the records of `recorded`.

    Args:
      path: the file.
      form: of what else it must have, as in `json_file.parse`.
      then: what to do if it is another file, for the message.

    Raises:
      UserError: it cannot be read, is damaged or another file.
    """
    try:
        content = json_file.read(path, {"runs": json_file.Items(FORM), **form})
        for run in content["runs"]:
            rows = [row for taps in (run["gates"] or {}).values() for row in taps]
            if len({len(row) for row in rows} | {len(run["slots"])} if rows else ()) > 1:
                raise json_file.MalformedError(f"weights of {run['rung']} are not those of its slots")
            if len({len(values) for values in run["losses"].values()}) > 1:
                raise json_file.MalformedError(f"losses of {run['rung']} are not those of its steps")
        return content
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {then}") from None
    except json_file.MalformedError as error:
        raise UserError(f"{path} is not a table of benchmarks/ablation.py ({error}); {then}") from None


def recorded(record: Mapping[str, Any]) -> Result:
    """The result that `Result._asdict` and JSON made a record of, see `FORM`; JSON has null for NaN."""
    found = Result(**{name: record[name] for name in Result._fields if name in record})
    return found._replace(
        values=_with_nan(dict(found.values)),
        gates=_with_nan(found.gates),
        losses=_with_nan(dict(found.losses)),
    )


def _with_nan(value: Any) -> Any:
    """Inverse of `json_file.finite`, where all values are numbers."""
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_nan(inner) for inner in value]
    return math.nan if value is None else value


def columns(results: Sequence[Result]) -> list[compare.Column]:
    """Columns of all values, the boundary loss last."""
    keys = dict.fromkeys(key for found in results for key in found.values)
    published = compare.columns(sorted(key for key in keys if key != EDGE_LOSS.key))
    return [*published, EDGE_LOSS] if EDGE_LOSS.key in keys else published


def _published(results: Sequence[Result]) -> list[compare.Column]:
    return [column for column in columns(results) if column is not EDGE_LOSS]


def single_means(results: Sequence[Result]) -> dict[str, float]:
    """Means of the single-task models over their seeds: `task/metric` -> mean."""
    by_key: dict[str, list[float]] = {}
    for found in results:
        if found.rung.startswith(ablation.SINGLE):
            for key, value in found.values.items():
                by_key.setdefault(key, []).append(value)
    return {key: statistics.mean(numbers) for key, numbers in by_key.items()}


def with_delta(results: Sequence[Result]) -> list[Result]:
    """The results, those of all the single-task models' tasks with delta-m."""
    single, of = single_means(results), _published(results)
    covered = {column.key for column in of} <= single.keys()

    def completed(found: Result) -> Result:
        if not covered or found.rung.startswith(ablation.SINGLE):
            return found
        return found._replace(values={**found.values, compare.DELTA: _gain(found.values, single, of)})

    return [completed(found) for found in results]


def _gain(values: Mapping[str, float], base: Mapping[str, float], of: Sequence[compare.Column]) -> float:
    """`compare.delta_m` over the metrics that both have; NaN if there are none, or where one of the base is 0."""
    both = [column for column in of if column.key in values and column.key in base]
    if not both or not all(base[column.key] for column in both):
        return math.nan
    return compare.delta_m(values, base, both)


def summarise(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Rung -> {"seeds": [...], "mean": {key: value}, "std": {key: value}}; std: of the sample, nan for one seed."""
    complete, summary = with_delta(results), {}
    for rung in dict.fromkeys(found.rung for found in complete):
        rows = [found for found in complete if found.rung == rung]
        keys = [key for key in rows[0].values if all(key in row.values for row in rows)]
        lists = {key: [row.values[key] for row in rows] for key in keys}
        summary[rung] = {
            "seeds": [row.seed for row in rows],
            "mean": {key: statistics.mean(numbers) for key, numbers in lists.items()},
            "std": {key: float(np.std(n, ddof=1)) if len(n) > 1 else math.nan for key, n in lists.items()},
        }
    return summary


def differences(results: Sequence[Result], against: str) -> dict[str, dict[str, Any]]:
    """Differences to the rung `against`, within the seeds that both have.

    Returns:
      Rung -> {"seeds": [...], "mean": {key: difference}, "half_width": {key: of the 95 % interval}}; half_width is nan
      for one seed. The key GAIN is the mean over the tasks of the relative gain in the published metric, in percent;
      nan where a metric of `against` is 0.
    """
    of = _published(results)
    base = {found.seed: found.values for found in results if found.rung == against}
    table = {}
    for rung in dict.fromkeys(found.rung for found in results):
        if rung == against or rung.startswith(ablation.SINGLE):
            continue
        pairs = {f.seed: (f.values, base[f.seed]) for f in results if f.rung == rung and f.seed in base}
        if not pairs:
            continue
        keys = [column.key for column in columns(results) if all(column.key in v for p in pairs.values() for v in p)]
        lists = {key: [values[key] - other[key] for values, other in pairs.values()] for key in keys}
        lists[GAIN] = [_gain(values, other, of) for values, other in pairs.values()]
        intervals = {key: paired.interval(numbers) for key, numbers in lists.items()}
        table[rung] = {
            "seeds": list(pairs),
            "mean": {key: mean for key, (mean, _) in intervals.items()},
            "half_width": {key: half for key, (_, half) in intervals.items()},
        }
    return table


def memory_weights(results: Sequence[Result]) -> dict[str, dict[str, list[float]]]:
    """Rung -> task -> for each seed the largest of the taps' mean weights of the memory; 1: a collapsed gate."""
    table: dict[str, dict[str, list[float]]] = {}
    for found in results:
        if found.gates and MEMORY in found.slots:
            slot = list(found.slots).index(MEMORY)
            for task, taps in found.gates.items():
                largest = float(np.max([weights[slot] for weights in taps]))
                table.setdefault(found.rung, {}).setdefault(task, []).append(largest)
    return table


def mean_table(summary: Mapping[str, Mapping[str, Any]], of: Sequence[compare.Column]) -> str:
    """The summary as Markdown: mean ± standard deviation over the seeds."""
    shown = [*of]
    if any(compare.DELTA in row["mean"] for row in summary.values()):
        shown.append(compare.Column(compare.DELTA, "Δm (%)", higher_is_better=True))
    return _table(summary, shown, _digits(summary, of), "std")


def difference_table(
    table: Mapping[str, Mapping[str, Any]],
    of: Sequence[compare.Column],
    against: str,
    summary: Mapping[str, Mapping[str, Any]],
) -> str:
    """The differences as Markdown: mean ± half-width of the 95 % interval; bold where the interval excludes 0."""
    shown = [*of, compare.Column(GAIN, f"gain over {against} (%)", higher_is_better=True)]
    return _table(table, shown, _digits(summary, of), "half_width")


def _digits(summary: Mapping[str, Mapping[str, Any]], of: Sequence[compare.Column]) -> dict[str, int]:
    """Decimal places of each column; summary: the means, whose size decides."""
    means = {c.key: [abs(row["mean"].get(c.key, 0)) for row in summary.values()] for c in of}
    largest = {key: max(filter(math.isfinite, values), default=0) for key, values in means.items()}
    return {key: 2 if value >= 2 else 4 for key, value in largest.items()} | {compare.DELTA: 2, GAIN: 2}


def _table(
    rows: Mapping[str, Mapping[str, Any]], of: Sequence[compare.Column], digits: Mapping[str, int], spread: str
) -> str:
    signed = spread == "half_width"
    lines = ["| rung | seeds | " + " | ".join(f"{c.title} {'↑' if c.higher_is_better else '↓'}" for c in of) + " |"]
    lines.append("|---" * (len(of) + 2) + "|")

    def cell(row: Mapping[str, Any], key: str) -> str:
        if key not in row["mean"]:
            return "-"
        mean, width, places = row["mean"][key], row[spread][key], digits[key]
        if math.isnan(mean):
            return "nan"
        sign = "+" if signed or key == compare.DELTA else ""
        text = f"{mean:{sign}.{places}f}"
        if math.isnan(width):
            return text
        text = f"{text} ± {width:.{places}f}"
        return f"**{text}**" if signed and abs(mean) > width else text

    for rung, row in rows.items():
        lines.append(f"| {rung} | {len(row['seeds'])} | " + " | ".join(cell(row, c.key) for c in of) + " |")
    return "\n".join(lines)


def memory_table(weights: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Largest mean weights of the memory as Markdown, a number for each seed."""
    tasks = list(dict.fromkeys(task for row in weights.values() for task in row))
    lines = ["| rung | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for rung, row in weights.items():
        cells = [" ".join(f"{value:.2f}" for value in row.get(task, ())) or "-" for task in tasks]
        lines.append(f"| {rung} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
