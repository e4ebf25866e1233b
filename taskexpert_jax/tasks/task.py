"""Task records: everything task-specific, one record per task.

The pipeline, losses, metrics, drawings and constant baselines read these records; no other file names a task. To add a
task, add a builder and a row of `_ROWS` (see docs/add_a_task.md). Code shared by all tasks with the same kind of value,
such as reading files and drawing, is in `kinds`.

Builders import what needs JAX, so that names, titles and published metrics of tasks are there without it.

Conventions: labels are (..., H, W, label_channels), predictions (..., H, W, channels); see docs/conventions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
import dataclasses
import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from taskexpert_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    from taskexpert_jax.tasks.kinds import Kind
    from taskexpert_jax.tasks.metrics import PooledMetric

HUMAN_PARTS = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")


class Published(NamedTuple):
    """Metric that papers report for a task: its name in the results, its title with the unit, its direction."""

    metric: str
    title: str
    higher_is_better: bool

    @property
    def arrow(self) -> str:
        """Arrow in the direction of better values."""
        return "↑" if self.higher_is_better else "↓"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Headline:
    """Name, title and published metric of a task, for tables of results; needs no JAX.

    Attributes:
      name: key in batches, outputs and configs.
      title: name in tables and images.
      main_metric: name of the published metric among the metric's results.
      main_metric_title: its title for readers, with the unit.
      higher_is_better: direction of `main_metric`.
      boundary_benchmark: the values are boundary probabilities, which a full evaluation scores by odsF.
    """

    name: str
    title: str
    main_metric: str
    main_metric_title: str
    higher_is_better: bool
    boundary_benchmark: bool = False

    def published(self, results: Container[str]) -> Published:
        """Published metric among results `task/metric`: odsF if the boundary benchmark was run, else `main_metric`."""
        if self.boundary_benchmark and f"{self.name}/odsF" in results:
            return Published("odsF", "odsF (%)", higher_is_better=True)
        return Published(self.main_metric, self.main_metric_title, self.higher_is_better)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Headline):
    """One dense prediction task.

    Attributes:
      kind: kind of its values: how they are predicted, stored, drawn and counted.
      loss: (prediction, label, mask) -> float32 scalar, a mean over the valid pixels of the batch.
      loss_weight: weight of the loss in the total.
      metric: its metric, exact under any split of the data into batches.
      best_constant: valid labels (n, label_channels) float64 -> the constant prediction (channels,) that scores best
        on them.
      ignore_if_empty: an image whose label is only background is ignored as a whole.
      flip_signs: 1 or -1 per label channel, its factor when the image is mirrored; empty: values do not change. If
        given, the prediction has the same channels as the label.
      decides_crop: random crops are redrawn until they show a variety of this label's classes.
      scale_exponent: a label value v becomes v * s**scale_exponent when the image is scaled by s.
      image_means: metrics of which a full evaluation also reports the mean over images.

    Those of `Headline` come before. Attributes of the kind are available here too: `channels`, `values`, ...; see
    `Kind`.
    """

    kind: Kind
    loss: Callable[..., jax.Array]
    loss_weight: float
    metric: type[PooledMetric]
    best_constant: Callable[[np.ndarray], np.ndarray]
    ignore_if_empty: bool = False
    decides_crop: bool = False
    flip_signs: tuple[float, ...] = ()
    scale_exponent: int = 0
    image_means: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of the prediction."""
        return self.kind.channels

    @property
    def label_channels(self) -> int:
        """Channels of the label."""
        return self.kind.label_channels

    @property
    def label_dtype(self) -> str:
        """The label's dtype in a batch."""
        return self.kind.label_dtype

    @property
    def ignore(self) -> float:
        """Label value of an ignored pixel."""
        return self.kind.ignore

    @property
    def missing(self) -> float:
        """Label value of a pixel without ground truth, before invalid pixels are marked."""
        return self.kind.missing

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, where the values are class ids."""
        return self.kind.class_names

    @property
    def values(self) -> Callable[[jax.Array], jax.Array]:
        """Predictions (..., H, W, channels) float32 -> values in the form shown to users; see `Kind.values`."""
        return self.kind.values

    @property
    def to_mean(self) -> Callable[[jax.Array], jax.Array]:
        """Predictions -> the form in which several predictions of a pixel are averaged; see `Kind.to_mean`."""
        return self.kind.to_mean

    @property
    def from_mean(self) -> Callable[[jax.Array], jax.Array]:
        """Mean in the form of `to_mean` -> the corresponding prediction."""
        return self.kind.from_mean

    def label_values(self, label: np.ndarray) -> np.ndarray:
        """The label in the form of `values`."""
        return self.kind.label_values(label)

    @property
    def benchmark_label(self) -> str:
        """Batch key of a separate label for the boundary benchmark, which some data sets have."""
        return f"{self.name}_benchmark"

    def flip(self, label: np.ndarray) -> np.ndarray:
        """Label values after mirroring the image; the caller mirrors the pixels. Call before marking invalid pixels."""
        if not self.flip_signs:
            return label
        flipped = label.copy()
        for channel in np.flatnonzero(np.asarray(self.flip_signs) < 0):
            # Negated in place: a float16 multiplication takes forty times as long.
            np.negative(flipped[..., channel], out=flipped[..., channel])
        return flipped

    def rescale(self, label: np.ndarray, scale: np.float32) -> np.ndarray:
        """Label values after scaling the image by `scale`; the caller resizes. Call before marking invalid pixels."""
        if not self.scale_exponent:
            return label
        return (label * scale**self.scale_exponent).astype(label.dtype, copy=False)

    def undo_flip(self, prediction: jax.Array) -> jax.Array:
        """Prediction for a mirrored image -> values for the original image; the caller mirrors the pixels back."""
        return prediction * np.asarray(self.flip_signs, prediction.dtype) if self.flip_signs else prediction

    def undo_rescale(self, prediction: jax.Array, scale: float) -> jax.Array:
        """Prediction for an image scaled by `scale` -> values for the original image; the caller resizes it back."""
        return prediction * scale**-self.scale_exponent if self.scale_exponent else prediction


class _Given(NamedTuple):
    """Arguments of the builders: the task's row, its loss weight, the data set's classes and largest depth, the weight
    of the boundary loss's positive pixels, and whether means over images are reported."""

    headline: Headline
    loss_weight: float
    semseg_classes: tuple[str, ...]
    edge_pos_weight: float
    depth_max: float | None
    image_means: bool


