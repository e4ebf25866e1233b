"""Figures of a table of benchmarks/ablation.py: differences between rungs, curves of training, histories of gates.

python benchmarks/ablation_figures.py differences TABLE.json --output=FILE.svg
python benchmarks/ablation_figures.py losses TABLE.json --output=FILE.svg
python benchmarks/ablation_figures.py gates HISTORY.json ... --output=FILE.svg     # of benchmarks/gate_history.py
"""

from collections.abc import Sequence
import io
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np

from benchmarks import seeds
from configs import ablation
from taskexpert_jax import command_line, files, json_file
from taskexpert_jax.errors import UserError
from taskexpert_jax.models.decoders.decoder import MEMORY

FORMATS = (".svg", ".pdf", ".png")
_WEIGHTS = json_file.Items(json_file.Items(json_file.Items(json_file.Items((float, None)))))
_HISTORY = {  # of benchmarks/gate_history.py
    "rung": str,
    "changes": json_file.Items(str),
    "tasks": json_file.Items(str),
    "slots": json_file.Items(str),
    "steps": json_file.Items(int),
    "weights": _WEIGHTS,
}

_STYLE: Any = {  # for the drawing alone: other figures of a process keep theirs
    "svg.fonttype": "none",
    "svg.hashsalt": "taskexpert",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _grid(count: int, columns: int = 3, height: float = 2.3) -> tuple[Figure, list[Any]]:
    rows = -(-count // columns)
    figure = Figure(figsize=(10, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def differences(content: dict[str, Any]) -> Any:
    """A panel for each metric: the difference to the reference rung of every seed, their mean and 95 % interval."""
    results = [seeds.recorded(record) for record in content["runs"]]
    against, of = content["against"], seeds.columns(results)
    table = seeds.differences(results, against)
    if not table:
        raise UserError(f"no rung has a seed that {against}, which it is compared with, has too: nothing to draw")
    base = {found.seed: found.values for found in results if found.rung == against}
    figure, axes = _grid(len(of), columns=4)
    for axis, column in zip(axes, of, strict=True):
        for place, (rung, row) in enumerate(table.items()):
            mean, half = row["mean"].get(column.key, np.nan), row["half_width"].get(column.key, np.nan)
            axis.errorbar([mean], [place], xerr=None if np.isnan(half) else [half], fmt="o", color="#1f4e79", capsize=3)
            pairs = [(f.values, base[f.seed]) for f in results if f.rung == rung and f.seed in base]
            points = [
                v[column.key] - other[column.key] for v, other in pairs if column.key in v and column.key in other
            ]
            axis.plot(points, [place] * len(points), "|", color="#888888")
        axis.axvline(0, color="#bbbbbb", linewidth=1)
        axis.set_yticks(range(len(table)), table if axis in axes[::4] else [""] * len(table))
        axis.invert_yaxis()
        better = "right" if column.higher_is_better else "left"
        axis.set_title(f"{column.title}: {better} is better", fontsize=8)
    figure.suptitle(f"Difference to {against} within a seed: seeds, mean, 95 % interval", fontsize=10)
    return figure


def losses(content: dict[str, Any]) -> Any:
    """A panel for each task: the training loss by step over that of the reference rung, mean over the common seeds."""
    results = [seeds.recorded(record) for record in content["runs"]]
    against = content["against"]
    base = {found.seed: found.losses for found in results if found.rung == against and found.losses}
    compared = [f for f in results if f.losses and f.rung != against and f.seed in base]
    rungs = dict.fromkeys(f.rung for f in compared if not f.rung.startswith(ablation.SINGLE))
    if not rungs:
        raise UserError(f"no rung with losses has a seed that {against}, which it is compared with, has too")
    for found in compared:
        if found.rung in rungs and list(found.losses["step"]) != list(base[found.seed]["step"]):
            raise UserError(f"losses of {found.rung}, seed {found.seed}, are of other steps than those of {against}")
    tasks = [name for name in next(iter(base.values())) if name != "step"]
    figure, axes = _grid(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        for rung in rungs:
            pairs = [(f.losses, base[f.seed]) for f in compared if f.rung == rung]
            ratios = np.mean([np.divide(ours[task], other[task]) for ours, other in pairs], axis=0)
            axis.plot(pairs[0][0]["step"], 100 * (ratios - 1), label=rung, linewidth=1.2)
        axis.axhline(0, color="#bbbbbb", linewidth=1)
        axis.set_title(f"{task} loss, difference to {against} (%)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
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


def history(file: pathlib.Path) -> dict[str, Any]:
    """The content of a file of benchmarks/gate_history.py.

    Raises:
      UserError: another file, a damaged one, or one of a model without memory reads.
    """
    try:
        content = json_file.read(file, _HISTORY)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except json_file.MalformedError as error:
        raise UserError(f"{file} is not a history of benchmarks/gate_history.py ({error})") from None
    shape = np.shape(content["weights"]) if _rectangular(content["weights"]) else ()
    expected = len(content["steps"]), len(content["tasks"]), len(content["slots"])
    if len(shape) != 4 or (shape[0], *shape[2:]) != expected:
        raise UserError(f"{file}: the weights are not those of its steps, tasks and slots; write it again")
    if MEMORY not in content["slots"]:
        raise UserError(f"{file}: the model of {content['rung']} does not read its memory: nothing to draw")
    return content


def _rectangular(nested: Any) -> bool:
    """True if lists of one level have the same length."""
    while nested and isinstance(nested[0], list):
        if len({len(inner) for inner in nested}) > 1:
            return False
        nested = [value for inner in nested for value in inner]
    return True


@mpl.rc_context(_STYLE)
def draw(name: str, paths: Sequence[pathlib.Path], output: pathlib.Path) -> None:
    """Writes a figure.

    Raises:
      UserError: other files than the figure is of, or an output that cannot be written.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"--output={output}: give a file with the ending {', '.join(FORMATS)}")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder: give a file in it")
    if name == "gates":
        histories = [history(path) for path in paths]
        if len({np.shape(found["weights"])[1] for found in histories}) > 1:
            raise UserError("the histories are of models with different numbers of taps: draw each by itself")
        figure = gates(histories)
    elif len(paths) > 1:
        raise UserError(f"{name}: give one table, which has all rungs; got {len(paths)}")
    else:
        content = seeds.read_table(paths[0], {"against": str}, "give an ablation.json, or the JSON of device_ladder.py")
        figure = {"differences": differences, "losses": losses}[name](content)
    files.folder_for_results(output.parent)
    content = io.BytesIO()
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(content, format=output.suffix[1:], metadata=dates.get(output.suffix), dpi=150)
    with files.replacing(output) as file:
        file.write(content.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    parser = command_line.Parser("benchmarks/ablation_figures.py", __doc__)
    parser.add_argument("figure", choices=("differences", "losses", "gates"))
    parser.add_argument("files", type=pathlib.Path, nargs="+", metavar="FILE.json", help="a table; or histories")
    parser.add_argument("--output", type=pathlib.Path, required=True, help=f"with the ending {', '.join(FORMATS)}")
    args = parser.parse_args(arguments)
    return command_line.ended(lambda: draw(args.figure, args.files, args.output))


if __name__ == "__main__":
    sys.exit(main())
