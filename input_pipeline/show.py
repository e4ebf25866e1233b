"""Contact sheet of training examples after augmentation, with every label alone and overlaid on the image.

  taskexpert show demo --output=OUT [--count=4] [--split=train] [--stored] [--check]

Check that labels are aligned with the image, that the keys show the right class names and metres, and which pixels are
ignored (black, dark blue in masks, hatched over the image). Other splits are shown as evaluation sees them.
"""

from collections.abc import Iterator, Sequence
import functools
import itertools

from absl import flags
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from input_pipeline import pipeline, records, stream, transforms
from input_pipeline.records import Example, Source, repeated_ids
from taskexpert_jax import command_line, files, paths, terminal
from taskexpert_jax.config import check as check_config
from taskexpert_jax.errors import UserError
from taskexpert_jax.parallel import threads
from taskexpert_jax.tasks import Task, canvas, from_config, panels
from taskexpert_jax.tasks.kinds import Counts

HATCH = (255, 0, 200)  # RGB over ignored pixels, a rare colour in images
PERIOD = 8  # of the hatching, pixels; a stripe is two pixels wide
MOST_FAULTS = 20  # largest number of faults printed


def _ignored(label: np.ndarray, task: Task) -> np.ndarray:
    """Ignored pixels of a label (H,W,c), (H,W) bool."""
    return (label == task.ignore).any(axis=-1)


def overlay(image: np.ndarray, label: np.ndarray, task: Task) -> np.ndarray:
    """Label colours blended half and half with the image, ignored pixels hatched: (H,W,3) uint8."""
    blended = (image.astype(np.uint16) + panels.colour(task, task.label_values(label))) // 2
    rows, columns = np.indices(image.shape[:2])
    ignored = _ignored(label, task)
    blended[ignored] = image[ignored]
    blended[ignored & ((rows + columns) % PERIOD < 2)] = HATCH
    return blended.astype(np.uint8)


def rows_of(title: str, example: Example, tasks: Sequence[Task]) -> list[list[canvas.Cell | None]]:
    """Two rows of a sheet: the image and each label drawn, and below each label its overlay on the image."""
    image = example["image"]
    labels: list[canvas.Cell | None] = [(title, canvas.at_display_size(image))]
    over: list[canvas.Cell | None] = [None]
    for task in tasks:
        label = example[task.name]
        if _ignored(label, task).all():
            labels.append((f"{task.title}: nothing is labelled", panels.picture(task, task.label_values(label))))
            over.append(None)
        else:
            labels.append((task.title, panels.picture(task, task.label_values(label))))
            over.append((f"{task.title} over the image", canvas.at_display_size(overlay(image, label, task))))
    return [labels, over]


def examples(config: ConfigDict, tasks: Sequence[Task], split: str, *, stored: bool) -> Iterator[tuple[str, Example]]:
    """Titles and transformed examples of a split: endless for the training split, each once for any other.

    config: the whole config. stored: yields each training example before augmentation too.
    """
    if split != config.dataset.train_split:
        for batch in pipeline.eval_batches(config, tasks, batch_size=1, split=split):
            yield str(batch["id"][0]), {name: array[0] for name, array in batch.items()}
        return
    source = pipeline.open_source(config.dataset, tasks, split)
    positions = itertools.count()
    for batch in pipeline.train_batches(config, tasks):
        for row in range(len(batch["image"])):
            example = source.load(stream.shuffled_index(next(positions), config.seed, len(source)))
            if stored:
                yield f"{example['id']} as stored", transforms.mark_invalid(example, tasks)
            yield f"{example['id']} in training", {name: array[row] for name, array in batch.items()}


def draw(config: ConfigDict, split: str, count: int, *, stored: bool) -> Image.Image:
    """Draws the sheet of `count` examples of a split; arguments as `examples`.

    Raises:
      UserError: an invalid config or data set.
    """
    tasks = from_config(config)
    rows = []
    shown = itertools.islice(examples(config, tasks, split, stored=stored), count * (1 + stored))
    for title, example in shown:
        rows += rows_of(title, example, tasks)
    return canvas.sheet(rows)


