"""Inspects a run's gates: python -m taskexpert_jax.gates --workdir=RUN --images=FILE_OR_FOLDER.

Writes the gate weights of every tap and task at each token of each image to RUN/inspection/, with figures and an HTML
page. docs/evaluation.md describes the files.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

from absl import flags, logging
import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags
import numpy as np
from PIL import Image

from taskexpert_jax import command_line, files, images, paths, terminal
from taskexpert_jax.config import check, read_run
from taskexpert_jax.errors import UserError
from taskexpert_jax.evaluation import gate_findings, inference, results, steps
from taskexpert_jax.evaluation.gate_findings import Inspection
from taskexpert_jax.evaluation.gate_statistics import GateStatistics, GateSummary
from taskexpert_jax.models.model import TaskExpert
from taskexpert_jax.parallel import sharding
from taskexpert_jax.report import gate_maps, gates_page
from taskexpert_jax.report.markup import Element
from taskexpert_jax.runs import config as run_config
from taskexpert_jax.runs import released
from taskexpert_jax.runs.load import load
from taskexpert_jax.tasks import Task, panels

IMAGES = "images"  # has one folder per image


class Inside(NamedTuple):
    """Predictions and gate weights for one image.

    Attributes:
      name: name of its folder.
      picture: the model's input without padding, (rows, columns, 3) uint8.
      values: by task, (rows, columns) or (rows, columns, 3), see `Task.values`.
      gates: (S, T, h, w, slots) float32, over the token grid of the whole frame, padding included.
      window: (4,) int32: top, left, rows and columns of the image in the frame.
      patch: side of a token in pixels.
      summary: mean gate weights over the image.
    """

    name: str
    picture: np.ndarray
    values: Mapping[str, np.ndarray]
    gates: np.ndarray
    window: np.ndarray
    patch: int
    summary: GateSummary


def make_step(model: TaskExpert) -> Callable[[Any, Mapping[str, Any]], tuple[steps.Predicted, jax.Array, Any]]:
    """Jitted (variables, {image, window}) -> predictions, gates (S, T, B, N, slots), statistics of the gates."""

    def step(variables: Any, batch: Mapping[str, Any]) -> tuple[steps.Predicted, jax.Array, GateStatistics]:
        mask = jax.numpy.ones(len(batch["image"]), jax.numpy.float32)
        image, window = batch["image"], batch["window"]
        predictions, gates, statistics = inference.with_gates(model, variables, image, window, mask)
        return steps.predicted(model.tasks, predictions, window), gates, statistics

    return jax.jit(step)


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
    mesh = sharding.one_device_mesh()
    failures: list[UserError] = []
    total, summaries, sections = None, {}, []
    with sharding.use(mesh):
        model, variables, checkpoint = load(config, workdir, which, mesh)
        files.folder_for_results(output)
        logging.info(f"inspecting {workdir} at {checkpoint} on {len(paths)} image(s)")
        started = time.monotonic()
        step = make_step(model)
        for name, image in images.read_each(paths, failures):
            frame, window = images.fit(image, config.dataset.image_size, config.dataset.image_size)
            batch = jax.device_put({"image": frame[None], "window": window[None]}, sharding.replicated(mesh))
            found, gates, statistics = step(variables, batch)
            steps.warn_of_nonfinite(name, jax.device_get(found))
            total = statistics if total is None else total.merge(statistics)
            inside = _on_host(model, name, frame, window, found.values, gates, statistics)
            summaries[name] = inside.summary
            section = write_image(output / IMAGES / name, inside, model.tasks, number=len(summaries))
            if len(sections) < gates_page.MOST_IMAGES:
                sections.append(section)
    if total is None:
        raise UserError(f"{len(failures)} of {len(paths)} images not inspected; the lines above name them")
    seconds = time.monotonic() - started
    facts = results.facts(config, workdir=workdir, checkpoint=checkpoint, examples=len(summaries), seconds=seconds)
    del facts["eval"]  # not used here
    facts["images_from"] = str(source)
    summary = jax.device_get(total).summary(model.expert_slots)
    found = Inspection(model.tasks, facts, summary, summaries)
    _report(found, sections, output)
    if failures:
        raise UserError(f"{len(failures)} of {len(paths)} images not inspected; the lines above name them")
    return found


def _on_host(
    model: TaskExpert,
    name: str,
    frame: np.ndarray,
    window: np.ndarray,
    values: Mapping[str, jax.Array],
    gates: jax.Array,
    statistics: GateStatistics,
) -> Inside:
    """Copies the step's results for its one image to the host, without padding except for the gates."""
    patch = model.backbone.patch_size
    top, left, rows, columns = window.tolist()
    part = (slice(top, top + rows), slice(left, left + columns))
    of_tokens = np.asarray(gates)[:, :, 0]  # (S, T, N, slots)
    grid = (frame.shape[0] // patch, frame.shape[1] // patch)
    return Inside(
        name=name,
        picture=frame[part],
        values={task: np.asarray(value)[0][part] for task, value in values.items()},
        gates=of_tokens.reshape(*of_tokens.shape[:2], *grid, -1),
        window=window,
        patch=patch,
        summary=jax.device_get(statistics).summary(model.expert_slots),
    )


def write_image(folder: pathlib.Path, inside: Inside, tasks: tuple[Task, ...], *, number: int) -> Element:
    """Writes the figures and arrays of one image; returns its section of the page, the image's index being `number`."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    slots = inside.summary.slots
    grid = np.moveaxis(inside.gates, (2, 3), (0, 1))  # (h, w, S, T, slots)
    pixels = gate_maps.over_image(grid, inside.window, inside.patch)
    weights = np.moveaxis(pixels, (0, 1), (2, 3))  # (S, T, rows, columns, slots)
    predictions = {task.name: panels.colour(task, inside.values[task.name]) for task in tasks}
    with files.replacing(folder / "picture.png") as file:
        Image.fromarray(inside.picture).save(file, "PNG")
    with files.replacing(folder / "gates.npz") as file:
        np.savez_compressed(
            file,
            gates=inside.gates,
            tasks=np.array([task.name for task in tasks]),
            choices=np.array(slots),
            window=inside.window,
            patch_size=inside.patch,
        )
    image = gate_maps.Cell(inside.picture, inside.name)
    for t, task in enumerate(tasks):
        previews = (image, gate_maps.Cell(predictions[task.name], "prediction"))
        means = inside.summary.weights[t]
        sheet = gate_maps.weights_sheet(previews, weights[:, t], means, slots, title=f"{task.title}: weights")
        _save(sheet, folder / f"{task.name}.png")
    first = [gate_maps.Cell(predictions[task.name], "prediction") for task in tasks]
    winners = weights.argmax(axis=-1).swapaxes(0, 1)  # (T, S, rows, columns)
    title = f"{inside.name}: expert slot with the largest weight"
    sheet = gate_maps.winners_sheet(first, winners, [task.title for task in tasks], slots, title=title)
    _save(sheet, folder / "winners.png")
    terminal.print_written(folder)
    return gates_page.image_section(number, inside.name, inside.picture, predictions, weights, inside.summary, tasks)


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
    workdir = paths.define("workdir", "The run's directory, or a released folder.")
    source = paths.define("images", "An image or a folder of images.")
    checkpoint = flags.DEFINE_string("checkpoint", "best", "best, latest or a step.")
    output = paths.define("output", "Where to write; default: WORKDIR/inspection.")

    def program() -> None:
        folder = paths.needed(workdir)
        changed = config_flags.get_override_values(flags.FLAGS["config"])
        own = run_config.of_run(folder, config.value, changed)
        to = released.results_folder(folder, "inspection", output.value)
        inspect(own, folder, str(checkpoint.value), paths.needed(source), to)

    def own_config() -> ConfigDict:
        return read_run(paths.needed(workdir))

    line = "interrupted; what was written is kept: the same command inspects all images anew"
    parse = functools.partial(command_line.parse_flags, own_config=own_config)
    command_line.run(program, parse=parse, interrupted=line)


if __name__ == "__main__":
    main()
