"""Statistics of a built data set: image sizes, class frequencies, range of depth.

They are computed from the records as training reads them, which also verifies that the records can be read. `Task.kind`
defines the statistics of a task.
"""

from collections.abc import Mapping, Sequence
import contextlib
import functools
from typing import Any

from input_pipeline import transforms
from input_pipeline.records import Source
from taskexpert_jax import progress, text_table
from taskexpert_jax import tasks as task_records
from taskexpert_jax.parallel import threads
from taskexpert_jax.tasks import Task, kinds
from taskexpert_jax.tasks.kinds import Counts

MOST_EXAMPLES = 2000  # read per split, evenly spaced if it is larger; takes a minute on two cores


def _count_example(source: Source, tasks: Sequence[Task], index: int) -> tuple[tuple[int, int], list[Counts]]:
    """Height and width of an example, and the counts of each task's label with invalid pixels marked."""
    example = transforms.mark_invalid(transforms.fill_missing(source.load(index), tasks), tasks)
    height, width = example["image"].shape[:2]
    return (height, width), [task.kind.count(example[task.name]) for task in tasks]


def tasks_of(source: Source, class_names: Sequence[str]) -> tuple[Task, ...]:
    """Tasks that a data set has labels for.

    class_names: of semantic segmentation; empty to number the classes.
    """
    names = [name for name in source.labels if name in task_records.NAMES]
    weights = dict.fromkeys(names, 1.0)
    return task_records.build(names, loss_weights=weights, semseg_classes=tuple(class_names) or kinds.UNNAMED)


def of_split(source: Source, tasks: Sequence[Task], title: str) -> dict[str, Any]:
    """Statistics of one split as plain numbers; title: names the work in its progress.

    Returns:
      examples; counted, the number of examples read, evenly spaced; the range of height and of width; labels, for each
      task name the result of `Kind.figures`: the share of pixels without a valid label and, for example, the share of
      each class among the valid pixels. None if no pixel is valid.
    """
    counted = min(len(source), MOST_EXAMPLES)
    indices = (position * len(source) // counted for position in range(counted))
    sizes, totals = set(), [Counts() for _ in tasks]
    count = functools.partial(_count_example, source, tasks)
    with (
        contextlib.closing(threads.in_order(count, indices)) as results,
        progress.Progress(title, counted, "examples") as shown,
    ):
        for size, counts in results:
            sizes.add(size)
            shown.add()
            totals = [total + of_example for total, of_example in zip(totals, counts, strict=True)]
    heights, widths = zip(*sizes, strict=True)
    return {
        "examples": len(source),
        "counted": counted,
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "labels": {task.name: task.kind.figures(total) for task, total in zip(tasks, totals, strict=True)},
    }


def _text(value: Any, *, is_share: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{value[0]}" if value[0] == value[1] else f"{value[0]}-{value[1]}"
    if isinstance(value, int):
        return f"{value}"
    return f"{100 * value:.2f} %" if is_share else f"{value:.2f}"


def table(splits: Mapping[str, Mapping[str, Any]], tasks: Sequence[Task]) -> list[str]:
    """Lines of a table of all splits, one column each; counts that are 0 for all splits are omitted."""
    rows = [["", *splits]]
    for name in next(iter(splits.values())):
        values = [of[name] for of in splits.values()]
        skipped = name == "labels" or (name == "counted" and values == [of["examples"] for of in splits.values()])
        if not skipped and any(values):
            title = "counted, evenly spaced" if name == "counted" else name
            rows.append([title, *map(_text, values)])
    for task in tasks:
        figures = [of["labels"][task.name] for of in splits.values()]
        names = max(figures, key=len)  # without class names, splits may differ in the classes that occur
        rows.append([task.title, *([""] * len(figures))])
        for name in names:
            is_share = name not in task.kind.quantities
            rows.append([f"  {name}", *(_text(of.get(name), is_share=is_share) for of in figures)])
    return text_table.lines(rows, "<" + ">" * len(splits))