def _classes(given: _Given, class_names: tuple[str, ...], **extra: Any) -> Task:
    from taskexpert_jax.tasks import constants, kinds, losses, metrics

    name, count = given.headline.name, len(class_names)
    if not 2 <= count <= 255:
        raise UserError(
            f"task {name}: {count} class names; labels are uint8 with 255 ignored, so give 2 to 255 "
            "(for semantic segmentation: config.dataset.semseg_classes)"
        )
    if len(set(class_names)) < count:
        twice = next(name for name in class_names if class_names.count(name) > 1)
        raise UserError(f"task {name}: two classes are named {twice!r}; give each its own name")
    return Task(
        **vars(given.headline),
        kind=kinds.classes(class_names),
        loss=losses.cross_entropy,
        loss_weight=given.loss_weight,
        metric=metrics.mean_iou(count),
        best_constant=constants.majority_class(count),
        **extra,
    )


def _semseg(given: _Given) -> Task:
    return _classes(given, given.semseg_classes, decides_crop=True)


def _human_parts(given: _Given) -> Task:
    return _classes(given, HUMAN_PARTS, ignore_if_empty=True)


def _depth(given: _Given) -> Task:
    from taskexpert_jax.tasks import constants, kinds, losses, metrics

    depth_max = losses.DEPTH_MAX if given.depth_max is None else given.depth_max
    return Task(
        **vars(given.headline),
        kind=kinds.depth(depth_max),
        scale_exponent=-1,
        loss=losses.depth_l1,
        loss_weight=given.loss_weight,
        metric=metrics.depth(depth_max),
        best_constant=constants.mean_value,
        image_means=("abs_err", "abs_rel") if given.image_means else (),
    )


def _disparity(given: _Given) -> Task:
    from taskexpert_jax.tasks import constants, kinds, losses, metrics
    from taskexpert_jax.tasks.metrics.disparity import FAMILY_MAX

    return Task(
        **vars(given.headline),
        kind=kinds.disparity(),
        scale_exponent=1,
        loss=losses.depth_l1,
        loss_weight=given.loss_weight,
        metric=metrics.Disparity,
        best_constant=constants.mean_below(FAMILY_MAX),
        image_means=("abs_err", "abs_rel") if given.image_means else (),
    )


def _normals(given: _Given) -> Task:
    from taskexpert_jax.tasks import constants, kinds, losses, metrics

    return Task(
        **vars(given.headline),
        kind=kinds.normals(),
        flip_signs=(-1, 1, 1),
        loss=losses.normals_l1,
        loss_weight=given.loss_weight,
        metric=metrics.Normals,
        best_constant=constants.best_direction,
        image_means=("mean", "median", "within_11.25", "within_22.5", "within_30") if given.image_means else (),
    )


