"""Figures of a table of benchmarks/ablation.py: differences between rungs, curves of training, histories of gates.

python benchmarks/ablation_figures.py differences TABLE.json --output=FILE.svg
python benchmarks/ablation_figures.py losses TABLE.json --output=FILE.svg
python benchmarks/ablation_figures.py gates HISTORY.json ... --output=FILE.svg     # of benchmarks/gate_history.py
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import matplotlib as mpl
from matplotlib import pyplot as plt
import numpy as np

from benchmarks import seeds
from configs import ablation
from taskexpert_jax.models.decoders.taskexpert import MEMORY

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "taskexpert", "font.size": 9, "axes.spines.top": False})
mpl.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})


def _grid(count: int, columns: int = 3, height: float = 2.3) -> tuple[Any, list[Any]]:
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, height * rows), squeeze=False)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def differences(content: dict[str, Any]) -> Any:
    """A panel for each metric: the difference to the reference rung of every seed, their mean and 95 % interval."""
    results = [seeds.recorded(record) for record in content["runs"]]
    against, of = content["against"], seeds.columns(results)
    table = seeds.differences(results, against)
    base = {found.seed: found.values for found in results if found.rung == against}
    figure, axes = _grid(len(of), columns=4)
    for axis, column in zip(axes, of, strict=True):
        for place, (rung, row) in enumerate(table.items()):
            mean, half = row["mean"].get(column.key, np.nan), row["half_width"].get(column.key, np.nan)
            axis.errorbar([mean], [place], xerr=None if np.isnan(half) else [half], fmt="o", color="#1f4e79", capsize=3)
            pairs = [(f.values, base[f.seed]) for f in results if f.rung == rung and f.seed in base]
            points = [values[column.key] - other[column.key] for values, other in pairs if column.key in values]
            axis.plot(points, [place] * len(points), "|", color="#888888")
        axis.axvline(0, color="#bbbbbb", linewidth=1)
        axis.set_yticks(range(len(table)), table if axis in axes[::4] else [""] * len(table))
        axis.invert_yaxis()
        better = "right" if column.higher_is_better else "left"
        axis.set_title(f"{column.title}: {better} is better", fontsize=9)
    figure.suptitle(f"Difference to {against} within a seed: seeds, mean, 95 % interval", fontsize=10)
    return figure


def losses(content: dict[str, Any]) -> Any:
    """A panel for each task: the training loss by step over that of the reference rung, mean over the common seeds."""
    results = [seeds.recorded(record) for record in content["runs"]]
    against = content["against"]
    base = {found.seed: found.losses for found in results if found.rung == against and found.losses}
    tasks = [name for name in next(iter(base.values())) if name != "step"]
    compared = [f for f in results if f.losses and f.rung != against and f.seed in base]
    rungs = dict.fromkeys(f.rung for f in compared if not f.rung.startswith(ablation.SINGLE))
    figure, axes = _grid(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for rung in rungs:
            pairs = [(f.losses, base[f.seed]) for f in compared if f.rung == rung]
            ratios = np.mean([np.divide(ours[task], other[task]) for ours, other in pairs], axis=0)
            axis.plot(pairs[0][0]["step"], 100 * (ratios - 1), label=rung, linewidth=1.2)
        axis.axhline(0, color="#bbbbbb", linewidth=1)
        axis.set_title(f"{task} loss, difference to {against} (%)", fontsize=9)
    axes[0].legend(fontsize=7)
    return figure


def gates(histories: list[dict[str, Any]]) -> Any:
    """A row for each history, a panel for each tap: the memory's mean weight by step, a line for each task."""
    taps = len(histories[0]["weights"][0])
    figure, axes = _grid(len(histories) * taps, columns=taps, height=1.9)
    for row, history in enumerate(histories):
        weights, slot = np.array(history["weights"]), history["slots"].index(MEMORY)
        for tap in range(taps):
            axis = axes[row * taps + tap]
            for number, task in enumerate(history["tasks"]):
                axis.plot(history["steps"], weights[:, tap, number, slot], label=task, linewidth=1.2)
            axis.set_ylim(0, 1)
            if not row:
                axis.set_title(f"tap {tap + 1}", fontsize=9)
        changes = [change for change in history["changes"] if change.startswith("model.")]
        axes[row * taps].set_ylabel("\n".join([history["rung"].split(",")[0], *changes]), fontsize=7)
    axes[0].legend(fontsize=7, ncols=2)
    return figure


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("differences", "losses", "gates"))
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    args = parser.parse_args()
    contents = [json.loads(file.read_text()) for file in args.files]
    of_table = {"differences": differences, "losses": losses}
    figure = of_table[args.figure](contents[0]) if args.figure in of_table else gates(contents)
    figure.savefig(args.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
