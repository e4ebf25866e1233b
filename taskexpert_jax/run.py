"""A trained model in Python: predictions, gates and metrics of a run."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools
import os
import pathlib
from typing import Any, NamedTuple, overload

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
from PIL import Image

from taskexpert_jax import images
from taskexpert_jax.config import FIELDS, check, frame_size, read_run
from taskexpert_jax.errors import UserError, shown
from taskexpert_jax.evaluation import full_pass, given, inference, steps
from taskexpert_jax.evaluation.gate_statistics import GateStatistics, GateSummary, at_pixels
from taskexpert_jax.models.decoders.decoder import Gating
from taskexpert_jax.models.model import MultiTaskModel
from taskexpert_jax.parallel import sharding
from taskexpert_jax.runs import hub
from taskexpert_jax.runs.load import Selected, load
from taskexpert_jax.tasks import Task, canvas, panels

# An image file; an image of Pillow; RGB (H, W, 3), RGBA (H, W, 4) or grey (H, W) uint8.
AnyImage = str | os.PathLike[str] | Image.Image | np.ndarray


class Prediction(dict[str, np.ndarray]):
    """Arrays by task. A task whose prediction has a NaN or Inf is left out, named in `diverged`, and raises UserError.

    Attributes:
      diverged: names of the tasks that were left out.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], diverged: Sequence[str] = ()):
        super().__init__(arrays)
        self.diverged = tuple(diverged)

    def __missing__(self, task: str) -> np.ndarray:
        if task in self.diverged:
            raise UserError(f"NaN or Inf in the prediction of {task}: the model has diverged; try another checkpoint")
        raise KeyError(task)