def _edge(given: _Given) -> Task:
    from taskexpert_jax.tasks import constants, kinds, losses, metrics

    return Task(
        **vars(given.headline),
        kind=kinds.probability(logits=1),
        loss=losses.edge_cross_entropy(given.edge_pos_weight),
        loss_weight=given.loss_weight,
        metric=metrics.edge_loss(given.edge_pos_weight),
        best_constant=constants.best_edge_logit(given.edge_pos_weight),
    )


def _saliency(given: _Given) -> Task:
    from taskexpert_jax.tasks import constants, kinds, losses, metrics

    return Task(
        **vars(given.headline),
        kind=kinds.probability(logits=2),
        loss=losses.balanced_cross_entropy,
        loss_weight=given.loss_weight,
        metric=metrics.Saliency,
        best_constant=constants.always_foreground,
    )


class _Row(NamedTuple):
    """A task: its builder, and its headline without the name."""

    build: Callable[[_Given], Task]
    title: str
    main_metric: str
    main_metric_title: str
    higher_is_better: bool
    boundary_benchmark: bool = False


_ROWS = {
    "semseg": _Row(_semseg, "semantic segmentation", "mIoU", "mIoU (%)", higher_is_better=True),
    "depth": _Row(_depth, "depth", "rmse", "RMSE (m)", higher_is_better=False),
    "normals": _Row(_normals, "surface normals", "mean", "mean angle (°)", higher_is_better=False),
    # odsF takes seconds per image, so only `--mode=evaluate` computes it; training selects by the edge loss.
    "edge": _Row(_edge, "boundaries", "loss_plain", "loss", higher_is_better=False, boundary_benchmark=True),
    "human_parts": _Row(_human_parts, "human parts", "mIoU", "mIoU (%)", higher_is_better=True),
    "sal": _Row(_saliency, "saliency", "maxF", "maxF (%)", higher_is_better=True),
    "disparity": _Row(_disparity, "disparity", "rmse_80", "RMSE below 80 px (px)", higher_is_better=False),
}


NAMES = tuple(_ROWS)


def headline(name: str) -> Headline:
    """Headline of the task of this name, one of `NAMES`; needs no JAX."""
    facts = _ROWS[name]._asdict()
    del facts["build"]
    return Headline(name=name, **facts)


def build(
    names: Sequence[str],
    *,
    loss_weights: Mapping[str, float],
    semseg_classes: Sequence[str] = (),
    edge_pos_weight: float = 0.95,
    depth_max: float | None = None,
    image_means: bool = False,
) -> tuple[Task, ...]:
    """Records of the named tasks, in the given order.

    Args:
      names: task names, without repetition.
      loss_weights: task name -> weight of its loss in the total.
      semseg_classes: class names of semantic segmentation in the data set.
      edge_pos_weight: weight p of the positive pixels in the boundary loss; negatives weigh 1 - p.
      depth_max: metres; valid depths are more than 0 and less than this; default: `losses.DEPTH_MAX`.
      image_means: whether a full evaluation also reports means over images (`Task.image_means`).

    Raises:
      UserError: an unknown or repeated name, no name at all, or a missing loss weight.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"config.tasks: {tuple(names)} must name at least one task, each once")
    built = []
    for name in names:
        if name not in _ROWS:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(NAMES)}"
            raise UserError(f"config.tasks: unknown task {name!r}{hint}")
        if name not in loss_weights:
            raise UserError(f"config.loss_weights: no weight for task {name!r}; add config.loss_weights.{name}")
        weight = float(loss_weights[name])
        given = _Given(headline(name), weight, tuple(semseg_classes), edge_pos_weight, depth_max, image_means)
        built.append(_ROWS[name].build(given))
    return tuple(built)


def from_config(config: ConfigDict) -> tuple[Task, ...]:
    """Records of a config's tasks.

    From `tasks`, `loss_weights`, `edge_pos_weight`, `dataset.semseg_classes`, `dataset.depth_max`, `eval.image_means`.
    """
    return build(
        config.tasks,
        loss_weights=config.loss_weights,
        semseg_classes=config.dataset.semseg_classes,
        edge_pos_weight=config.edge_pos_weight,
        depth_max=config.dataset.depth_max,
        image_means=config.eval.image_means,
    )


def best_task(tasks: Sequence[Task], name: str) -> Task:
    """Task whose main metric selects the best checkpoint.

    Args:
      tasks: tasks of the run.
      name: the run's `config.checkpoint.best_task`.

    Raises:
      UserError: no task has this name.
    """
    for task in tasks:
        if task.name == name:
            return task
    known = ", ".join(task.name for task in tasks)
    raise UserError(f"config.checkpoint.best_task={name!r} is not among the tasks ({known})")
