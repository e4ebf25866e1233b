"""The JSON of a ladder: reading, extending, and its tables.

`trainings` has a record of each run, `runs` what benchmarks/ablation_figures.py draws: the finished ones as
`seeds.Result`.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from benchmarks import device, seeds
from taskexpert_jax import json_file, text_table
from taskexpert_jax.errors import UserError

FINISHED = "finished"
AGAINST = "static"  # the rung that the others are compared with
_FORM = {
    "settings": dict,
    "data": dict,
    "calls": json_file.Items({"device": str, "started": str, "commit": (str, None)}),
    "rungs": json_file.Each({"parameters": int, "multiply_adds": int}),
    "trainings": json_file.Items({"rung": str, "seed": int, "status": str}),
}


def read(path: pathlib.Path) -> dict[str, Any]:
    """The content of a file that `run` wrote.

    Raises:
      UserError: there is none, or another one.
    """
    try:
        return json_file.read(path, _FORM)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `benchmarks/device_ladder.py run --output={path}` writes it") from None
    except (json_file.MalformedError, OSError) as error:
        raise UserError(f"{path} is no ladder's JSON ({error}): choose another --output") from None


def opened(path: pathlib.Path, settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The content to extend: an empty one, or that of an earlier call with its finished runs.

    Raises:
      UserError: as `read`, or the earlier call had other settings or frames.
    """
    if not path.exists():
        return {"settings": dict(settings), "data": dict(data), "calls": [], "rungs": {}, "trainings": []}
    content = read(path)
    for of, ours in (("settings", settings), ("data", data)):
        for name, value in ours.items():
            if (theirs := content[of].get(name)) != value:
                raise UserError(f"{path} has runs with {name} {theirs!r}, not {value!r}: choose another --output")
    content["trainings"] = [run for run in content["trainings"] if run["status"] == FINISHED]
    return content


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Replaces the file, with the tables' numbers, atomically."""
    found = finished(content)
    numbers: dict[str, Any] = {"against": AGAINST, "runs": [each._asdict() for each in found]}
    if found:
        numbers |= {"summary": seeds.summarise(found), "differences": seeds.differences(found, AGAINST)}
    device.write(path, json_file.finite({**content, **numbers}))


def finished(content: Mapping[str, Any]) -> list[seeds.Result]:
    """Results of the finished runs, rung by rung."""
    done = [run for run in content["trainings"] if run["status"] == FINISHED]
    order = list(dict.fromkeys(run["rung"] for run in done))
    done.sort(key=lambda run: (order.index(run["rung"]), run["seed"]))
    return [seeds.result(run["rung"], run["seed"], run, losses(run["curve"])) for run in done]


def losses(curve: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Training losses of a run by task, and their steps; see `seeds.Result`."""
    prefix, curve = "loss/", [point for point in curve if "loss" in point]  # not those of NaN steps alone
    names = {name: name.removeprefix(prefix) for point in curve for name in point if name.startswith(prefix)}
    return {short: [point[name] for point in curve] for name, short in {"step": "step", **names}.items()}


def text(content: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    found = finished(content)
    parts = [_calls(content["calls"]), _sizes(content)]
    if found:
        of, summary = seeds.columns(found), seeds.summarise(found)
        parts += [seeds.mean_table(summary, of)]
        if paired := seeds.differences(found, AGAINST):
            parts += [f"Differences to {AGAINST}, within seeds, with 95 % intervals:"]
            parts += [seeds.difference_table(paired, of, AGAINST, summary)]
        if memory := seeds.memory_weights(found):
            parts += ["Largest mean weight of the memory at a tap, by seed:", seeds.memory_table(memory)]
    other = [run for run in content["trainings"] if run["status"] != FINISHED]
    parts += [f"{run['rung']}, seed {run['seed']}: {run['status']}: {run.get('reason', '')}" for run in other]
    return "\n\n".join(parts)


def _calls(calls: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{call['device']}, {call['started']}, commit {call['commit']}" for call in calls]
    return "\n".join(dict.fromkeys(lines))


def _sizes(content: Mapping[str, Any]) -> str:
    rows = [["rung", "parameters", "multiply-adds", "images/s", "seconds a run"]]
    for rung, size in content["rungs"].items():
        runs = [run for run in content["trainings"] if run["rung"] == rung and run["status"] == FINISHED]
        rates = ", ".join(f"{run['images_per_s']:.0f}" for run in runs)
        times = ", ".join(f"{run['seconds']:.0f}" for run in runs)
        counts = f"{size['parameters'] / 1e6:.2f} M", f"{size['multiply_adds'] / 1e9:.2f} G"
        rows.append([rung, *counts, rates or "-", times or "-"])
    padded = text_table.padded(rows, "<>>>>")
    padded.insert(1, ["-" * len(cell) for cell in padded[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