class Gates(NamedTuple):
    """Gate weights of one image, from one forward pass.

    Attributes:
      weights: (S, T, h, w, slots) float32 by tap and task, over the token grid of the whole frame, padding included.
      tasks: names of the T tasks.
      slots: names of the expert slots: the experts, and the memory, if it is read, as the last.
      picture: the model's input without padding, (rows, columns, 3) uint8.
      prediction: predictions at the size of `picture`.
      window: (4,) int32: top, left, rows and columns of the image in the frame, in pixels.
      patch: side of a token in pixels.
      statistics: sums of the weights over the image's pixels.
    """

    weights: np.ndarray
    tasks: tuple[str, ...]
    slots: tuple[str, ...]
    picture: np.ndarray
    prediction: Prediction
    window: np.ndarray
    patch: int
    statistics: GateStatistics

    @property
    def summary(self) -> GateSummary:
        """Mean weights and entropy over the image, by task and tap."""
        return self.statistics.summary(self.slots)

    def at_pixels(self) -> np.ndarray:
        """The weights at each pixel of `picture`, (S, T, rows, columns, slots) float32: those of its token."""
        of_tokens = np.moveaxis(self.weights, (2, 3), (0, 1))  # (h, w, S, T, slots)
        return np.moveaxis(at_pixels(of_tokens, self.window, self.patch), (0, 1), (2, 3))


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained model with its config, loaded by `load_run`. Methods may be called from several threads.

    Attributes:
      path: the run's directory, or the released folder.
      config: the run's config.
      model: the Flax module.
      variables: its parameters and batch statistics, on the devices of `mesh`.
      checkpoint: step of the checkpoint, and which it is.
      mesh: devices of the predictions: one.
    """

    path: pathlib.Path
    config: ConfigDict
    model: MultiTaskModel
    variables: Any
    checkpoint: Selected
    mesh: Mesh
    _steps: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"<Run {self.path} at {self.checkpoint}: {', '.join(self.tasks)}>"

    @property
    def tasks(self) -> dict[str, Task]:
        """Task records by name, in the config's order."""
        return {task.name: task for task in self.model.tasks}

    @property
    def gating(self) -> Gating:
        """Expert slots and taps of the gates.

        Raises:
          UserError: the model's decoder has no gates.
        """
        if self.model.decoder.gating is None:
            raise UserError(f"{self.path} has no gates: config.model.decoder={self.config.model.decoder}")
        return self.model.decoder.gating

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Class names of the tasks whose predictions are class ids."""
        return {task.name: task.class_names for task in self.model.tasks if task.class_names}

    @overload
    def predict(
        self,
        image: AnyImage,
        *,
        flip: bool | None = None,
        scales: Sequence[float] | None = None,
        image_size: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        image: Sequence[AnyImage],
        *,
        flip: bool | None = None,
        scales: Sequence[float] | None = None,
        image_size: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> list[Prediction]: ...

    def predict(
        self,
        image: AnyImage | Sequence[AnyImage],
        *,
        flip: bool | None = None,
        scales: Sequence[float] | None = None,
        image_size: tuple[int, int] | None = None,
        batch_size: int = 1,
    ) -> Prediction | list[Prediction]:
        """Predicts every task for an image, or for a list of images.

        The arrays have the image's own size: class ids (H, W) uint8; depth (H, W) float32 in metres, disparity in
        pixels; normals (H, W, 3) float32 unit vectors, x right, y down, z forward; boundaries and saliency (H, W)
        float32 probabilities.

        The first call compiles a program, and so does each new frame size, batch size and set of views; all other calls
        take the model's own time. An image larger than `config.dataset.image_size` is downscaled to fit it.

        Args:
          image: path of an image file, an image of Pillow, or an array (H, W, 3) uint8 RGB; or a list of these.
          flip: average with the mirror image; default: `config.eval.flip`.
          scales: average over these scale factors; default: `config.eval.scales`.
          image_size: height and width, at least `config.dataset.image_size`, up to which images keep their size; they
            are predicted by sliding windows: finer, and slower. Default: `config.eval.image_size`.
          batch_size: images of a list that are predicted at once. With 1, equal to single images bit for bit; otherwise
            the last digits differ.

        Returns:
          For an image, a dict of arrays by task, see `Prediction`; for a list, a list of such.

        Raises:
          UserError: an unreadable image, or a wrong setting.
        """
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise UserError(f"batch_size={shown(batch_size)}: must be a whole number, at least 1")
        config = self._configured(flip, scales, image_size)
        if isinstance(image, Sequence) and not isinstance(image, str | bytes | bytearray):
            return self._predict(image, config, batch_size)
        return self._predict([image], config, batch_size)[0]

    def draw(self, prediction: Mapping[str, np.ndarray], image: AnyImage | None = None) -> dict[str, Image.Image]:
        """Colour images of a prediction by task, each with its legend or colour bar.

        Args:
          prediction: arrays of `predict`, or some of them.
          image: the input image; adds "montage", the image and all tasks on one sheet.

        Raises:
          UserError: a task that is not the model's, or an array that is no prediction of its task.
        """
        tasks = self.tasks
        if not isinstance(prediction, Mapping):
            raise UserError(f"a prediction is a dict of arrays by task, not {type(prediction).__name__}")
        if unknown := [name for name in prediction if name not in tasks]:
            raise UserError(f"{shown(unknown[0])} is not a task of {self.path}: {', '.join(tasks)}")
        drawn = {
            name: panels.picture(tasks[name], given.prediction(tasks[name], array))
            for name, array in prediction.items()
        }
        if image is None:
            return drawn
        titled = [(tasks[name].title, picture) for name, picture in drawn.items()]
        return {**drawn, "montage": canvas.montage(images.as_rgb(image), titled)}

    def gates(self, image: AnyImage) -> Gates:
        """Gate weights of every tap and task at each token of an image, and the predictions of the same forward pass.

        An image larger than `config.dataset.image_size` is downscaled to fit it. Views are not averaged.

        Raises:
          UserError: an unreadable image, or a model whose decoder has no gates.
        """
        gating = self.gating
        size = self.config.dataset.image_size
        frame, window = images.fit(images.as_rgb(image), size, size)
        with sharding.use(self.mesh):
            found, weights, statistics = self._step("gates", self._make_gates_step)(
                self.variables, self._on_device({"image": frame[None], "window": window[None]})
            )
            found, weights, statistics = jax.device_get((found, weights, statistics))
        stride = gating.stride
        top, left, rows, columns = window.tolist()
        grid = (frame.shape[0] // stride, frame.shape[1] // stride)
        of_tokens = weights[:, :, 0]  # (S, T, N, slots)
        return Gates(
            weights=of_tokens.reshape(*of_tokens.shape[:2], *grid, -1),
            tasks=tuple(self.tasks),
            slots=gating.slots,
            picture=frame[top : top + rows, left : left + columns],
            prediction=_inside(self.tasks, found, 0, window),
            window=window,
            patch=stride,
            statistics=statistics,
        )

    def evaluate(self, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """Metrics over batches with labels, `task/metric` -> value; those of `--mode=evaluate`.

        Every batch has "image" (B, H, W, 3) uint8, of the size `config.dataset.image_size` or, with sliding windows,
        `config.eval.image_size`, and labels of that size for some tasks, (B, H, W, c) as in docs/conventions.md.
        Optional: "window" (B, 4) int32, top, left, height and width of the images in padded frames; "mask" (B,), 0 for
        padding examples; "id". Tasks without a label in the first batch are not evaluated.

        Raises:
          UserError: no batch, or none of the model's tasks in it.
        """
        if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
            raise UserError(f"give a list of batches, each a dict of arrays, not {type(batches).__name__}")
        source = iter(batches)
        first = next(source, None)
        if first is None:
            raise UserError("no batch to evaluate")
        given.refuse_other_than_dicts(first)
        tasks = tuple(task for task in self.model.tasks if task.name in first)
        if not tasks:
            raise UserError(
                f"no labels in the batch: none of {', '.join(self.tasks)} is among {', '.join(map(str, first))}"
            )
        whole = (given.batch(batch, tasks) for batch in itertools.chain([first], source))
        with sharding.use(self.mesh):
            found = full_pass.run(self.config, tasks, self.model, self.variables, whole, self.mesh)
        return found.evaluation(tasks, {}, self.model.expert_slots).metrics

    def _configured(
        self, flip: bool | None, scales: Sequence[float] | None, image_size: tuple[int, int] | None
    ) -> ConfigDict:
        """The config with the views of a call."""
        views = {"flip": flip, "scales": scales, "image_size": image_size}
        views = {name: value for name, value in views.items() if value is not None}
        if not views:
            return self.config
        config = self.config.copy_and_resolve_references()
        for name, value in views.items():
            rule = FIELDS[f"eval.{name}"].rule
            if not rule.allows(value):
                raise UserError(f"{name}={shown(value)}: {rule.words}")
            config.eval[name] = tuple(value) if isinstance(value, Sequence) else value
        check(config)
        return config

    def _predict(self, sources: Iterable[AnyImage], config: ConfigDict, batch_size: int) -> list[Prediction]:
        """Predictions of images, in their order; frames of one size make up a batch."""
        size, largest = tuple(config.dataset.image_size), frame_size(config)
        found: dict[int, Prediction] = {}
        waiting: dict[tuple[int, ...], list[_Frame]] = {}  # by frame shape
        with sharding.use(self.mesh):
            for index, source in enumerate(sources):
                image = images.as_rgb(source)
                frame, window = images.fit(image, size, largest)
                frames = waiting.setdefault(frame.shape, [])
                frames.append(_Frame(index, image.shape[:2], frame, window))
                if len(frames) == batch_size:
                    found |= self._predict_batch(waiting.pop(frame.shape), config, batch_size)
            for frames in waiting.values():
                found |= self._predict_batch(frames, config, batch_size)
        return [found[index] for index in range(len(found))]

    def _predict_batch(self, frames: list["_Frame"], config: ConfigDict, batch_size: int) -> dict[int, Prediction]:
        """Predictions by `_Frame.index`; a batch with fewer frames is padded, so that one program serves all."""

        def make_step() -> Any:
            infer = inference.make_inference(self.model, config)
            return steps.make_predict_step(self.model.tasks, infer, self.mesh)

        padded = frames + frames[-1:] * (batch_size - len(frames))
        batch = {
            "image": np.stack([each.frame for each in padded]),
            "window": np.stack([each.window for each in padded]),
        }
        step = self._step(inference.views(config), make_step)
        predicted = jax.device_get(step(self.variables, self._on_device(batch)))
        found = {}
        for row, each in enumerate(frames):
            inside = _inside(self.tasks, predicted, row, each.window)
            sized = {name: self.tasks[name].kind.resize(values, *each.image_size) for name, values in inside.items()}
            found[each.index] = Prediction(sized, inside.diverged)
        return found

    def _step(self, key: Any, make: Any) -> Any:
        """A jitted step of this run, which compiles once for every shape of its input."""
        if key not in self._steps:
            self._steps[key] = make()
        return self._steps[key]

    def _make_gates_step(self) -> Any:
        """Jitted (variables, {image, window}) -> predictions, gates (S, T, B, N, slots), statistics of the gates."""

        def step(variables: Any, batch: Mapping[str, Any]) -> tuple[steps.Predicted, jax.Array, GateStatistics]:
            mask = jax.numpy.ones(len(batch["image"]), jax.numpy.float32)
            image, window = batch["image"], batch["window"]
            predictions, gates, statistics = inference.with_gates(self.model, variables, image, window, mask)
            return steps.predicted(self.model.tasks, predictions, window), gates, statistics

        return jax.jit(step)

    def _on_device(self, batch: Mapping[str, np.ndarray]) -> Any:
        return jax.device_put(batch, sharding.replicated(self.mesh))


class _Frame(NamedTuple):
    """An image in its frame; index: its place in the list; image_size: its own height and width."""

    index: int
    image_size: tuple[int, int]
    frame: np.ndarray
    window: np.ndarray


def _inside(tasks: Iterable[str], found: steps.Predicted, row: int, window: np.ndarray) -> Prediction:
    """Prediction of one image of a batch, without padding, in the order of the tasks."""
    top, left, rows, columns = window.tolist()
    diverged = [task for task in tasks if found.nonfinite[task][row]]
    arrays = {task: np.asarray(found.values[task])[row, top : top + rows, left : left + columns] for task in tasks}
    return Prediction({task: array for task, array in arrays.items() if task not in diverged}, diverged)


def load_run(path: str | os.PathLike[str], *, checkpoint: str | int = "best") -> Run:
    """Loads a trained model, without its optimiser state, onto this process's first device.

    Args:
      path: a run's directory (its `--workdir`), a released folder, the address of one on the Hugging Face hub
        (hf://OWNER/NAME), or "demo" for the bundled model.
      checkpoint: "best", "latest" or a step.

    Raises:
      UserError: no run there, or a checkpoint that is missing, damaged or does not fit; no access to the hub.
    """
    folder = hub.located(os.fspath(path), "path")
    return opened(read_run(folder), folder, str(checkpoint))


def opened(config: ConfigDict, folder: pathlib.Path, which: str) -> Run:
    """The run in a directory with a config that may differ from its own in fields that do not change the model.

    Errors as `load_run`.
    """
    mesh = sharding.one_device_mesh()
    with sharding.use(mesh):
        model, variables, checkpoint = load(config, folder, which, mesh)
    return Run(folder, config, model, variables, checkpoint, mesh)