def check(config: ConfigDict) -> list[str]:
    """Reads every example of the training and the evaluation split; returns the faults, one line each.

    Prints the `NOTES` of the data set's module, and for each split and task the number of labelled images, the mean
    share of their pixels that is labelled, and the range of depths and vectors; and a warning of ids that occur more
    than once.
    """
    tasks = from_config(config)
    dataset = config.dataset.copy_and_resolve_references()
    dataset.cache = False
    faults, ids = [], {}
    for note in getattr(records.dataset_module(dataset.name), "NOTES", ()):
        print(note)
    for split in (dataset.train_split, dataset.eval_split):
        try:
            source = pipeline.open_source(dataset, tasks, split)
        except UserError as error:
            faults.append(str(error))
            continue
        of_split, ids[split] = _check_split(source, tasks, split)
        faults += of_split
    for line in repeated_ids(ids):
        print(f"warning: {line}")
    return faults


def _check_split(source: Source, tasks: Sequence[Task], split: str) -> tuple[list[str], list[str]]:
    """Reads every example of a split and prints a line per task; returns the faults, and the ids that can be read."""
    faults, ids = [], []
    totals, labelled, shares = [Counts() for _ in tasks], np.zeros(len(tasks), int), np.zeros(len(tasks))
    for found in threads.in_order(functools.partial(_counts, source, tasks), range(len(source))):
        if isinstance(found, str):
            faults.append(found)
            continue
        example_id, of_example = found
        ids.append(example_id)
        totals = [total + counts for total, counts in zip(totals, of_example, strict=True)]
        share = np.array([counts.valid / counts.pixels for counts in of_example])
        labelled, shares = labelled + (share > 0), shares + share
    print(f"{split}: {len(source)} images, {len(faults)} of them not readable or with a wrong label")
    for task, total, count, share in zip(tasks, totals, labelled.tolist(), shares.tolist(), strict=True):
        figures = task.kind.figures(total)
        values = "".join(f", {name} {figures[name]:.2f}" for name in task.kind.quantities if count)
        covered = 100 * share / max(count, 1)
        print(f"  {task.title:<24}{count:>7} images labelled, {covered:5.1f} % of their pixels{values}")
        if not count and len(faults) < len(source):
            faults.append(
                f"{split}: no valid label of {task.name} in any image; correct its files, or remove {task.name!r} from "
                "config.tasks"
            )
    return faults, ids


def _counts(source: Source, tasks: Sequence[Task], index: int) -> tuple[str, list[Counts]] | str:
    """Id and counts of the labels of an example, or the message of the fault."""
    try:
        example = transforms.mark_invalid(source.load(index), tasks)
    except UserError as error:
        return str(error)
    return example["id"], [task.kind.count(example[task.name]) for task in tasks]


def _flags_of(argv: Sequence[str]) -> list[str]:
    """Parses the command line, whose first argument is the config."""
    given = list(argv)
    if len(given) > 1 and not given[1].startswith("-"):
        given[1] = f"--config={given[1]}"
    return command_line.parse_flags(given)


def main() -> None:
    """Defines the flags and runs the program."""
    config = command_line.define_config("Config file and variant; also the first argument.")
    output = paths.define("output", "Folder to write SPLIT.png to.")
    count = flags.DEFINE_integer("count", 4, "Number of examples.", lower_bound=1)
    split = flags.DEFINE_string("split", None, "Split of the data set; default: the training split.")
    stored = flags.DEFINE_bool("stored", False, "Show training examples without augmentation too.")
    checking = flags.DEFINE_bool("check", False, "First read every example and list the faults.")

    def program() -> None:
        check_config(config.value)
        if checking.value and (faults := check(config.value)):
            for fault in faults[:MOST_FAULTS]:
                command_line.print_error(fault)
            raise UserError(f"{len(faults)} faults; fix them and check again")
        name = split.value or config.value.dataset.train_split
        path = files.folder_for_results(paths.needed(output)) / f"{name}.png"
        sheet = draw(config.value, name, count.value, stored=stored.value)
        with files.replacing(path) as file:
            sheet.save(file, "PNG")
        terminal.print_written(path)

    arguments = "the config comes first, then flags that start with --"
    command_line.run(program, doc=__doc__, parse=_flags_of, arguments=arguments)


if __name__ == "__main__":
    main()
