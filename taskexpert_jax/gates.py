"""Inspects a run's gates: taskexpert gates RUN --images=FILE_OR_FOLDER.

Writes the gate weights of every tap and task at each token of each image to RUN/inspection/, with figures and an HTML
page. docs/evaluation.md describes the files.
"""

from collections.abc import Sequence
import functools
import json
import pathlib
import time

from absl import flags, logging
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags
import numpy as np
from PIL import Image

from taskexpert_jax import command_line, compilation_cache, files, images, paths, progress, terminal
from taskexpert_jax.config import check, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import gate_findings, results, steps
from taskexpert_jax.evaluation.gate_findings import Inspection
from taskexpert_jax.report import gate_maps, gates_page
from taskexpert_jax.report.markup import Element
from taskexpert_jax.run import Gates, opened
from taskexpert_jax.runs import config as run_config
from taskexpert_jax.runs import hub, released
from taskexpert_jax.tasks import Task, canvas, panels

IMAGES = "images"  # has one folder per image


def inspect(
    config: ConfigDict, workdir: pathlib.Path, which: str, source: pathlib.Path, output: pathlib.Path
) -> Inspection:
    """Inspects the gates on an image or a folder of images: prints a table and writes figures and a page.

    Images larger than `config.dataset.image_size` are reduced to fit, so that the gates are those of one forward pass.
    `config.eval.flip` and `config.eval.scales` have no effect, because gates of several views cannot be averaged.

    Args:
      config: the run's config.
      workdir: the run's directory, or a released folder.
      which: "best", "latest" or a step.
      source: an image file or a folder of images.
      output: output folder; existing files of the same name are replaced.

    Raises:
      UserError: no image at `source`, an unreadable image (the others are still inspected), or no fitting checkpoint.
    """
    check(config)
    paths = images.list_images(source)
    failures: list[UserError] = []
    total, summaries, sections = None, {}, []
    run = opened(config, workdir, which)
    slots = run.gating.slots
    files.folder_for_results(output)
    logging.info(f"inspecting {workdir} at {run.checkpoint} on {len(paths)} image(s)")
    started = time.monotonic()
    with progress.Progress("inspecting", len(paths)) as shown:
        for name, image in images.read_each(paths, failures):
            gates = run.gates(image)
            steps.warn_of_nonfinite(name, gates.prediction.diverged)
            total = gates.statistics if total is None else total.merge(gates.statistics)
            summaries[name] = gates.summary
            section = write_image(output / IMAGES / name, name, gates, run.model.tasks, number=len(summaries))
            if len(sections) < gates_page.MOST_IMAGES:
                sections.append(section)
            shown.add()
    if total is None:
        raise UserError(f"{len(failures)} of {len(paths)} images not inspected; the lines above name them")
    seconds = time.monotonic() - started
    facts = results.facts(config, workdir=workdir, checkpoint=run.checkpoint, examples=len(summaries), seconds=seconds)
    del facts["eval"]  # not used here
    facts["images_from"] = str(source)
    found = Inspection(run.model.tasks, facts, total.summary(slots), summaries)
    _report(found, sections, output)
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} images not inspected; the lines above name them")
    return found


def write_image(folder: pathlib.Path, name: str, found: Gates, tasks: tuple[Task, ...], *, number: int) -> Element:
    """Writes the figures and arrays of one image; returns its section of the page, the image's index being `number`."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = found.at_pixels()  # (S, T, rows, columns, slots)
    unknown = np.full_like(found.picture, canvas.INVALID)  # of a diverged model
    predictions = {
        task.name: panels.colour(task, found.prediction[task.name]) if task.name in found.prediction else unknown
        for task in tasks
    }
    with files.replacing(folder / "picture.png") as file:
        Image.fromarray(found.picture).save(file, "PNG")
    with files.replacing(folder / "gates.npz") as file:
        np.savez_compressed(
            file,
            gates=found.weights,
            tasks=np.array(found.tasks),
            choices=np.array(found.slots),
            window=found.window,
            patch_size=found.patch,
        )
    image = gate_maps.Cell(found.picture, name)
    for t, task in enumerate(tasks):
        previews = (image, gate_maps.Cell(predictions[task.name], "prediction"))
        means = found.summary.weights[t]
        sheet = gate_maps.weights_sheet(previews, weights[:, t], means, found.slots, title=f"{task.title}: weights")
        _save(sheet, folder / f"{task.name}.png")
    first = [gate_maps.Cell(predictions[task.name], "prediction") for task in tasks]
    winners = weights.argmax(axis=-1).swapaxes(0, 1)  # (T, S, rows, columns)
    title = f"{name}: expert slot with the largest weight"
    sheet = gate_maps.winners_sheet(first, winners, [task.title for task in tasks], found.slots, title=title)
    _save(sheet, folder / "winners.png")
    terminal.print_written(folder)
    return gates_page.image_section(number, name, found.picture, predictions, weights, found.summary, tasks)


def _save(figure: Figure, path: pathlib.Path) -> None:
    with files.replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])


def _report(found: Inspection, sections: Sequence[Element], output: pathlib.Path) -> None:
    """Writes mean_weights.png and .pdf, inspection.json and inspection.html, and prints a summary."""
    figure = gate_maps.heat_map(found)
    figures = [output / f"mean_weights.{kind}" for kind in ("png", "pdf")]
    for path in figures:
        _save(figure, path)
    texts = {
        output / "inspection.json": json.dumps(gate_findings.to_json(found), indent=2, allow_nan=False) + "\n",
        output / "inspection.html": gates_page.html(found, sections, IMAGES),
    }
    files.write(texts)
    print("\n" + "\n".join(gate_findings.lines(found)) + "\n")
    if note := gate_findings.by_design(found):
        print(note)
    for text in gate_findings.warnings(found):
        logging.warning(text)
    for path in (*figures, *texts):
        terminal.print_written(path)


def main() -> None:
    """Defines the flags and runs the program."""
    config = command_line.define_config("The run's config; default: WORKDIR/config.json.")
    workdir = paths.define("workdir", "The run's directory, or a released model.", hub=True)
    source = paths.define("images", "An image or a folder of images.")
    checkpoint = flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    output = paths.define("output", "Where to write; default: WORKDIR/inspection.")
    cache = flags.DEFINE_string(compilation_cache.FLAG, None, compilation_cache.HELP)

    def program() -> None:
        folder = hub.located(paths.needed(workdir, hub=True))
        compilation_cache.enable(cache.value)
        changed = config_flags.get_override_values(flags.FLAGS["config"])
        own = run_config.of_run(folder, config.value, changed)
        to = released.results_folder(folder, "inspection", output.value)
        inspect(own, folder, str(checkpoint.value), paths.needed(source), to)

    def own_config() -> ConfigDict:
        return read_run(hub.located(paths.needed(workdir, hub=True)))

    line = "interrupted; what was written is kept: the same command inspects all images anew"
    parse = functools.partial(command_line.parse_flags, own_config=own_config)
    command_line.run(program, doc=__doc__, parse=parse, interrupted=line)


if __name__ == "__main__":
    main()
